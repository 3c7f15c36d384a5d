"""Imagined frames a second, policy in the loop, against stepping simulators that render, and memory by batch."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jvgen import config
from jvgen.control.drq_v2 import DrQV2, DrQV2Config
from jvgen.control.environments import open_environment
from jvgen.control.imagination import Imagination
from jvgen.control.scene_environment import SceneEnvironment
from jvgen.data.scenes.scenes import SceneConfig
from jvgen.models.ivideogpt.config import CompressiveTokenizerConfig, FrameTransformerConfig
from jvgen.models.ivideogpt.sampling import SamplingConfig
from jvgen.models.ivideogpt.tokenizer import CompressiveTokenizer
from jvgen.models.ivideogpt.transformer import FrameTransformer
from jvgen.models.ivideogpt.world import World
from jvgen.nn.network import Network
from jvgen.parallel.mesh import MeshConfig, make_mesh
from jvgen.parallel.rules import Sharding
from tests.benchmarks import timing
from tests.benchmarks.machine import Settings
from tests.benchmarks.report import Result

STACK = 3


@dataclasses.dataclass(frozen=True)
class Size:
    """A world model, an agent, and how much is imagined at once."""

    tokenizer: CompressiveTokenizerConfig
    transformer: FrameTransformerConfig
    sequences: int
    batches: tuple[int, ...]
    steps: int = 10
    agent: DrQV2Config = DrQV2Config()
    dtype: str = "float32"


def _transformer(tokenizer: CompressiveTokenizerConfig, **sizes: Any) -> FrameTransformerConfig:
    return FrameTransformerConfig(vocabulary=tokenizer.vocabulary, action_width=4, reward=True, **sizes)


TINY = CompressiveTokenizerConfig(
    resolution=16, block_channels=(8, 16), layers_per_block=1, groups=4, latent_channels=4, code_width=3,
    context_codes=18, future_codes=12, attention_side=8, attention_groups=4,
)  # fmt: skip
# That of `configs/demo_control.py`.
DEMO = CompressiveTokenizerConfig(
    resolution=32, block_channels=(16, 32, 64), layers_per_block=1, groups=8, latent_channels=16, code_width=16,
    context_codes=512, future_codes=512, patch=2, attention_side=16, attention_groups=8,
)  # fmt: skip
RELEASED = CompressiveTokenizerConfig.released_64()
SMALL_AGENT = DrQV2Config(channels=16, hidden=256)
QUICK = {
    "tiny": Size(TINY, _transformer(TINY, width=24, layers=1, heads=3, hidden=40), 8, (4,), steps=2, agent=SMALL_AGENT)
}
CPU = {
    "demo": Size(DEMO, _transformer(DEMO, width=128, layers=4, heads=4, hidden=384), 1000, (50, 250), agent=SMALL_AGENT)
}
GPU = {
    "demo": Size(DEMO, _transformer(DEMO, width=128, layers=4, heads=4, hidden=384), 1000, (1000,), agent=SMALL_AGENT),
    "released small": Size(RELEASED, _transformer(RELEASED), 1000, (125, 500), dtype="bfloat16"),
}
SHOWN = (
    "case", "sequences", "at_once", "imagined_frames_s", "simulator", "simulated_frames_s", "imagined_over_simulated",
    "temporary_mib", "compile_s",
)  # fmt: skip


def random_parameters(shapes: Any) -> Any:
    """Small random numbers in the structure of a network's parameters."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: (0.05 * rng.standard_normal(s.shape) + (s.ndim == 1)).astype(np.float32), shapes)


def simulators(side: int) -> dict[str, Callable[[], Any]]:
    """Environments that can be opened here, by name."""
    scenes = SceneConfig(height=side, width=side, frames=12)
    found: dict[str, Callable[[], Any]] = {"scenes": lambda: SceneEnvironment(scenes, steps=10**6)}
    if side == 64:
        found["metaworld:reach-v3"] = lambda: open_environment("metaworld:reach-v3", size=side)
    return found


def stepping(environment: Any, count: int) -> None:
    """Take random actions, frames rendered."""
    rng = np.random.default_rng(0)
    ended = True
    for _ in range(count):
        if ended:
            environment.reset(seed=0)
        *_, terminated, truncated, _ = environment.step(rng.uniform(-1, 1, environment.action_space.shape))
        ended = terminated or truncated


