"""Preflight: checks, the lower bound on memory, collectives of a compiled program, compilation for described pods."""

import dataclasses
import json
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jvgen import config
from jvgen.cli import main as cli
from jvgen.config import ConfigError
from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig
from jvgen.diffusion.objective import ObjectiveConfig
from jvgen.diffusion.schedule import ScheduleConfig
from jvgen.launch.flags import flags_of
from jvgen.models.byte_text.config import ByteTextConfig
from jvgen.models.video_dit.config import VideoDiTConfig
from jvgen.nn.kernel_report import KernelReport, collecting
from jvgen.nn.stacked import Remat
from jvgen.parallel.chips import chip_named, chip_of
from jvgen.parallel.mesh import MeshConfig, make_mesh
from jvgen.parallel.rules import ShardingConfig
from jvgen.preflight import ahead_of_time, collectives, program_cost, topology
from jvgen.preflight import check as preflight
from jvgen.preflight.ahead_of_time import compile_ahead
from jvgen.preflight.check import check
from jvgen.preflight.estimate import (
    ASSUMED_BASIS,
    ASSUMED_MFU,
    Reading,
    local_bytes,
    lower_bound,
    reading,
    replicated,
    saved_between_layers,
    step_seconds,
)
from jvgen.preflight.report import BucketReport, CompileReport, Memory
from jvgen.preflight.time_estimate import Seconds, TimeEstimate, Traffic
from jvgen.tasks import text_to_video_config
from jvgen.tasks.text import TextConfig
from jvgen.tasks.text_to_video import TextToVideoConfig
from jvgen.training.config import TrainingConfig
from jvgen.training.experiment import Experiment
from jvgen.training.optimization.health import one_per_step
from jvgen.training.program import Program

sys.path.insert(0, str(Path(__file__).parents[1]))
import toys  # noqa: E402

needs_compiler = pytest.mark.skipif(not topology.has_compiler(), reason="libtpu, the TPU compiler, is not installed")


def video_experiment(frames=5, size=64, text=16, **changes) -> Experiment:
    """A small denoiser of 4-frame clips with trained byte captions; 2 x 16 x 16 latent tokens and the text."""
    base = Experiment(
        name="small",
        task=TextToVideoConfig(
            denoiser=VideoDiTConfig(
                layers=2, heads=4, head_width=64, in_channels=4, out_channels=4, text_width=32, text_length=text,
                condition_width=64, remat=Remat.SAVE_ATTENTION, token_multiple=64,
            ),
            text=TextConfig(encoder=ByteTextConfig(width=32, layers=1, heads=2), length=text),
            schedule=ScheduleConfig(kind="cogvideox"),
            objective=ObjectiveConfig(target="v"),
            temporal_compression=4,
        ),
        data=DataConfig(
            sources=(SourceConfig(path="nowhere"),),
            buckets=(BucketConfig(frames=frames, height=size, width=size, batch_size=8),),
        ),
        training=TrainingConfig(steps=10),
    )  # fmt: skip
    return config.override(base, [f"{path}={value}" for path, value in changes.items()])


def problems(experiment, workdir=None) -> str:
    with pytest.raises(ConfigError) as raised:
        check(experiment, workdir)
    return str(raised.value)


@pytest.fixture
def no_data(monkeypatch):
    monkeypatch.setattr(preflight, "Loader", lambda *args, **options: None)
    monkeypatch.setattr(text_to_video_config, "check_one_encoder", lambda *args: None)


# Checks.


def test_a_valid_run_passes_and_its_kernels_are_not_run(no_data, tmp_path):
    with collecting(KernelReport()) as announced:
        check(video_experiment(**{"mesh.fsdp": 2, "mesh.seq": 2, "mesh.tensor": 2}), tmp_path / "new" / "run")
    assert not announced.calls


