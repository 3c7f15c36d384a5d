"""What RepVideo's aggregation adds to CogVideoX-2B's step, and Enhance-A-Video to sampling, as compiled for TPUs."""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jvgen import config as configuration
from jvgen.models.video_dit.config import AggregationConfig
from jvgen.models.video_dit.enhance import EnhanceConfig, Enhancement
from jvgen.parallel import axes
from jvgen.parallel.mesh import make_mesh
from jvgen.preflight import collectives, topology
from jvgen.preflight.report import GIB, Memory
from jvgen.preflight.topology import Topology
from jvgen.training.experiment import Experiment
from jvgen.training.program import Program
from jvgen.training.telemetry.throughput import step_flops
from tests.benchmarks.machine import Settings
from tests.benchmarks.report import Result
from tests.benchmarks.step_memory_tpu import CONFIG, QUICK

# Bytes a second between a chip and its memory, from the public data sheets.
BANDWIDTH = {"v5e": 819e9, "v5p": 2765e9, "v6e": 1640e9}
UTILIZATION = 0.4


def run(settings: Settings) -> Result:
    """Compile both for the topology of the settings; with `quick`, small relatives for four chips."""
    base = configuration.load(Path(CONFIG))
    name = settings.topology
    if settings.quick:
        base, name = configuration.override(base, QUICK), "v5e:2x2"
    pod = topology.describe(name)
    rows = [
        *_rows("training", "with", {side: _training(base, pod, aggregation) for side, aggregation in
                                    {"without": None, "with": AggregationConfig()}.items()}, base, pod),
        *_rows("sampling", "enhanced", {side: _sampling(base, pod, enhance) for side, enhance in
                                        {"without": None, "enhanced": EnhanceConfig()}.items()}, base, pod),
    ]  # fmt: skip
    return Result(
        title=f"a device of {CONFIG.name} on {pod.name}; ratio = with / without",
        settings={"topology": {"name": pod.name}},
        rows=rows,
        notes=(
            "GiB: arguments, outputs, temporaries of the program, by the TPU compiler. layer_MiB: what a layer moves",
            "between chip and memory besides its attention kernel, forward and backward (loops count once).",
            f"added_time: what is moved more, in all layers, against the step at {UTILIZATION:.0%} of peak.",
        ),
    )


def _training(base: Experiment, pod: Topology, aggregation: AggregationConfig | None) -> jax.stages.Compiled:
    denoiser = base.task.denoiser.replace(aggregation=aggregation)
    program = Program.build(base.replace(task=base.task.replace(denoiser=denoiser)), make_mesh(base.mesh, pod.devices))
    return program.lower(base.data.buckets[0]).compile()


def _sampling(base: Experiment, pod: Topology, enhance: EnhanceConfig | None) -> jax.stages.Compiled:
    """The denoiser with guidance: both halves in one batch."""
    program = Program.build(base, make_mesh(base.mesh, pod.devices))
    network, sharding, denoiser = program.task.networks["denoiser"], program.sharding, base.task.denoiser
    bucket, dtype = base.data.buckets[0], jnp.dtype(base.training.precision.compute_dtype)
    shape = base.task.latent_shape(bucket.frames, bucket.height, bucket.width)
    inputs = (
        jax.ShapeDtypeStruct((bucket.batch_size, *shape, denoiser.in_channels), dtype),
        jax.ShapeDtypeStruct((bucket.batch_size, base.task.text.length, denoiser.text_width), dtype),
        jax.ShapeDtypeStruct((bucket.batch_size,), jnp.float32),
    )
    parameters = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), network.shapes)
    strengths = jax.ShapeDtypeStruct((denoiser.layers,), jnp.float32)

    def denoise(parameters: Any, strengths: jax.Array, inputs: tuple) -> jax.Array:
        hook = None if enhance is None else Enhancement(enhance, strengths, clip_size=2)
        with axes.partitioned(sharding):
            return network.apply(parameters, *inputs, attention_scale=hook)

    places = (sharding.storage(network.axes, network.shapes), sharding.replicated, sharding.batch(inputs))
    return jax.jit(denoise, in_shardings=places).lower(parameters, strengths, inputs).compile()


def _rows(
    what: str, changed: str, programs: dict[str, jax.stages.Compiled], base: Experiment, pod: Topology
) -> list[dict[str, Any]]:
    sides = {side: _measured(program) for side, program in programs.items()}
    flops = sum(step_flops(base.task.build(), base.data.buckets[0]).values()) / len(pod.devices)
    # Backward passes have twice the products of forward passes.
    seconds = flops / (1 if what == "training" else 3) / pod.peak_flops / UTILIZATION
    bandwidth = BANDWIDTH.get(pod.name.split(":")[0], math.nan) * pod.pod.chips / len(pod.devices)
    moved = (sides[changed]["layer_MiB"] - sides["without"]["layer_MiB"]) * 2**20 * base.task.denoiser.layers
    for side, row in sides.items():
        row["ratio"] = row["GiB"] / sides["without"]["GiB"]
        row["added_time"] = moved / bandwidth / seconds if side == changed else 0.0
    return [{"step": what, "network": side, **row} for side, row in sides.items()]


def _measured(program: jax.stages.Compiled) -> dict[str, float]:
    sent = collectives.merged(collectives.read(program.as_text()))
    return {
        "GiB": Memory.of(program).total / GIB,
        "layer_MiB": program.cost_analysis()["bytes accessed"] / 2**20,
        "sent_MiB": sum(one.total for one in sent) / 2**20,
    }
