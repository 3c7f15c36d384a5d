"""What a compiled program does: FLOPs, bytes and collectives of a small one for TPUs, against counts by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jvgen.nn.network import FROZEN_SCOPE
from jvgen.parallel.chips import chip_named
from jvgen.parallel.mesh import MeshConfig
from jvgen.preflight import hlo, program_cost, time_estimate, topology
from jvgen.preflight.program_cost import Kind, Phase

LAYERS, ROWS, WIDTH, DEVICES = 3, 4096, 512, 4
# One product of all rows of a device with one matrix.
PRODUCT = 2 * ROWS // DEVICES * WIDTH * WIDTH


@pytest.fixture(scope="module")
def compiled():
    """Mesh, module and operations of: a frozen product, then recomputed layers in a loop, weights split over fsdp."""
    if not topology.has_compiler():
        pytest.skip("libtpu, the TPU compiler, is not installed")
    pod, mesh = topology.describe_for(MeshConfig(fsdp=DEVICES), "v5e:2x2")
    rows, split = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in (("fsdp", None), (None, None, "fsdp")))
    whole = NamedSharding(mesh, PartitionSpec())

    def loss(weights, frozen, x):
        with jax.named_scope(FROZEN_SCOPE):
            x = jnp.tanh(jnp.dot(x, frozen))

        @jax.checkpoint
        def layer(x, weight):
            weight = jax.lax.with_sharding_constraint(weight, whole)
            return x + jax.nn.gelu(jnp.dot(x, weight)), None

        x = jax.lax.with_sharding_constraint(jax.lax.scan(layer, x, weights)[0], rows)
        return jnp.sum(x.astype(jnp.float32) ** 2)

    def step(weights, frozen, x):
        return weights - jax.grad(loss)(weights, frozen, x)

    def array(*shape, place):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)

    arguments = (
        array(LAYERS, WIDTH, WIDTH, place=split),
        array(WIDTH, WIDTH, place=whole),
        array(ROWS, WIDTH, place=rows),
    )
    text = jax.jit(step, out_shardings=split).lower(*arguments).compile().as_text()
    module = hlo.parse(text)
    return pod, mesh, module, program_cost.operations(module)


def test_flops_by_part_of_the_step(compiled):
    *_, operations = compiled
    flops = {phase: 0.0 for phase in Phase}
    for one in operations:
        flops[one.phase] += one.times * one.flops
    assert flops[Phase.FROZEN] == PRODUCT
    assert flops[Phase.FORWARD] == LAYERS * PRODUCT == flops[Phase.REMAT]
    assert flops[Phase.BACKWARD] == 2 * LAYERS * PRODUCT  # of the layer's input and of the weight
    assert flops[Phase.UPDATE] == 0


def test_weights_are_gathered_and_gradients_scattered_in_every_layer(compiled):
    _, mesh, _, operations = compiled
    weight = 2 * WIDTH * WIDTH
    gathers = [one for one in operations if one.sent and one.sent.kind == "all-gather"]
    assert sum(one.times * one.sent.bytes for one in gathers) == 2 * LAYERS * weight  # forward and recomputed
    assert {one.sent.group for one in gathers} == {(0, 1, 2, 3)}
    reduced = [one for one in operations if one.sent and one.sent.kind in ("reduce-scatter", "all-reduce")]
    assert sum(one.times * one.sent.bytes for one in reduced if one.sent.bytes > 4) == LAYERS * weight


def test_bytes_are_those_of_slices_and_not_of_stacks(compiled):
    """A layer reads its activations and one weight; all layers' weights and saved inputs are there in the loop."""
    *_, operations = compiled
    activation, weight = 2 * ROWS // DEVICES * WIDTH, 2 * WIDTH * WIDTH
    assert max(one.bytes for one in operations) <= 4 * activation + 4 * weight
    total = sum(one.times * one.bytes for one in operations if one.kind is not Kind.TRANSFER)
    assert total <= LAYERS * (12 * activation + 12 * weight) + 8 * activation


