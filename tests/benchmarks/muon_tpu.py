"""What Muon's update of RepVideo-2B sends between the chips of a pod, by XLA's TPU compiler: the update alone.

python -m tests.benchmarks muon_tpu --topology v5p:4x4x8
"""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jvgen import config as configuration
from jvgen import nested
from jvgen.parallel import axes
from jvgen.parallel.chips import chip_of
from jvgen.parallel.mesh import make_mesh
from jvgen.preflight import collectives, hlo, program_cost, topology
from jvgen.preflight.ahead_of_time import without_cache
from jvgen.preflight.report import MIB
from jvgen.preflight.time_estimate import estimate
from jvgen.training.program import Program
from tests.benchmarks.machine import Settings
from tests.benchmarks.report import Result
from tests.benchmarks.step_memory_tpu import QUICK

CONFIG = Path(__file__).parents[2] / "configs" / "repvideo_2b_scratch.py"


def run(settings: Settings) -> Result:
    """Compile for the topology of the settings; with `quick`, a small relative for four chips."""
    experiment, name = configuration.load(CONFIG), settings.topology
    if settings.quick:
        own = [change for change in QUICK if not change.startswith("data.")]
        experiment, name = configuration.override(experiment, own), "v5e:2x2"
    pod = topology.describe(name)
    program = Program.build(experiment, make_mesh(experiment.mesh, pod.devices))
    (optimizer,) = program.optimizers.values()
    state, places = program.abstract_state(), program.shardings
    (moments,), (held,) = state.optimizer.values(), places.optimizer.values()

    def update(gradients: Any, moments: Any, parameters: Any) -> Any:
        with axes.partitioned(program.sharding):
            return optimizer.update(gradients, moments, parameters, jnp.float32(1e-4))

    gradients = state.parameters
    with without_cache():
        compiled = (
            jax.jit(update, out_shardings=(places.parameters, held))
            .lower(gradients, moments, state.parameters)
            .compile()
        )
    module = hlo.parse(compiled.as_text())
    found = collectives.merged(collectives.read(module))
    shapes = nested.flatten(program.abstract.parameters)
    # A matrix of a stack that has a leading axis of layers.
    largest = max(4 * leaf.shape[-2] * leaf.shape[-1] for leaf in shapes.values() if len(leaf.shape) > 1)
    time = estimate(
        program_cost.operations(module), {}, chip_of(pod.devices[0]), program.sharding.mesh, useful_flops=0.0
    )
    rows = [
        {
            "kind": one.kind, "array": one.shape, "devices": one.devices, "count": one.count, "MiB": one.bytes / MIB,
            "MiB_in_all": one.total / MIB,
            "from": re.sub(r"\[.*?\]|jit\(\w+\)/", "", one.source)[-60:],
        }
        for one in found
    ]  # fmt: skip
    total = {kind: sum(one.total for one in found if one.kind == kind) / MIB for kind in collectives.KINDS}
    return Result(
        title=f"{CONFIG.name}: collectives of the update alone, per device of {pod.name}",
        settings={"quick": settings.quick, "mesh": dict(program.sharding.mesh.shape), "optimizer": "muon"},
        rows=rows,
        notes=(
            f"MiB by kind: {', '.join(f'{kind} {size:.1f}' for kind, size in total.items() if size)}.",
            f"The largest matrix has {largest / MIB:.1f} MiB in float32.",
            f"Estimated {1e3 * time.seconds.likely:.1f} ms, of which "
            + ", ".join(f"{part} {1e3 * took.likely:.1f}" for part, took in time.parts.items()),
        ),
    )