def test_all_problems_are_in_one_message(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    message = problems(video_experiment(frames=6, size=60, **{"data.buckets.0.batch_size": 9}), file / "run")
    assert message.startswith("4 problems:")
    assert "data.buckets.0: frames = 6" in message
    assert "data set folder 'nowhere' does not exist" in message
    assert "batch_size = 9 must be a multiple of 8" in message
    assert f"{file} is a file" in message


def test_mesh_that_does_not_divide_the_devices(no_data):
    assert "multiple of 3 devices, but there are 8" in problems(video_experiment(**{"mesh.seq": 3}))


def test_tokens_and_heads_that_do_not_divide(no_data):
    message = problems(video_experiment(**{"mesh.fsdp": 1, "mesh.tensor": 8}))
    assert "mesh.tensor = 8 does not divide 4 (activation_heads); choose a mesh.tensor" in message
    tokens = {"mesh.fsdp": 1, "mesh.seq": 8, "task.denoiser.token_multiple": 1, "sharding.whole_examples": False}
    message = problems(video_experiment(text=15, **tokens))
    assert "mesh.seq = 8 does not divide 47 (length); pad the tokens" in message


def test_full_disk(no_data, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    assert "GiB (parameters, optimizer state, EMA), but" in problems(video_experiment(), tmp_path / "run")


# Estimates.


def test_lower_bound_is_the_bytes_of_one_device():
    experiment = toys.experiment()
    experiment = experiment.replace(mesh=MeshConfig(fsdp=8), sharding=ShardingConfig(replicate_below=0))
    program = Program.build(experiment, make_mesh(experiment.mesh))
    state = program.init()
    device = jax.devices()[0]

    def held(tree):
        shards = [shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards]
        return sum(shard.data.nbytes for shard in shards if shard.device == device)

    bound = lower_bound(program, experiment.data.buckets[0])
    assert bound.parameters == held(state.parameters) == bound.gradients
    assert bound.optimizer == held(state.optimizer) and bound.ema == held(state.ema)
    assert bound.cast == 0 and bound.total > bound.state


def test_bytes_saved_between_layers_count_one_shard():
    experiment = video_experiment(**{"mesh.fsdp": 2, "mesh.seq": 4})
    program = Program.build(experiment, make_mesh(experiment.mesh))
    size = saved_between_layers(program, experiment.data.buckets[0], tokens=64, width=256, layers=2, kept=3)
    assert size == 3 * 2 * (8 // 2) * (64 // 4) * 256 * 2


def test_what_a_process_reads():
    experiment = toys.experiment(**{"mesh.fsdp": 4, "mesh.seq": 2})
    program = Program.build(experiment, make_mesh(experiment.mesh))
    bucket = experiment.data.buckets[0]
    seconds = step_seconds(program, bucket, 1e12)
    assert seconds == 3 * 16 * 4 * 9 * 2 * 16**2 / (8 * 1e12 * ASSUMED_MFU)
    found = reading(program, bucket, 1e12)
    # x, float32 4 x 16; record and slot, int32.
    assert (found.rows, found.readers, found.bytes) == (16, 1.0, 16 * (4 * 16 * 4 + 4 + 4))
    assert found.bytes_per_second == found.bytes / seconds
    assert "/s" not in str(reading(program, bucket, None))


def test_bytes_that_fsdp_does_not_split():
    """7 does not divide 16: every matrix of the toy is whole on every device; biases are so on purpose."""
    experiment = toys.experiment(**{"mesh.fsdp": 7, "ema.decays": "()", "sharding.replicate_below": 100})
    program = Program.build(experiment, make_mesh(experiment.mesh, jax.devices()[:7]))
    found = replicated(program)
    matrices = 2 * (16 * 32 * 2) + 16 * 16
    # Parameters and two moments.
    assert sum(found.undivided.values()) == pytest.approx(3 * 4 * matrices * 6 / 7, rel=1e-3)
    assert found.small == pytest.approx((3 * 4 * (2 * 16 + 16)) * 6 / 7, rel=0.2)
    assert set(found.undivided) == {
        f"model/{path}/kernel" for path in ("blocks/layers/up", "blocks/layers/down", "out")
    }
    split = Program.build(toys.experiment(), make_mesh(MeshConfig(fsdp=8)))
    assert not replicated(split).undivided


def test_local_bytes_counts_keys():
    key = jax.eval_shape(lambda: jax.random.key(0))
    assert local_bytes({"key": key, "x": jax.ShapeDtypeStruct((3,), jnp.bfloat16)}) == 8 + 6


# Collectives of programs.

PROGRAM = """HloModule jit_step, entry_computation_layout={...}

%all-reduce-scatter.1 (input.1: bf16[64,32]) -> bf16[8,32] {
  %input.1 = bf16[64,32]{1,0} parameter(0)
  ROOT %all-reduce.7 = bf16[64,32]{1,0} all-reduce(%input.1), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}
}

%start.1 (p.1: bf16[1,32]) -> (bf16[1,32], bf16[4,32]) {
  %all-gather.1 = bf16[4,32]{1,0} all-gather(%p.1), channel_id=1, metadata={op_name="jit(step)/gather"}
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

%body.1 (p.5: (s32[], bf16[1,32])) -> (s32[], bf16[1,32]) {
  %fusion.1 = (bf16[1,32], bf16[4,32]) fusion(%p.5), kind=kCustom, calls=%start.1
  %fusion.2 = (bf16[1,32], bf16[4,32]) fusion(%fusion.1), kind=kCustom, calls=%async_collective_fusion.2
  %fusion.3 = bf16[4,32] fusion(%fusion.2), kind=kCustom, calls=%done.1
  ROOT %fusion.4 = bf16[8,32] fusion(%fusion.3), kind=kCustom, calls=%all-reduce-scatter.1
}

ENTRY %main.1 (x: bf16[1,32]) -> f32[] {
  %while.1 = (s32[], bf16[1,32]) while(%x), condition=%condition.1, body=%body.1
  %while.2 = (s32[], bf16[1,32]) while(%x), condition=%condition.1, body=%body.1, config={"known_trip_count":{"n":"2"}}
  %all-reduce.2 = (f32[10]{0}, f32[20]{0}) all-reduce(%a, %b), channel_id=5, replica_groups={{0,1}}
  %reduce-scatter.1 = f32[4]{0} reduce-scatter(%c), channel_id=6, replica_groups=[2,4]<=[8], dimensions={0}
  %all-gather-start.1 = (f32[2]{0}, f32[8]{0}) all-gather-start(%d), channel_id=7
  ROOT %all-gather-done.1 = f32[8]{0} all-gather-done(%all-gather-start.1)
}
"""


def test_collectives_of_a_program():
    found = {(c.kind, c.shape): (c.count, c.bytes) for c in collectives.merged(collectives.read(PROGRAM))}
    assert found == {
        ("reduce-scatter", "bf16[64,32]"): (32, 64 * 32 * 2),
        ("all-gather", "bf16[4,32]"): (32, 4 * 32 * 2),
        ("all-reduce", "f32[20] and 1 more"): (1, 30 * 4),
        ("reduce-scatter", "f32[4]"): (1, 4 * 4 * 4),
        ("all-gather", "f32[8]"): (1, 32),
    }


def test_collectives_of_this_machines_compiler():
    mesh = make_mesh(MeshConfig(fsdp=8))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))

    def three_sums(x):
        body = jax.shard_map(
            lambda x: jax.lax.psum(x, "fsdp"), mesh=mesh, in_specs=place.spec, out_specs=jax.sharding.PartitionSpec()
        )
        return jax.lax.scan(lambda carry, _: (carry + body(x), None), jnp.zeros((2,)), length=3)[0]

    text = jax.jit(three_sums).lower(jax.ShapeDtypeStruct((16,), jnp.float32, sharding=place)).compile().as_text()
    (one,) = collectives.read(text)
    assert one.kind == "all-reduce" and one.bytes == 8 and one.count in (1, 3)


# Compiling for TPUs.


def report_of(**memory) -> CompileReport:
    bound = lower_bound(Program.build(toys.experiment(), make_mesh(MeshConfig())), toys.experiment().data.buckets[0])
    parts = {"arguments": 8, "outputs": 7, "aliased": 7, "temporaries": 1, "code": 0.5, "peak": 9} | memory
    bucket = BucketReport(
        bucket=toys.experiment().data.buckets[0], memory=Memory(**{k: v * 2**30 for k, v in parts.items()}),
        lower_bound=bound, flops={"model": 3e15}, seconds=1.0,
        reading=Reading(rows=4, clips=8, batch_size=16, readers=2.0, bytes=3 * 2**20, seconds=1.5),
        collectives=(collectives.Collective("all-gather", "bf16[4,32]", 30, 2**20),),
        kernels=("attention of 1x512x1x64 over 512 keys in float32: kernel chunked (a reason)",),
    )  # fmt: skip
    return CompileReport("v5e:2x2", "v5e", "mesh", "precision: bfloat16", 4, 2, 10 * 2**30, 197e12, (bucket,))


def test_report():
    report = report_of()
    assert report.fits and not report_of(temporaries=2).fits
    assert "9.500" in str(report) and "95.0%" in str(report) and "all-gather" in str(report) and "30.0" in str(report)
    assert "2 processes (hosts) of 2 devices" in str(report)
    assert "kernels: attention of 1x512x1x64 over 512 keys in float32: kernel chunked (a reason)" in str(report)
    assert "reads 4 of 16 examples per step (8 clips, each read by 2 processes)" in str(report)
    assert f"3 MiB decoded: 2 MiB/s at 1.5 s/step ({ASSUMED_BASIS})" in str(report)
    document = json.loads(report.to_json())
    assert document["fits"] is True and document["buckets"][0]["total_bytes"] == 9.5 * 2**30


def estimated(**changes) -> TimeEstimate:
    parts = {"kernel splash_mha_fwd": Seconds(0.4, 0.5, 0.7), "frozen networks": Seconds(0.1, 0.1, 0.1)}
    sent = Traffic("all-gather", "fsdp", False, True, 24, 2.0 * 2**30, Seconds(0.1, 0.2, 0.3), 0.05)
    values = {
        "parts": parts, "traffic": (sent,), "cycles": {"splash_mha_fwd.1": 7}, "without_cycles": (),
        "useful_flops": 98.5e12, "frozen_flops": 2e12, "program_flops": 1e12, "chip": chip_named("v5e"),
    }  # fmt: skip
    return TimeEstimate(**values | changes)


def test_report_of_the_time(monkeypatch, capsys):
    report = report_of()
    (bucket,) = report.buckets
    report = dataclasses.replace(report, buckets=(dataclasses.replace(bucket, time=estimated()),))
    for text in (str(report), report.times()):
        assert "estimate: 0.6 (0.5 to 0.8) s per step, MFU 83.3% (62.5% to 100.0%); not measured" in text
        assert "164 TFLOP/s per device, 164 of 197 per chip" in text and "frozen networks (2.0 TFLOP)" in text
        assert "fsdp, frozen networks" in text and "v5e:2x2 has 4 chips (Cloud TPU v5litepod-4)" in text
        assert "40% MFU" not in text
    assert "a FLOP of attention" not in report.times()  # how many there are is not known
    parts = {"kernel splash_mha_fwd": Seconds(0, 0.6, 1), "matrix products, forward": Seconds(0, 0.3, 1),
             "layout copies, backward": Seconds(0, 0.1, 1), "collectives": Seconds(0, 5, 9)}  # fmt: skip
    shared = estimated(parts=parts, useful_flops=10.0, attention_flops=5.0)
    assert shared.attention_cost == pytest.approx(1.5)
    assert (
        "takes 1.50 times" in dataclasses.replace(report, buckets=(dataclasses.replace(bucket, time=shared),)).times()
    )
    document = json.loads(report.to_json())
    assert document["buckets"][0]["time"]["seconds"] == {"least": 0.5, "likely": 0.6, "most": pytest.approx(0.8)}
    incomplete = dataclasses.replace(bucket, time=estimated(without_cycles=("splash.1",)))
    told = dataclasses.replace(report, buckets=(incomplete,)).times()
    assert "estimate: more than 0.6 (0.5 to 0.8) s per step, MFU less than 83.3% (62.5% to 100.0%)" in told
    monkeypatch.setattr(ahead_of_time, "compile_ahead", lambda *args, **options: report)
    monkeypatch.setattr("jvgen.cli.compile.experiment_of", lambda parsed: toys.experiment())
    assert cli.main(["estimate", "config.py", "--topology", "v5e:2x2"]) == 0
    assert capsys.readouterr().out.strip() == report.times()
    # With the flags that a launch on these chips has, if they are asked for.
    seen = []
    monkeypatch.setattr(
        ahead_of_time, "compile_ahead",
        lambda *args, **options: seen.append(os.environ["LIBTPU_INIT_ARGS"].split()) or report,
    )  # fmt: skip
    for wanted in ("none", "preset"):
        assert cli.main(["estimate", "config.py", "--topology", "v5p:2x2x1", "--xla-flags", wanted]) == 0
    preset = {str(flag) for flag in flags_of(chip_named("v5p"))}
    assert preset and preset <= set(seen[1]) and not preset & set(seen[0])


def test_a_chip_without_a_known_clock_has_no_estimate_and_says_why():
    """Its program can be read: there are its collectives."""
    report = report_of()
    assert "no estimate: the compiled program cannot be read" in report.times()
    report = dataclasses.replace(report, chip="tpu7x", topology="tpu7x:2x2x1")
    assert "no estimate: the clock of tpu7x is not known" in report.times()


def test_missing_compiler(monkeypatch):
    monkeypatch.setattr(topology.libtpu, "is_installed", lambda: False)
    with pytest.raises(ConfigError, match=r"libtpu, which is not installed: pip install 'jvgen\[tpu\]'"):
        compile_ahead(toys.experiment(), "v5e:2x2")


@pytest.mark.parametrize(
    "name,message",
    [
        ("v5e:3x3", "a slice of v5e comes as 2x2, .*16x16"),
        ("v5e:0x0", "a slice of v5e comes as"),
        ("v5e:16x8", "Did you mean 8x16"),
        ("v5p:4x4x6", "v5p comes as 2x2x1, .* three ascending multiples of 4 .* at most 8960 chips"),
        ("v5p:32x32x32", "at most 8960 chips"),
        ("v9:2x2", "'v9' is not a TPU generation; there are v4, v5e, v5p, v6e, tpu7x"),
        ("H100:4x8", "'H100' is not a TPU generation.*on a machine that has them"),
        ("v5e", "write GENERATION:SHAPE, for example v5e:16x16"),
        ("v5e:axb", "write GENERATION:SHAPE"),
        ("v5e:2x-2", "write GENERATION:SHAPE"),
    ],
)
def test_unknown_topology(monkeypatch, name, message):
    """Found in a table: libtpu ends the process for some of them."""
    monkeypatch.setattr(topology.topologies, "get_topology_desc", None)
    with pytest.raises(ConfigError, match=f"topology '{name}': .*{message}"):
        topology.describe(name)


@pytest.mark.parametrize(
    "settings,slices,message",
    [
        ({"mesh.fsdp": 3}, 1, r"topology v5e:4x4: mesh data=1, fsdp=3.* needs 3 devices, but there are 16"),
        ({"mesh.fsdp": 16, "mesh.seq": 3}, 3, r"topology 3 x v5e:4x4: mesh data=1, fsdp=16 on 3 slices"),
        ({}, 0, "slices = 0: a run needs at least one slice"),
    ],
)
def test_a_mesh_that_does_not_fit_a_pod(monkeypatch, settings, slices, message):
    monkeypatch.setattr(topology.topologies, "get_topology_desc", None)
    with pytest.raises(ConfigError, match=message):
        topology.describe_for(toys.experiment(**settings).mesh, "v5e:4x4", slices)


@needs_compiler
@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("name", ["v4:2x2x4", "v5e:2x2", "v5e:4x8", "v5p:2x4x4", "v6e:2x4", "tpu7x:2x2x2"])
def test_the_table_of_pods_is_what_libtpu_describes(name, slices):
    found = topology.describe(name, slices)
    assert len(found.devices) == found.pod.devices
    assert len({device.process_index for device in found.devices}) == found.pod.hosts
    assert len({getattr(device, "slice_index", 0) for device in found.devices}) == slices
    assert chip_of(found.devices[0]) == found.chip


@needs_compiler
def test_two_slices_cross_the_data_axis():
    _, mesh = topology.describe_for(MeshConfig(data=2, fsdp=4), "v5e:2x2", 2)
    assert [{device.slice_index for device in replica.flat} for replica in mesh.devices] == [{0}, {1}]


class Unwritable:
    """Of programs with SparseCore operations, as for tpu7x, this XLA cannot write the text."""

    def as_text(self) -> str:
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure")


def test_a_compiled_program_that_nothing_writes_as_text_has_unknown_collectives(tmp_path):
    assert ahead_of_time._module(Unwritable(), tmp_path) is None


@needs_compiler
def test_compile_for_a_small_pod(monkeypatch):
    experiment = toys.experiment()
    bucket = experiment.data.buckets[0]
    # A later stage repeats the batch shape: compiled once.
    stages = (bucket.replace(end_step=1), bucket.replace(start_step=1))
    experiment = experiment.replace(mesh=MeshConfig(fsdp=2, tensor=2), data=experiment.data.replace(buckets=stages))
    reports, read, modules = [], ahead_of_time._module, []

    def both_ways(compiled, folder):
        modules.extend([read(compiled, folder), read(Unwritable(), folder)])
        return modules[0]

    monkeypatch.setattr(ahead_of_time, "_module", both_ways)
    report = compile_ahead(experiment, "v5e:2x2", on_bucket=reports.append)
    assert reports == [report]
    assert report.fits and report.devices == 4 and report.chip == "v5e" and report.hbm_bytes == 15.75 * 2**30
    (bucket,) = report.buckets
    assert bucket.memory.arguments >= bucket.lower_bound.state > 0
    assert bucket.memory.aliased > 0 and bucket.collectives
    assert "TPU v5 lite" in report.mesh
    # What libtpu writes itself is the same program; of some collectives it says more about their rings.
    assert bucket.collectives == tuple(collectives.merged(collectives.read(modules[1])))
    fields = ("name", "kind", "phase", "times", "flops", "bytes", "cycles", "start", "is_start", "block", "text")
    found, expected = (
        [[getattr(one, field) for field in fields] for one in program_cost.operations(module)] for module in modules
    )
    assert found == expected


def test_stages_with_the_same_batch_shape_share_a_step():
    (bucket, *_) = toys.experiment().data.buckets
    later, larger = bucket.replace(start_step=5, weight=0.25), bucket.replace(batch_size=2 * bucket.batch_size)
    assert one_per_step([bucket, later, larger, later]) == (bucket, larger)


@needs_compiler
def test_a_step_that_training_refuses_has_no_report():
    """XLA would compile it, with heads that every device computes."""
    with pytest.raises(ValueError, match=r"mesh.tensor = 8 does not divide 4 \(activation_heads\)"):
        compile_ahead(video_experiment(**{"mesh.fsdp": 1, "mesh.tensor": 8}), "v5e:2x4")


@needs_compiler
def test_compile_for_a_pod_of_another_size():
    with pytest.raises(ValueError, match="needs 8 devices, but there are 4"):
        compile_ahead(toys.experiment().replace(mesh=MeshConfig(fsdp=8)), "v5e:2x2")


@needs_compiler
@pytest.mark.slow
def test_denoiser_with_splash_attention_for_a_small_pod():
    """1024 tokens on 2 x 2 devices: keys gathered, their gradients scattered, layers gathered one by one."""
    experiment = video_experiment(frames=17, size=256, **{"mesh.fsdp": 2, "mesh.seq": 2})
    experiment = experiment.replace(sharding=ShardingConfig(replicate_below=1024))
    (bucket,) = compile_ahead(experiment, "v5e:2x2").buckets
    kinds = {(one.kind, one.shape) for one in bucket.collectives}
    assert any(kind == "reduce-scatter" and shape.endswith("256]") for kind, shape in kinds)
    assert ("all-gather", "bf16[1,256,1024]") in kinds


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("pod", ["v5e:16x16", "v5p:4x4x8", "v6e:16x16"])
def test_cogvideox_2b_fits_the_pods(pod):
    """49 frames of 480x720, one clip per four chips or more: fits; attention in blocks, layers gathered one by one."""
    experiment = config.load(Path(__file__).parents[2] / "configs" / "cogvideox_2b.py")
    report = compile_ahead(experiment, pod)
    (bucket,) = report.buckets
    assert report.fits and bucket.bucket.batch_size * 4 >= report.devices
    # All scores in bfloat16 would take 0.16 GiB per head and device; nothing of that order is allocated.
    assert bucket.memory.temporaries < 12 * 2**30
    sizes = [one.bytes for one in bucket.collectives]
    assert max(sizes) <= 256 * 2**20
    kinds = {one.kind for one in bucket.collectives if one.count >= 30}
    assert {"all-gather", "reduce-scatter"} <= kinds
