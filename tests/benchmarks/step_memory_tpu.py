"""Memory per device of a TPU pod, as compiled, against a lower bound for the training step of CogVideoX-2B."""

import math
from pathlib import Path
from typing import Any

from jvgen import config as configuration
from jvgen.nn.embeddings import token_grid
from jvgen.nn.stacked import Remat
from jvgen.parallel.mesh import make_mesh
from jvgen.preflight import topology
from jvgen.preflight.ahead_of_time import compile_bucket
from jvgen.preflight.estimate import saved_between_layers
from jvgen.preflight.report import GIB
from jvgen.training.experiment import Experiment
from jvgen.training.program import Program
from tests.benchmarks.machine import Settings
from tests.benchmarks.report import Result

CONFIG = Path(__file__).parents[2] / "configs" / "cogvideox_2b.py"
# Small enough to compile in a minute: the same mesh axes on four chips.
QUICK = (
    "task.denoiser.layers=2", "task.denoiser.heads=2", "task.denoiser.text_width=64", "task.text.encoder.layers=1",
    "task.text.encoder.width=64", "task.text.encoder.heads=2", "task.text.encoder.head_width=32",
    "task.text.encoder.hidden=64", "data.buckets.0.frames=5", "data.buckets.0.height=64", "data.buckets.0.width=64",
    "data.buckets.0.batch_size=4",
)  # fmt: skip


def run(settings: Settings) -> Result:
    """Compile for the topology of the settings; with `quick`, a small relative for four chips."""
    experiment: Experiment = configuration.load(CONFIG)
    name = settings.topology
    if settings.quick:
        experiment, name = configuration.override(experiment, QUICK), "v5e:2x2"
    pod = topology.describe(name)
    program = Program.build(experiment, make_mesh(experiment.mesh, pod.devices))
    (bucket,) = experiment.data.buckets
    report = compile_bucket(program, bucket)
    denoiser, text = experiment.task.denoiser, experiment.task.text.length
    shape = experiment.task.latent_shape(bucket.frames, bucket.height, bucket.width)
    rows = text + math.prod(token_grid(shape, denoiser.patch_shape))
    rows += -rows % denoiser.token_multiple
    kept = {Remat.FULL: 1, Remat.SAVE_ATTENTION: 2}[denoiser.remat]
    saved = saved_between_layers(program, bucket, rows, denoiser.width, denoiser.layers, kept)
    bound, memory = report.lower_bound.total + saved, report.memory
    row: dict[str, Any] = {
        "topology": pod.name,
        "state": report.lower_bound.state / GIB,
        "batch": report.lower_bound.batch / GIB,
        "gradients": report.lower_bound.gradients / GIB,
        "cast": report.lower_bound.cast / GIB,
        "saved": saved / GIB,
        "lower_bound": bound / GIB,
        "compiled": None if memory is None else memory.total / GIB,
        "ratio": None if memory is None else memory.total / bound,
        "hbm": pod.hbm_bytes / GIB,
        "compile_s": report.seconds,
    }
    return Result(
        title="GiB/device of configs/cogvideox_2b.py, as XLA's TPU compiler has it; ratio = compiled / lower_bound",
        settings={"quick": settings.quick, "mesh": dict(program.sharding.mesh.shape), "remat": denoiser.remat.value},
        rows=[row],
        notes=(
            "lower_bound = state (frozen text encoder included) + batch + gradients + parameters in bfloat16",
            f"+ what the remat policy saves: {kept} arrays of tokens x width per layer; temporaries of one layer are",
            "not included.",
            *([report.problem] if report.problem else []),
        ),
    )
