"""Views sharded over devices: partners are exchanged by collectives, with equal results."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvgen.diffusion.collaborative import PairingConfig
from jvgen.diffusion.guidance import GuidanceConfig
from jvgen.diffusion.objective import ObjectiveConfig
from jvgen.diffusion.sampler import SamplerConfig
from jvgen.diffusion.schedule import ScheduleConfig
from jvgen.geometry import paths
from jvgen.geometry.cameras import Cameras
from jvgen.models.byte_text.config import ByteTextConfig
from jvgen.models.multiview.config import MultiViewDiTConfig, SyncConfig
from jvgen.nn.epipolar_attention import EpipolarKernel
from jvgen.parallel import axes
from jvgen.parallel.mesh import MeshConfig, make_mesh
from jvgen.parallel.rules import Sharding, ShardingConfig
from jvgen.tasks.multiview import MultiViewConfig
from jvgen.tasks.text import TextConfig

pytestmark = pytest.mark.usefixtures("quick_compilations")

TASK = MultiViewConfig(
    denoiser=MultiViewDiTConfig(
        layers=2, heads=4, head_width=16, in_channels=4, out_channels=4, text_width=16, text_length=7,
        condition_width=16, token_multiple=8, temporal_compression=4,
        sync=SyncConfig(every=1, groups=4, kernel=EpipolarKernel.CHUNKED), adapter_rank=2,
    ),
    text=TextConfig(encoder=ByteTextConfig(width=16, layers=1, heads=2), length=7),
    schedule=ScheduleConfig(kind="cogvideox"),
    objective=ObjectiveConfig(target="v"),
    temporal_compression=4,
    sampler=SamplerConfig(kind="ddim", steps=2),
    guidance=GuidanceConfig(kind="constant", scale=2.0),
    pairing=PairingConfig(),
).build()  # fmt: skip
VIEWS, SIZE = 4, (5, 32, 64)
ONE = MeshConfig(fsdp=1)


@pytest.fixture(scope="module")
def parameters():
    """Far from the start, where views do not see each other."""
    rng = np.random.default_rng(0)
    return {
        name: jax.tree.map(lambda leaf: 0.2 * rng.standard_normal(leaf.shape, np.float32), network.shapes)
        for name, network in TASK.networks.items()
    }


def sharding_of(mesh: MeshConfig) -> Sharding:
    devices = jax.devices()[:1] if mesh == ONE else None
    return Sharding(make_mesh(mesh, devices), ShardingConfig(replicate_below=64))


def placed(sharding: Sharding, parameters):
    return jax.device_put(parameters, sharding.storage(TASK.axes(), parameters))


def latents_on(mesh: MeshConfig, parameters) -> tuple[np.ndarray, str]:
    """Four views of each of two scenes, sampled on a mesh, and the program that did it."""
    sharding = sharding_of(mesh)
    cameras = Cameras(
        jnp.float32(np.broadcast_to(paths.default_intrinsics(VIEWS, SIZE[0], 2.0), (2, VIEWS, SIZE[0], 4))),
        jnp.float32(np.broadcast_to(paths.named_paths("circle", VIEWS, SIZE[0]), (2, VIEWS, SIZE[0], 3, 4))),
    )

    @jax.jit
    def run(parameters, tokens):
        with axes.partitioned(sharding):
            return TASK.generate_view_latents(
                parameters, {}, tokens, cameras, jnp.arange(2, dtype=jnp.int32), jax.random.key(0), size=SIZE,
                sampler=TASK.config.sampler, guidance=TASK.config.guidance,
            )  # fmt: skip

    arguments = placed(sharding, parameters), jnp.asarray(TASK.tokens(["a ball", "a cube"]))
    compiled = run.lower(*arguments).compile()
    return np.asarray(compiled(*arguments)[0]), compiled.as_text()


@pytest.fixture(scope="module")
def expected(parameters):
    return latents_on(ONE, parameters)


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param({"data": 8, "fsdp": 1}, id="a view a device"),
        pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, id="mixed", marks=pytest.mark.slow),
    ],
)
def test_sharded_views_equal_those_of_one_device(mesh, parameters, expected):
    made, program = latents_on(MeshConfig(**mesh), parameters)
    alone, program_of_one = expected
    np.testing.assert_allclose(made, alone, atol=2e-4 * np.abs(alone).max())
    views = alone.reshape(2, VIEWS, -1)
    assert np.abs(views[:, 0] - views[:, 1]).max() > 0.01
    # Partners come from other devices by a collective, which one device has no use for.
    exchanges = re.compile(r"(all-gather|collective-permute|all-to-all|all-reduce)(-start)?\(")
    assert exchanges.search(program) and not exchanges.search(program_of_one)


def loss_and_gradient(mesh: MeshConfig, parameters):
    sharding, rng = sharding_of(mesh), np.random.default_rng(1)
    batch = {
        "latents": rng.standard_normal((4, 2, 2, 4, 8, 8), np.float32),
        "tokens": rng.integers(0, 250, (4, 7), np.int32),
        "intrinsics": np.broadcast_to(paths.default_intrinsics(2, 5, 2.0), (4, 2, 5, 4)).astype(np.float32),
        "extrinsics": np.broadcast_to(paths.named_paths("circle", 2, 5), (4, 2, 5, 3, 4)).astype(np.float32),
        "slot": np.arange(4, dtype=np.int32),
    }

    @jax.jit
    def run(parameters, batch):
        with axes.partitioned(sharding):
            loss = jax.value_and_grad(lambda p: TASK.loss(p, {}, batch, jax.random.key(3))[0])
            return loss(parameters)

    loss, gradient = run(placed(sharding, parameters), jax.device_put(batch, sharding.batch(batch)))
    return float(loss), jax.tree.map(np.asarray, gradient["views"])


@pytest.fixture(scope="module")
def loss_of_one(parameters):
    return loss_and_gradient(ONE, parameters)


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param({"fsdp": 4, "seq": 2}, id="seq"),
        pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, id="tensor", marks=pytest.mark.slow),
    ],
)
def test_the_sharded_loss_equals_that_of_one_device(mesh, parameters, loss_of_one):
    loss, gradient = loss_of_one
    sharded, of_sharded = loss_and_gradient(MeshConfig(**mesh), parameters)
    assert sharded == pytest.approx(loss, rel=1e-5)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient))
    for ours, theirs in zip(jax.tree.leaves(of_sharded), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * largest)
