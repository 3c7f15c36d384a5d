"""A published step of a language model, estimated: MaxText's 16B on 256 chips of v5e.

Published: 120 TFLOP per second and chip, 61.1% MFU (MaxText's README and configs/v5e/16b.sh: `global_parameter_scale`
16, which is 32 layers of width 4,096, 64 heads of 128, gated feed-forward of 28,672, 32,000 words; six sequences of
2,048 per chip, everything recomputed, parameters and float32 moments over 256 chips, flash attention). Here are the
same operations in plain JAX, compiled for the same chips. A step has 6 FLOPs for every parameter and token, and the
scores of attention, counted half as causal: 9.98 s per step (10.3 if its authors counted all scores).
"""

import dataclasses
import os
import subprocess
import sys
from typing import Any

from tests.benchmarks.machine import Settings
from tests.benchmarks.report import Result

PUBLISHED_TFLOPS = 120.0
TOPOLOGY = {"full": "v5e:16x16", "small": "v5e:2x2"}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the network and its batch per chip."""

    layers: int = 32
    width: int = 4096
    heads: int = 64
    head_width: int = 128
    hidden: int = 28672
    words: int = 32000
    length: int = 2048
    batch: int = 6
    block: int = 512

    @property
    def parameters(self) -> int:
        """Number of parameters in matrices."""
        attention = 4 * self.width * self.heads * self.head_width
        return self.layers * (attention + 3 * self.width * self.hidden) + 2 * self.words * self.width

    @property
    def flops(self) -> float:
        """FLOPs per chip and step as MaxText counts them: embedding not, causal attention half."""
        tokens = self.batch * self.length
        products = 6.0 * (self.parameters - self.words * self.width) * tokens
        return products + 6.0 * self.layers * self.heads * self.head_width * self.length * tokens


SMALL = Sizes(layers=2, width=256, heads=2, hidden=512, words=512, length=512, batch=1)


def run(settings: Settings) -> Result:
    """Compile and estimate in a process of its own."""
    size = "small" if settings.quick else "full"
    command = [sys.executable, "-m", "tests.benchmarks.language_model_tpu", size]
    done = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    if done.returncode:
        row: dict[str, Any] = {"problem": (done.stderr.strip().splitlines() or ["failed"])[-1][:100]}
    else:
        line = next(line for line in done.stdout.splitlines() if line.startswith("numbers "))
        row = {name: float(value) for name, value in (word.split("=") for word in line.split()[1:])}
        print(done.stdout, flush=True)
    sizes = SMALL if settings.quick else Sizes()
    return Result(
        title=f"seconds of a step on {TOPOLOGY[size]}; published {sizes.flops / PUBLISHED_TFLOPS / 1e12:.2f} s",
        settings={"sizes": dataclasses.asdict(sizes)},
        rows=[row],
    )


def _step(sizes: Sizes, mesh: Any) -> Any:
    """The training step and its abstract arguments."""
    import jax
    import jax.numpy as jnp
    import optax
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    rows_place, inner = NamedSharding(mesh, P("fsdp")), sizes.heads * sizes.head_width

    def product(x, weight):
        return jnp.dot(x, weight.astype(jnp.bfloat16), precision="default")

    def rms_norm(x, scale):
        x32 = x.astype(jnp.float32)
        return (x32 * jax.lax.rsqrt(jnp.mean(x32**2, -1, keepdims=True) + 1e-6) * scale).astype(x.dtype)

    def rotate(x, angles):
        first, second = jnp.split(x.astype(jnp.float32), 2, -1)
        cosine, sine = jnp.cos(angles), jnp.sin(angles)
        return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], -1).astype(x.dtype)

    def attend(query, key, value):
        def local(query, key, value):
            names = (
                "block_q block_kv block_kv_compute block_q_dkv block_kv_dkv block_kv_dkv_compute block_q_dq block_kv_dq"
            )
            mask = masks.CausalMask((sizes.length, sizes.length))
            kernel = splash.make_splash_mha(
                mask=masks.MultiHeadMask([mask] * sizes.heads), head_shards=1, q_seq_shards=1,
                block_sizes=splash.BlockSizes(**dict.fromkeys(names.split(), min(sizes.block, sizes.length))),
            )  # fmt: skip
            return jax.vmap(kernel)(query, key, value)

        places = (P("fsdp"),) * 3
        return jax.shard_map(local, mesh=mesh, in_specs=places, out_specs=places[0], check_vma=False)(query, key, value)

    def heads(x):
        return x.reshape(*x.shape[:2], sizes.heads, sizes.head_width).transpose(0, 2, 1, 3)

    def layer(x, weights, angles):
        x = jax.lax.with_sharding_constraint(x, rows_place)
        normed = rms_norm(x, weights["norm"])
        query, key, value = (heads(product(normed, weights[name])) for name in ("query", "key", "value"))
        mixed = attend(rotate(query, angles) * sizes.head_width**-0.5, rotate(key, angles), value)
        x = x + product(mixed.transpose(0, 2, 1, 3).reshape(*x.shape[:2], inner), weights["out"])
        normed = rms_norm(x, weights["norm_2"])
        return x + product(
            jax.nn.silu(product(normed, weights["gate"])) * product(normed, weights["up"]), weights["down"]
        )

    def loss(weights, words, targets):
        angles = jnp.arange(sizes.length)[:, None] / 1e4 ** (
            jnp.arange(sizes.head_width // 2) / (sizes.head_width // 2)
        )
        one_hot = jax.nn.one_hot(words, sizes.words, dtype=jnp.bfloat16)
        x = jax.lax.with_sharding_constraint(product(one_hot, weights["embedding"]), rows_place)
        body = jax.checkpoint(lambda x, weights: (layer(x, weights, angles), None))
        x, _ = jax.lax.scan(body, x, weights["layers"])
        logits = product(rms_norm(x, weights["norm"]), weights["logits"]).astype(jnp.float32)
        logits = jax.lax.with_sharding_constraint(logits, rows_place)
        picked = jnp.sum(logits * jax.nn.one_hot(targets, sizes.words), -1)
        return jnp.mean(jax.nn.logsumexp(logits, -1) - picked)

    optimizer = optax.adamw(3e-5)

    def step(weights, moments, words, targets):
        value, gradient = jax.value_and_grad(loss)(weights, words, targets)
        updates, moments = optimizer.update(gradient, moments, weights)
        return optax.apply_updates(weights, updates), moments, value

    def array(shape, *spec, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

    width, stack = sizes.width, sizes.layers
    into = {name: array((stack, width, inner), None, "fsdp") for name in ("query", "key", "value")}
    up = {name: array((stack, width, sizes.hidden), None, "fsdp") for name in ("gate", "up")}
    layers = into | up | {
        "out": array((stack, inner, width), None, None, "fsdp"),
        "down": array((stack, sizes.hidden, width), None, None, "fsdp"),
        "norm": array((stack, width)), "norm_2": array((stack, width)),
    }  # fmt: skip
    weights = {
        "layers": layers, "norm": array((width,)), "logits": array((width, sizes.words), "fsdp"),
        "embedding": array((sizes.words, width), None, "fsdp"),
    }  # fmt: skip
    places = optax.tree_map_params(
        optimizer, lambda _, weight: weight, jax.eval_shape(optimizer.init, weights), weights
    )
    moments = jax.tree.map(
        lambda leaf, like: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=like.sharding) if leaf.shape else leaf,
        jax.eval_shape(optimizer.init, weights), places,
    )  # fmt: skip
    rows = array((sizes.batch * mesh.size, sizes.length), "fsdp", dtype=jnp.int32)
    return jax.jit(step, donate_argnums=(0, 1)), (weights, moments, rows, rows)


def _compile(size: str) -> None:
    """In the child process: compile and print the estimate."""
    from rich.console import Console

    from jvgen.parallel import libtpu
    from jvgen.parallel.mesh import MeshConfig
    from jvgen.preflight import hlo, kernel_cycles, program_cost, topology
    from jvgen.preflight.report import GIB, Memory
    from jvgen.preflight.time_estimate import estimate
    from jvgen.preflight.time_report import print_estimate

    sizes = SMALL if size == "small" else Sizes()
    with libtpu.writing_bundles():
        pod, mesh = topology.describe_for(MeshConfig(), TOPOLOGY[size])
        step, arguments = _step(sizes, mesh)
        compiled = step.lower(*arguments).compile()
        module = hlo.parse(compiled.as_text())
        kernels = kernel_cycles.read(module, libtpu.bundles_folder())
    found = estimate(program_cost.operations(module), kernels, pod.chip, mesh, useful_flops=sizes.flops)
    print_estimate(Console(width=140, highlight=False), found, pod.name)
    seconds, memory, published = found.seconds, Memory.of(compiled).total / GIB, sizes.flops / PUBLISHED_TFLOPS / 1e12
    print(
        f"numbers least={seconds.least:.4g} likely={seconds.likely:.4g} most={seconds.most:.4g} "
        f"published={published:.4g} ratio={published / seconds.likely:.3g} GiB={memory:.3g}"
    )


if __name__ == "__main__":
    _compile(sys.argv[1])
