"""A published step, estimated: Wan 2.1 14B at 720p as MaxDiffusion trains it on four chips of v5p.

Published: 36.0 s per step, 4,893 TFLOP per chip and step as its authors count them (MaxDiffusion's README at f5f212f2:
81 frames of 720x1280, one clip, remat, splash attention in blocks of 512, weights and moments in bfloat16, sequence and
parameters over four devices). Here are the same operations in plain JAX, compiled for the same chips: self-attention
with segment ids for padding, two kernels for the backward pass; queries and keys normalized over all heads; rotary
embedding by complex numbers of neighboring channels; cross-attention over 512 rows of text by the same kernel; norms
and gates in float32. Each variant changes one of these. Not in it: the copy of layers' inputs to the host and back, the
head and the embeddings (0.1% of the FLOPs).
"""

import dataclasses
import os
import subprocess
import sys
from typing import Any

from tests.benchmarks.machine import Settings
from tests.benchmarks.report import Result

PUBLISHED_SECONDS, PUBLISHED_TFLOP = 36.0, 4893.3
# Variant -> what is different.
VARIANTS = {
    "published": "as it was published",
    "real rotary": "rotary embedding by real numbers, halves of the channels as pairs",
    "no cross-attention": "without cross-attention",
    "no segment ids": "no mask for padded rows",
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the network and its clip."""

    layers: int = 40
    heads: int = 40
    width: int = 5120
    hidden: int = 13824
    rows: int = 21 * 45 * 80
    text: int = 512
    block: int = 512


SMALL = Sizes(layers=2, heads=2, width=256, hidden=512, rows=2048, text=512)


def run(settings: Settings) -> Result:
    """Compile and estimate every variant, each in a process of its own."""
    rows = []
    for variant in ("published",) if settings.quick else VARIANTS:
        command = [sys.executable, "-m", "tests.benchmarks.wan_tpu", variant, "small" if settings.quick else "full"]
        done = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
        problem = (done.stderr.strip().splitlines() or ["failed"])[-1][:100] if done.returncode else ""
        rows.append({"variant": variant, **({"problem": problem} if problem else _numbers(done.stdout))})
        print(done.stdout, flush=True)
    return Result(
        title=f"seconds of a step on v5p:2x2x1; published {PUBLISHED_SECONDS} s",
        settings={"sizes": dataclasses.asdict(SMALL if settings.quick else Sizes())},
        rows=rows,
        notes=tuple(f"{name}: {what}" for name, what in VARIANTS.items()),
    )


def _numbers(text: str) -> dict[str, float]:
    line = next(line for line in text.splitlines() if line.startswith("numbers "))
    return {name: float(value) for name, value in (word.split("=") for word in line.split()[1:])}


def _step(sizes: Sizes, variant: str, mesh: Any) -> Any:
    """The training step and its abstract arguments."""
    import jax
    import jax.numpy as jnp
    import optax
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    heads, head_width, block = sizes.heads, sizes.width // sizes.heads, sizes.block
    segments, complex_rotary = variant != "no segment ids", variant != "real rotary"
    crossed = variant != "no cross-attention"

    def product(x, weight):
        return jnp.dot(x, weight["kernel"], precision="default") + weight["bias"]

    def layer_norm(x):
        x = x.astype(jnp.float32)
        centered = x - x.mean(-1, keepdims=True)
        return centered * jax.lax.rsqrt(jnp.mean(centered**2, -1, keepdims=True) + 1e-6)

    def rms_norm(x, scale):
        x32 = x.astype(jnp.float32)
        return (x32 * jax.lax.rsqrt(jnp.mean(x32**2, -1, keepdims=True) + 1e-6)).astype(x.dtype) * scale

    def split(x):
        return x.reshape(*x.shape[:2], heads, head_width).transpose(0, 2, 1, 3)

    def rotate(x, angles):
        if complex_rotary:
            pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
            turned = jax.lax.complex(pairs[..., 0], pairs[..., 1]) * jnp.exp(1j * angles.astype(jnp.complex64))
            return jnp.stack([jnp.real(turned), jnp.imag(turned)], -1).reshape(x.shape).astype(x.dtype)
        first, second = jnp.split(x.astype(jnp.float32), 2, -1)
        cosine, sine = jnp.cos(angles), jnp.sin(angles)
        return jnp.concatenate([first * cosine - second * sine, first * sine + second * cosine], -1).astype(x.dtype)

    def attend(query, key, value):
        def local(query, key, value):
            lengths = query.shape[2], key.shape[2]

            def pad(x):
                return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % block), (0, 0)))

            query, key, value = pad(query), pad(key), pad(value)
            shape = query.shape[2], key.shape[2]
            names = (
                "block_q block_kv block_kv_compute block_q_dkv block_kv_dkv block_kv_dkv_compute block_q_dq block_kv_dq"
            )
            kernel = splash.make_splash_mha(
                mask=masks.MultiHeadMask([masks.FullMask(shape)] * query.shape[1]),
                head_shards=1, q_seq_shards=1, block_sizes=splash.BlockSizes(**dict.fromkeys(names.split(), block)),
            )  # fmt: skip
            ids = splash.SegmentIds(
                *(
                    (jnp.arange(padded) < length).astype(jnp.int32)
                    for padded, length in zip(shape, lengths, strict=True)
                )
            )
            out = jax.vmap(kernel, in_axes=(0, 0, 0, None))(query, key, value, ids if segments else None)
            return out[:, :, : lengths[0]]

        places = P(None, None, "fsdp", None), P(), P()
        out = jax.shard_map(local, mesh=mesh, in_specs=places, out_specs=places[0], check_vma=False)(query, key, value)
        return out.transpose(0, 2, 1, 3).reshape(query.shape[0], -1, sizes.width)

    def attention(weights, x, context, angles):
        query = rms_norm(product(x, weights["query"]), weights["norm_query"])
        key = rms_norm(product(context, weights["key"]), weights["norm_key"])
        query, key, value = split(query), split(key), split(product(context, weights["value"]))
        if angles is not None:
            query, key = rotate(query, angles), rotate(key, angles)
        return product(attend(query * head_width**-0.5, key, value), weights["out"])

    rows_place = NamedSharding(mesh, P(None, "fsdp", None))

    def layer(x, weights, text, condition, angles):
        x = jax.lax.with_sharding_constraint(x, rows_place)
        table = weights["table"] + condition.astype(jnp.float32)
        shift, scale, gate, shift_2, scale_2, gate_2 = jnp.split(table, 6, axis=1)
        normed = (layer_norm(x) * (1 + scale) + shift).astype(x.dtype)
        x = (x.astype(jnp.float32) + attention(weights["self"], normed, normed, angles) * gate).astype(x.dtype)
        if crossed:
            normed = (layer_norm(x) * weights["norm_scale"] + weights["norm_bias"]).astype(x.dtype)
            x = x + attention(weights["cross"], normed, text, None)
        normed = (layer_norm(x) * (1 + scale_2) + shift_2).astype(x.dtype)
        forward = product(jax.nn.gelu(product(normed, weights["up"])), weights["down"])
        return (x.astype(jnp.float32) + forward * gate_2).astype(x.dtype)

    def loss(weights, x, target, text, condition, angles):
        @jax.checkpoint
        def body(x, weights):
            return layer(x, weights, text, condition, angles), None

        x, _ = jax.lax.scan(body, x, weights)
        return jnp.mean((layer_norm(x) - target.astype(jnp.float32)) ** 2)

    optimizer = optax.adamw(1e-5)

    def step(weights, moments, *batch):
        value, gradient = jax.value_and_grad(loss)(weights, *batch)
        updates, moments = optimizer.update(gradient, moments, weights)
        return optax.apply_updates(weights, updates), moments, value

    def array(shape, *spec, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

    def linear(inputs, outputs, across=0):
        spec = (None, "fsdp", None) if across == 0 else (None, None, "fsdp")
        kernel = array((sizes.layers, inputs, outputs), *spec)
        return {"kernel": kernel, "bias": array((sizes.layers, outputs))}

    def projections():
        width = sizes.width
        named = {name: linear(width, width) for name in ("query", "key", "value")} | {"out": linear(width, width, 1)}
        return named | {name: array((sizes.layers, width)) for name in ("norm_query", "norm_key")}

    weights = {
        "self": projections(), "up": linear(sizes.width, sizes.hidden), "down": linear(sizes.hidden, sizes.width, 1),
        "table": array((sizes.layers, 1, 6, sizes.width), dtype=jnp.float32),
    }  # fmt: skip
    if crossed:
        weights |= {"cross": projections()}
        weights |= {name: array((sizes.layers, sizes.width)) for name in ("norm_scale", "norm_bias")}
    moments = jax.tree.map(
        lambda leaf, like: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=like.sharding) if leaf.shape else leaf,
        jax.eval_shape(optimizer.init, weights), _like(optimizer, weights),
    )  # fmt: skip
    hidden = array((1, sizes.rows, sizes.width), None, "fsdp", None)
    batch = (
        hidden, hidden, array((1, sizes.text, sizes.width)), array((1, 6, sizes.width)),
        array((1, 1, sizes.rows, head_width // 2), None, None, "fsdp", None, dtype=jnp.float32),
    )  # fmt: skip
    return jax.jit(step, donate_argnums=(0, 1)), (weights, moments, *batch)


def _like(optimizer: Any, weights: Any) -> Any:
    """The optimizer's state with the placed weight in place of each of its moments."""
    import jax
    import optax

    state = jax.eval_shape(optimizer.init, weights)
    return optax.tree_map_params(optimizer, lambda _, weight: weight, state, weights)


def _compile(variant: str, size: str) -> None:
    """In the child process: compile one variant and print its estimate."""
    from rich.console import Console

    from jvgen.parallel import libtpu
    from jvgen.parallel.mesh import MeshConfig
    from jvgen.preflight import hlo, kernel_cycles, program_cost, topology
    from jvgen.preflight.report import GIB, Memory
    from jvgen.preflight.time_estimate import estimate
    from jvgen.preflight.time_report import print_estimate

    with libtpu.writing_bundles():
        pod, mesh = topology.describe_for(MeshConfig(fsdp=4), "v5p:2x2x1")
        step, arguments = _step(SMALL if size == "small" else Sizes(), variant, mesh)
        compiled = step.lower(*arguments).compile()
        module = hlo.parse(compiled.as_text())
        kernels = kernel_cycles.read(module, libtpu.bundles_folder())
    found = estimate(program_cost.operations(module), kernels, pod.chip, mesh, useful_flops=PUBLISHED_TFLOP * 1e12)
    print_estimate(Console(width=140, highlight=False), found, pod.name)
    seconds, memory = found.seconds, Memory.of(compiled).total / GIB
    print(
        f"numbers least={seconds.least:.4g} likely={seconds.likely:.4g} most={seconds.most:.4g} "
        f"ratio={PUBLISHED_SECONDS / seconds.likely:.3g} GiB={memory:.3g}"
    )


if __name__ == "__main__":
    _compile(*sys.argv[1:])
