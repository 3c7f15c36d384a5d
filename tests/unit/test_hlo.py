"""The text of compiled programs as data: shapes with tiles, trip counts, groups of devices, chains of collectives."""

import pytest

from jvgen.preflight import hlo

PROGRAM = """HloModule step, is_scheduled=true

%start.1 (p.1: bf16[1,32]) -> (bf16[1,32], bf16[4,32]) {
  %p.1 = bf16[1,32]{1,0} parameter(0)
  %all-gather.1 = bf16[4,32]{1,0} all-gather(%p.1), channel_id=1, replica_groups={{0,2},{1,3}}
  ROOT %custom-call.1 = (bf16[1,32], bf16[4,32]) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.2 (p.2: bf16[1,32]) -> (bf16[1,32], bf16[4,32]) {
  ROOT %all-gather.2 = bf16[4,32]{1,0} all-gather(%p.2), channel_id=1
}

%done.1 (p.3: bf16[1,32]) -> bf16[4,32] {
  %all-gather.3 = bf16[4,32]{1,0} all-gather(%p.3), channel_id=1
  ROOT %custom-call.2 = bf16[4,32] custom-call(%all-gather.3), custom_call_target="AsyncCollectiveDone"
}

%condition.1 (p.4: (s32[], bf16[1,32])) -> pred[] {
  %constant.1 = s32[] constant(30)
  ROOT %compare.1 = pred[] compare(%p.4, %constant.1), direction=LT
}

%inner.1 (p.6: (s32[], bf16[1,32])) -> (s32[], bf16[1,32]) {
  ROOT %add.1 = bf16[1,32]{1,0} add(%p.6, %p.6)
}

%body.1 (p.5: (s32[], bf16[1,32])) -> (s32[], bf16[1,32]) {
  %fusion.1 = (bf16[1,32], bf16[4,32]) fusion(%p.5), kind=kCustom, calls=%start.1
  %kernel.1 = bf16[4,32]{1,0:T(8,128)(2,1)} custom-call(%p.5), custom_call_target="tpu_custom_call", a={metadata={
"blocks":"{\\"block_q\\": 512}"
}}, metadata={op_name="jit(step)/jvp()/kernel"}
  %fusion.2 = (bf16[1,32], bf16[4,32]) fusion(%fusion.1), kind=kCustom, calls=%async_collective_fusion.2
  %fusion.3 = bf16[4,32] fusion(%fusion.2), kind=kCustom, calls=%done.1
  ROOT %while.3 = (s32[]) while(%fusion.3), condition=%condition.1, body=%inner.1, c={"known_trip_count":{"n":"5"}}
}

ENTRY %main.1 (x: bf16[1,32]) -> f32[] {
  ROOT %while.1 = (s32[], bf16[1,32]) while(%x), condition=%condition.1, body=%body.1
}
"""


def test_loops_within_loops():
    module = hlo.parse(PROGRAM)
    assert module.entry == "main.1"
    blocks = [(block[0].computation, times, loops) for block, times, loops in module.blocks()]
    assert blocks == [("main.1", 1, ()), ("body.1", 30, (30,)), ("inner.1", 150, (30, 5))]
    assert module.executions()["inner.1"] == 150 and module.executions()["start.1"] == 30


def test_attributes_over_several_lines():
    kernel = hlo.parse(PROGRAM).computations["body.1"]["kernel.1"]
    assert kernel.source == "jit(step)/jvp()/kernel" and kernel.operands == ("p.5",)


def test_chains_of_asynchronous_collectives():
    module = hlo.parse(PROGRAM)
    body = module.computations["body.1"]
    assert hlo.starts(module, "start.1") and not hlo.goes_on(module, "start.1")
    assert hlo.goes_on(module, "async_collective_fusion.2") and hlo.goes_on(module, "done.1")
    assert hlo.started_by(module, body["fusion.3"]) == "fusion.1" and not hlo.started_by(module, body["fusion.2"])


@pytest.mark.parametrize(
    "text, plain, padded",
    [
        ("bf16[3,100,64]{2,1,0:T(8,128)(2,1)}", 2 * 3 * 100 * 64, 2 * 3 * 104 * 128),
        ("bf16[3,100,64]{1,2,0:T(8,128)(2,1)}", 2 * 3 * 100 * 64, 2 * 3 * 128 * 64),  # 64 rows of 100 lanes
        ("f32[1000]{0:T(1024)}", 4000, 4096),
        ("f32[10,10]{1,0}", 400, 400),
        ("bf16[8,128]{1,0:T(8,128)(2,1)S(1)}", 2048, 0),  # in VMEM
        ("pred[]", 1, 1),
    ],
)
def test_bytes_of_arrays_with_tiles(text, plain, padded):
    (shape,) = hlo.shapes(text)
    assert (shape.bytes, shape.hbm_bytes) == (plain, padded)


@pytest.mark.parametrize(
    "attributes, group",
    [
        ("replica_groups={{0,4,8},{1,5,9}}", (0, 4, 8)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=[4,4]<=[2,2,4]T(2,0,1), use_global_device_ids=true", (0, 4, 8, 12)),
        ("replica_groups=mesh['fsdp'=16,'seq'=4] {'fsdp'}, x", tuple(range(0, 64, 4))),
        ("replica_groups=mesh['data'=2,'fsdp'=2,'seq'=2] {'data','seq'}", (0, 1, 4, 5)),
        ("source_target_pairs={{0,0},{1,2},{2,1}}", (1, 2)),
        ("channel_id=1", ()),
    ],
)
def test_groups_of_devices(attributes, group):
    one = hlo.Instruction("all-gather.1", "all-gather", "main", False, "bf16[8]", f"%x), {attributes}")
    assert hlo.first_group(one) == group
    if "pairs" not in attributes:
        assert hlo.group_size(one) == max(1, len(group))