def test_time_of_the_step(compiled):
    pod, mesh, _, operations = compiled
    found = time_estimate.estimate(
        operations, {}, pod.chip, mesh, useful_flops=3 * LAYERS * PRODUCT, frozen_flops=PRODUCT
    )
    products = sum(times.least for name, times in found.parts.items() if name.startswith("matrix"))
    assert products >= 4 * LAYERS * PRODUCT / (time_estimate.PEAK_SHARE * pod.chip.peak_flops)
    assert found.parts[Phase.FROZEN.value].least >= PRODUCT / pod.chip.peak_flops
    (gathers,) = (one for one in found.traffic if one.kind == "all-gather")
    assert gathers.axes == "fsdp" and not gathers.network and 0 <= gathers.hidden <= gathers.seconds.likely
    seconds, (least, likely, most) = found.seconds, found.utilization
    assert 0 < seconds.least < seconds.likely < seconds.most and 0 < least < likely < most < 1
    assert likely == pytest.approx(3 * LAYERS * PRODUCT / (seconds.likely * 197e12))
    assert found.program_flops == 5 * LAYERS * PRODUCT - LAYERS * PRODUCT + PRODUCT


@pytest.mark.parametrize(
    "operation, operands, attributes, flops",
    [
        ("dot", ("bf16[8,16]", "bf16[16,32]"), "lhs_contracting_dims={1}, rhs_contracting_dims={0}", 2 * 8 * 32 * 16),
        ("convolution", ("bf16[8,16]", "bf16[16,32]"), "dim_labels=bf_io->bf", 2 * 8 * 32 * 16),
        # 3 taps over 6 positions with padding: 2 + 4 * 3 + 2 meet input.
        ("convolution", ("bf16[2,6,4]", "bf16[3,4,5]"), "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f",
         2 * 2 * 5 * 4 * 16),
        # A batched product, as XLA writes it: 4 taps on a diagonal, one of which meets input for each output.
        ("convolution", ("bf16[4,8,16]", "bf16[4,16,32]"),
         "window={size=4 stride=3 pad=0_0 lhs_dilate=4}, dim_labels=0bf_0io->0bf", 2 * 4 * 8 * 32 * 16),
    ],
)  # fmt: skip
def test_flops_of_products(operation, operands, attributes, flops):
    result = {"bf16[8,16]": "bf16[8,32]", "bf16[2,6,4]": "bf16[2,6,5]", "bf16[4,8,16]": "bf16[4,8,32]"}[operands[0]]
    text = f"""HloModule m

ENTRY %main.1 (a: x) -> x {{
  %a = {operands[0]}{{1,0}} parameter(0)
  %b = {operands[1]}{{1,0}} parameter(1)
  ROOT %c = {result}{{1,0}} {operation}(%a, %b), {attributes}
}}
"""
    module = hlo.parse(text)
    assert program_cost.product_flops(module, module.computations["main.1"]["c"]) == flops
    (made,) = program_cost.operations(hlo.parse(text.replace("bf16", "s8")))
    assert (made.flops, made.int8_flops) == (flops, flops) and program_cost.operations(module)[0].int8_flops == 0
    chip = chip_named("v5p")
    assert 2 * time_estimate._product_seconds(made, chip) == flops / chip.device_peak_flops / time_estimate.PEAK_SHARE


@pytest.mark.parametrize(
    "source, phase",
    [
        ("jit(step)/jvp()/while/body/closed_call/dot_general", Phase.FORWARD),
        ("jit(step)/jvp(frozen)/while/body/dot_general", Phase.FROZEN),
        ("jit(step)/frozen/encoder/dot_general", Phase.FROZEN),
        ("jit(step)/transpose(jvp())/checkpoint/rematted_computation/dot_general", Phase.REMAT),
        ("jit(step)/transpose(jvp())/checkpoint/dot_general", Phase.BACKWARD),
        ("jit(step)/add", Phase.UPDATE),
        ("", Phase.UPDATE),
    ],
)
def test_parts_of_a_step_by_name(source, phase):
    assert program_cost.phase(source) is phase


