"""Peak memory of the compiled step against the least that it could need: state, gradients, batch, saved activations."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Var

from jvgen.models.video_dit.config import VideoDiTConfig
from jvgen.nn.compute_dtype import cast
from jvgen.nn.embeddings import token_grid
from jvgen.nn.stacked import Remat
from jvgen.parallel import axes
from jvgen.parallel.mesh import single_device_mesh
from jvgen.preflight.report import Memory
from jvgen.training.program import Program
from jvgen.training.state import size_of
from tests.benchmarks.dit_step import Size, case_of, config_of
from tests.benchmarks.machine import Settings
from tests.benchmarks.report import Result
from tests.benchmarks.step_timing import Case

QUICK = Size(2, (2, 4, 4), layers=2, heads=1, text=8, text_width=16, condition=32)
FULL = Size(4, (4, 16, 16), layers=6, heads=6, text=32, text_width=128, condition=256)
POLICIES = (Remat.NONE, Remat.SAVE_MATMULS, Remat.SAVE_ATTENTION, Remat.FULL)


def run(settings: Settings) -> Result:
    """Every remat policy, on the host."""
    size = QUICK if settings.quick else FULL
    rows = [_row(size, remat) for remat in ((Remat.FULL,) if settings.quick else POLICIES)]
    return Result(
        title="MiB of the compiled training step; ratio = compiled peak / least",
        settings={"size": dataclasses.asdict(size)},
        rows=rows,
        notes=(
            "least = parameters + moments + average + batch (arguments) + gradients + what the remat policy saves",
            "for the backward pass. saved: counted in the traced program; formula: layers x rows x width (x 2 with",
            "attention's output). compiled: arguments + outputs - donated + temporary + code, from XLA's own analysis.",
        ),
    )


def _row(size: Size, remat: Remat) -> dict[str, Any]:
    config = config_of(size).replace(remat=remat)
    case = case_of(remat.value, size, config)
    program = Program.build(case.experiment(ema=(0.999,)), single_device_mesh())
    memory = Memory.of(program.lower(case.bucket).compile())
    abstract = program.abstract_state()
    _, parameters = size_of(abstract.parameters)
    _, state = size_of(abstract.saved())
    _, batch = size_of(program.abstract_batch(case.bucket))
    saved = saved_bytes(case, program)
    # Gradients have the size of the parameters.
    least = state + batch + parameters + saved
    mib = 2**20
    return {
        "remat": remat.value,
        "parameters": parameters / mib,
        "state": state / mib,
        "batch": batch / mib,
        "gradients": parameters / mib,
        "saved": saved / mib,
        "formula": _or_none(formula_bytes(config, size, remat), mib),
        "least": least / mib,
        "arguments": memory.arguments / mib,
        "temporary": memory.temporaries / mib,
        "compiled": memory.total / mib,
        "ratio": memory.total / least,
    }


def saved_bytes(case: Case, program: Program) -> int:
    """Bytes of all arrays that the traced forward pass hands to the backward pass, without parameters and batch."""
    network = program.task.networks["network"]
    dtype = jnp.dtype(case.dtype)
    names = program.task.axes()["network"]

    def residuals(parameters: Any, batch: Any) -> Any:
        def loss(parameters: Any) -> jax.Array:
            return case.loss(network, cast(parameters, names, dtype), batch, dtype)

        with axes.partitioned(program.sharding):
            return jax.vjp(loss, parameters)[1]

    arrays = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in case.arrays.items()}
    jaxpr = jax.make_jaxpr(residuals)(network.shapes, arrays).jaxpr
    # What goes in and out unchanged (weights), constants and repeats take no memory of their own.
    kept = {variable for variable in jaxpr.outvars if isinstance(variable, Var)} - set(jaxpr.invars)
    return size_of([variable.aval for variable in kept])[1]


def formula_bytes(config: VideoDiTConfig, size: Size, remat: Remat) -> int | None:
    """What the policies with a closed form keep: `L` rows of `width` a layer and clip, once or twice."""
    if remat not in (Remat.FULL, Remat.SAVE_ATTENTION):
        return None
    rows = size.text + int(np.prod(token_grid(size.clip, config.patch_shape)))
    item = jnp.dtype(size.dtype).itemsize
    layer = rows * config.width * item
    if remat is Remat.SAVE_ATTENTION:
        # And the logarithm of the softmax's denominator of every row and head, float32.
        layer = 2 * layer + rows * config.heads * 4
    return size.batch * config.layers * layer


def _or_none(value: int | None, unit: int) -> float | None:
    return None if value is None else value / unit