def compare(name: str, size: Size, settings: Settings) -> tuple[list[dict], dict]:
    """Rows of the table, one per batch and simulator, and all samples."""
    frame = (size.tokenizer.resolution, size.tokenizer.resolution, 3)
    agent = DrQV2(size.agent, frame, size.transformer.action_width)
    policy_parameters = {part: random_parameters(agent.networks[part].shapes) for part in ("encoder", "actor")}
    world = World(
        size.tokenizer, size.transformer, size.tokenizer.context_frames + size.steps, SamplingConfig(),
        dtype=jnp.dtype(size.dtype),
    )  # fmt: skip
    networks = (
        Network.of(lambda rngs: CompressiveTokenizer(size.tokenizer, rngs=rngs)),
        Network.of(lambda rngs: FrameTransformer(size.transformer, rngs=rngs)),
    )
    weights = jax.jit(world.prepare)(*(random_parameters(network.shapes) for network in networks))

    def policy(parameters: Any, frames: jax.Array, keys: jax.Array) -> jax.Array:
        return agent.act(parameters, frames)

    starts = np.random.default_rng(1).integers(0, 256, (size.sequences, STACK, *frame), dtype=np.uint8)
    sharding = Sharding(make_mesh(MeshConfig(data=-1, fsdp=1))) if len(jax.devices()) > 1 else None
    rows, samples = [], {}
    opened = {}
    for simulator, make in simulators(frame[0]).items():
        with contextlib.suppress(ImportError, ValueError, RuntimeError):
            opened[simulator] = make()
            stepping(opened[simulator], 2)
    for at_once in size.batches:
        imagination = Imagination(world, policy, steps=size.steps, stack=STACK, rows_at_once=at_once, sharding=sharding)
        began = time.perf_counter()
        key = jax.random.key(0)
        program = jax.jit(imagination.imagine).lower(weights, policy_parameters, starts, key).compile()
        seconds = time.perf_counter() - began
        memory = program.memory_analysis()

        def imagined(program: Any = program, key: jax.Array = key) -> None:
            jax.block_until_ready(program(weights, policy_parameters, starts, key))

        imagined()
        steps = 4 if settings.quick else 200
        sides = {"imagined": imagined} | {
            simulator: functools.partial(stepping, environment, steps if simulator == "scenes" else steps // 4)
            for simulator, environment in opened.items()
        }
        measured = timing.in_turns(sides, settings.repeats)
        samples[f"{name}, {at_once}"] = {side: dataclasses.asdict(sample) for side, sample in measured.items()}
        ours = size.sequences * size.steps / measured["imagined"].median
        for simulator in opened:
            count = steps if simulator == "scenes" else steps // 4
            theirs = count / measured[simulator].median
            rows.append(
                {
                    "case": name, "sequences": size.sequences, "at_once": at_once, "imagined_frames_s": ours,
                    "simulator": simulator, "simulated_frames_s": theirs, "imagined_over_simulated": ours / theirs,
                    "temporary_mib": memory.temp_size_in_bytes / 2**20 if memory else None, "compile_s": seconds,
                }
            )  # fmt: skip
    return rows, samples


def run(settings: Settings) -> Result:
    """All cases of this backend."""
    sizes = QUICK if settings.quick else GPU if jax.default_backend() == "gpu" else CPU
    settings = dataclasses.replace(settings, repeats=min(settings.repeats, 3))
    rows, samples = [], {}
    for name, size in sizes.items():
        more, samples[name] = compare(name, size, settings)
        rows += more
    return Result(
        title="imagined frames a second, policy in the loop, against one simulator that renders",
        settings={name: dict(config.leaves(size)) for name, size in sizes.items()},
        rows=rows,
        shown=SHOWN,
        samples=samples,
        notes=(
            "random weights. One program for all sequences, at_once of them in memory at a time (temporary_mib).",
            "A simulated frame is one rendered step with its physics, in one process; simulators that cannot be",
            "opened here (Meta-World) are left out.",
        ),
    )
