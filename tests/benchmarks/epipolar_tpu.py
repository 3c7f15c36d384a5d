"""Memory of attention along epipolar lines at 49 frames of 480x720, as compiled for a TPU: dense, chunked, Pallas."""

import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jvgen.kernels.epipolar_attention import chunked, reference, tpu
from jvgen.preflight import topology
from tests.benchmarks.epipolar import Shape, passes
from tests.benchmarks.machine import Settings
from tests.benchmarks.report import Result

GIB = 2**30
KERNELS = {"dense": reference.attention, "chunked": chunked.attention, "pallas": tpu.attention}
SHAPES = {
    f"{views} views": Shape(views, 13, (30, 45), heads=30, dtype="bfloat16") for views in (2, 4)
}  # all heads and frames on one device
QUICK = {"2 views": Shape(2, 1, (30, 45), heads=2, dtype="bfloat16")}


def run(settings: Settings) -> Result:
    """Compile each kernel for one device of the topology, forward and with its gradient."""
    pod = topology.describe("v5e:2x2" if settings.quick else settings.topology)
    alone = NamedSharding(Mesh(np.array(pod.devices[:1]), ("one",)), PartitionSpec())
    rows = []
    for name, shape in (QUICK if settings.quick else SHAPES).items():
        arrays = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=alone) for a in shape.arrays()]
        for kernel, attention in KERNELS.items():
            for what, function in passes(attention, shape).items():
                rows.append({"case": name, "kernel": kernel, "what": what, **_compiled(function, arrays)})
    return Result(
        title=f"GiB of temporaries on one device of {pod.name}, which has {pod.hbm_bytes / GIB:.0f}",
        settings={name: shape._asdict() for name, shape in SHAPES.items()},
        rows=rows,
        notes=("beside query, key, value and what comes out. NaN: the compiler says that it does not fit.",),
    )


def _compiled(function: Any, arrays: list[jax.ShapeDtypeStruct]) -> dict[str, float | str]:
    began = time.perf_counter()
    try:
        memory = jax.jit(function).lower(*arrays).compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = next((line for line in str(error).splitlines() if "Used" in line), "out of memory").strip()
        return {"temporary": float("nan"), "compile_s": time.perf_counter() - began, "problem": reason}
    return {"temporary": memory.temp_size_in_bytes / GIB, "compile_s": time.perf_counter() - began, "problem": ""}
