"""Attention along epipolar lines, dense against made block by block: time and memory, forward and with its gradient."""

import functools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jvgen.geometry import paths
from jvgen.geometry.cameras import Cameras
from jvgen.geometry.epipolar import EpipolarBias
from jvgen.kernels.epipolar_attention import chunked, reference
from jvgen.models.multiview.config import SyncConfig
from jvgen.models.multiview.view_conditioning import camera_band
from tests.benchmarks import timing
from tests.benchmarks.machine import Settings
from tests.benchmarks.report import Result

MIB = 2**20
SHOWN = (
    "case", "what", "dense_s", "chunked_s", "ratio_of_medians", "middle_half", "dense_MiB", "chunked_MiB",
    "ratio_of_MiB", "difference",
)  # fmt: skip


class Shape(NamedTuple):
    """Tokens of an attention: those of one frame look at those of the same frame of another view."""

    views: int
    frames: int
    grid: tuple[int, int]
    heads: int
    head_width: int = 64
    dtype: str = "float32"

    @property
    def batch(self) -> int:
        """Frames of all views."""
        return self.views * self.frames

    @property
    def tokens(self) -> int:
        """Of a frame."""
        return math.prod(self.grid)

    def arrays(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Query, key, value, and the band: lines, points, width and slope."""
        tokens = jax.ShapeDtypeStruct((self.batch, self.tokens, self.heads, self.head_width), jnp.dtype(self.dtype))
        shapes = ((self.batch, self.tokens, 3), (self.tokens, 3), (self.batch,), (self.batch,))
        return (tokens, tokens, tokens, *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))


QUICK = {"tiny": Shape(2, 1, (3, 4), heads=2, head_width=8)}
# 49 frames of 480x720 are 13 latent frames of 30x45 tokens: those tokens, fewer frames and heads.
CPU = {"2 views": Shape(2, 2, (30, 45), heads=6), "4 views": Shape(4, 2, (30, 45), heads=6)}
GPU = {
    "2 views": Shape(2, 13, (30, 45), heads=30, dtype="bfloat16"),
    "4 views": Shape(4, 13, (30, 45), heads=30, dtype="bfloat16"),
}


def run(settings: Settings) -> Result:
    """Time both kernels in turns, on bands of cameras that circle a scene."""
    shapes = QUICK if settings.quick else GPU if jax.default_backend() == "gpu" else CPU
    rows: list[dict[str, Any]] = []
    samples: dict[str, Any] = {}
    for name, shape in shapes.items():
        inputs = values_of(shape)
        for what in ("forward", "with gradient"):
            began = time.perf_counter()
            sides = {
                side: jax.jit(passes(kernel, shape)[what]).lower(*inputs).compile()
                for side, kernel in {"dense": reference.attention, "chunked": chunked.attention}.items()
            }
            runs = {side: functools.partial(_finished, compiled, inputs) for side, compiled in sides.items()}
            difference = _difference(runs["chunked"](), runs["dense"]())
            timed = timing.in_turns(runs, settings.repeats)
            memory = {side: compiled.memory_analysis().temp_size_in_bytes / MIB for side, compiled in sides.items()}
            rows.append({
                "case": name,
                "what": what,
                "dense_s": timed["dense"].median,
                "chunked_s": timed["chunked"].median,
                **timing.ratio(timed["chunked"], timed["dense"]),
                "dense_MiB": memory["dense"],
                "chunked_MiB": memory["chunked"],
                "ratio_of_MiB": memory["chunked"] / memory["dense"],
                "difference": difference,
                "seconds": time.perf_counter() - began,
            })  # fmt: skip
            samples[f"{name} {what}"] = {side: vars(sample) for side, sample in timed.items()}
    return Result(
        title="ratio = chunked / dense",
        settings={name: shape._asdict() for name, shape in shapes.items()},
        rows=rows,
        shown=SHOWN,
        samples=samples,
        notes=("MiB: temporaries of the compiled attention. difference: largest, over the largest number.",),
    )


def passes(kernel: Callable[..., jax.Array], shape: Shape) -> dict[str, Callable[..., Any]]:
    """One attention, and one with the gradient of query, key and value."""
    attend = functools.partial(kernel, scale=shape.head_width**-0.5)

    def loss(query: jax.Array, key: jax.Array, value: jax.Array, *band: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(attend(query, key, value, *band).astype(jnp.float32)))

    return {"forward": attend, "with gradient": jax.grad(loss, argnums=(0, 1, 2))}


def values_of(shape: Shape, bias: EpipolarBias = EpipolarBias.SOFT) -> tuple[jax.Array, ...]:
    """Random tokens and the band of cameras that circle a scene, 16 pixels a token."""
    pixels = (16 * shape.grid[0], 16 * shape.grid[1])
    extrinsics = jnp.float32(paths.named_paths("circle", shape.views, shape.frames + 1)[None, :, 1:])
    intrinsics = jnp.float32(paths.default_intrinsics(shape.views, shape.frames, pixels[1] / pixels[0])[None])
    partner = jnp.arange(shape.views)[::-1]
    normals = jnp.ones((1, shape.views, shape.frames, 2)) * 0.5**0.5
    cameras = Cameras(intrinsics, extrinsics)
    band = camera_band(cameras, partner, SyncConfig(bias=bias), normals, grid=shape.grid, size=pixels)
    rng = np.random.default_rng(0)
    tokens = [jnp.asarray(rng.standard_normal(array.shape), array.dtype) for array in shape.arrays()[:3]]
    return (*tokens, band.lines.reshape(-1, *band.lines.shape[2:]), jnp.asarray(band.points),
            band.width.reshape(-1), band.slope.reshape(-1))  # fmt: skip


def _finished(compiled: jax.stages.Compiled, inputs: tuple[jax.Array, ...]) -> Any:
    return jax.block_until_ready(compiled(*inputs))


def _difference(ours: Any, theirs: Any) -> float:
    pairs = list(zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True))
    return max(
        float(jnp.max(jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32))) / jnp.max(jnp.abs(b))) for a, b in pairs
    )