@pytest.mark.parametrize(
    "strategy,links",
    [
        ("UniDirectionNDRingStrategy{colors:6 phases:3", 6),
        ("StrategyND{colors:3 phases:3", 6),
        ("StrategyRing{colors:1 phases:1", 2),
    ],
)
def test_links_of_a_sum_are_those_of_its_rings(strategy, links):
    name = strategy.partition("{")[0]
    module = hlo.parse(
        "ENTRY %main (a: f32[8]) -> f32[8] {\n  %a = f32[8]{0} parameter(0)\n"
        "  ROOT %all-reduce.1 = f32[8]{0} all-reduce(%a), replica_groups={{0,1,2,3}}, to_apply=%add, "
        'backend_config={"collective_algorithm_config":{"emitter":"RotatedPincerEmitter",'
        f'"strategy":"{name}","debug":"\\n{strategy} cores:{{4 4 4}}}}"}}}}\n}}\n'
    )
    (found,) = program_cost.operations(module)
    assert found.sent is not None and found.sent.links == links


# Two colors of rings, which are passed at the same time; the rings of a color one after the other.
RINGS = """"color_strategies":[
{"phase_rings":[{"id":"0","ring_type":"ICI_RING_TYPE_UNIDIR_CW"},{"id":"1","ring_type":"ICI_RING_TYPE_UNIDIR_CW"}]},
{"phase_rings":[{"id":"0","ring_type":"ICI_RING_TYPE_UNIDIR_CCW"}]}]"""
SPARSE_CORE = """HloModule m

%reduce.1 (p.1: bf16[64,128]) -> bf16[64,128] {
  %p.1 = bf16[64,128]{1,0} parameter(0)
  ROOT %all-reduce.1 = bf16[64,128]{1,0} all-reduce(%p.1), replica_groups={{0,1,2,3}}, to_apply=%add,
    backend_config={RINGS}
}

%queue.1 (p.2: bf16[64,128]) -> bf16[64,128] {
  %p.2 = bf16[64,128]{1,0} parameter(0)
  ROOT %call.1 = bf16[64,128]{1,0} custom-call(%p.2), custom_call_target="later", called_computations={%reduce.1}
}

ENTRY %main.1 (x: bf16[64,128]) -> bf16[64,128] {
  %x = bf16[64,128]{1,0} parameter(0)
  %load.1 = ((), (), (s32[7378944]{0})) async-start(), async_execution_thread="sparsecore", calls=%queue.1
  %first.1 = bf16[64,128]{1,0} negate(%x)
  %send.1 = ((bf16[64,128]{1,0}), bf16[64,128]{1,0}, (s32[7378944]{0})) async-update(%load.1, %first.1)
  %beside.1 = bf16[64,128]{1,0} negate(%first.1)
  %goes-on.1 = ((bf16[64,128]{1,0}), bf16[64,128]{1,0}, (s32[7378944]{0})) async-update(%send.1)
  %done.1 = bf16[64,128]{1,0} async-done(%goes-on.1)
  ROOT %sum.1 = bf16[64,128]{1,0} add(%done.1, %beside.1)
}
"""


def test_a_collective_on_a_sparse_core_begins_when_its_arrays_are_there():
    found = {one.name: one for one in program_cost.operations(hlo.parse(SPARSE_CORE.replace("RINGS", RINGS)))}
    sent = found["send.1"].sent
    assert found["send.1"].is_start
    assert (sent.kind, sent.bytes, sent.group) == ("all-reduce", 64 * 128 * 2, (0, 1, 2, 3))
    # Loading its program moves no array; what carries on and what waits belong to the same collective.
    assert found["load.1"].sent is None and found["load.1"].bytes == 0
    assert [found[name].start for name in ("load.1", "send.1", "goes-on.1", "done.1")] == ["", "", "send.1", "send.1"]
    assert sum(one.sent is not None for one in found.values()) == 1
