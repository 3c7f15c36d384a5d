"""iVideoGPT over a mesh: loss, gradients and rollouts equal those of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvgen.models.ivideogpt.config import CompressiveTokenizerConfig, FrameTransformerConfig
from jvgen.models.ivideogpt.sampling import SamplingConfig
from jvgen.parallel import axes
from jvgen.parallel.mesh import MeshConfig, make_mesh
from jvgen.parallel.rules import Sharding, ShardingConfig
from jvgen.tasks.world_model import WorldModelConfig

# Half a minute of compilations.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilations")]

TOKENIZER = CompressiveTokenizerConfig(
    resolution=16, block_channels=(8,), layers_per_block=1, groups=4, latent_channels=4, code_width=3,
    context_codes=18, future_codes=12, attention_side=16, attention_groups=4, patch=8, dropout=0.0,
)  # fmt: skip
TASK = WorldModelConfig(
    transformer=FrameTransformerConfig(
        vocabulary=32, width=32, layers=2, heads=4, hidden=48, max_positions=600, action_width=2, reward=True,
        attention_dropout=0.0,
    ),
    tokenizer=TOKENIZER,
    tokenizer_weights="nowhere",
    sampling=SamplingConfig(top_k=6),
).build()  # fmt: skip
ONE = MeshConfig(fsdp=1)
MESHES = [
    pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, id="data-fsdp-tensor"),
    pytest.param({"fsdp": 2, "seq": 2, "tensor": 2}, id="fsdp-seq-tensor"),
    pytest.param({"data": 2, "fsdp": 4}, id="data-fsdp"),
]


def drawn(networks) -> dict:
    rng = np.random.default_rng(0)
    return {
        name: jax.tree.map(
            lambda leaf: np.float32(0.2 * rng.standard_normal(leaf.shape) + (leaf.ndim == 1)), net.shapes
        )
        for name, net in networks.items()
    }


def run_on(mesh: MeshConfig) -> dict[str, np.ndarray]:
    """Loss, gradients and a rollout of eight clips, all in one program."""
    devices = jax.devices()[:1] if mesh == ONE else None
    sharding = Sharding(make_mesh(mesh, devices), ShardingConfig(replicate_below=64))
    rng = np.random.default_rng(1)
    batch = {
        "video": rng.integers(0, 256, (8, 4, 16, 16, 3)).astype(np.uint8),
        "actions": rng.standard_normal((8, 4, 2)).astype(np.float32),
        "rewards": rng.standard_normal((8, 4)).astype(np.float32),
        "slot": np.arange(8, dtype=np.int32),
    }
    trained, frozen = drawn(TASK.networks), drawn(TASK.frozen_networks)
    stored = sharding.storage({name: net.axes for name, net in TASK.networks.items()}, trained)
    placed = jax.device_put(trained, stored), jax.device_put(frozen, sharding.replicated)
    batch = {name: jax.device_put(value, sharding.batch(value)) for name, value in batch.items()}

    @jax.jit
    def run(trained, frozen, batch):
        with axes.partitioned(sharding):
            loss, gradient = jax.value_and_grad(
                lambda parameters: TASK.loss(parameters, frozen, batch, jax.random.key(2))[0]
            )(trained)
            made, _ = TASK.predict(trained, frozen, batch, jax.random.key(3), samples=2)
        return loss, gradient, made

    loss, gradient, made = jax.device_get(run(*placed, batch))
    paths = jax.tree_util.tree_leaves_with_path(gradient)
    return {jax.tree_util.keystr(path): leaf for path, leaf in paths} | {
        "loss": loss, "ids": made.ids, "frames": made.frames, "rewards": made.rewards,
    }  # fmt: skip


@pytest.fixture(scope="module")
def alone() -> dict[str, np.ndarray]:
    return run_on(ONE)


@pytest.mark.parametrize("mesh", MESHES)
def test_training_and_rollouts_over_a_mesh_equal_one_device(mesh, alone):
    split = run_on(MeshConfig(**mesh))
    np.testing.assert_array_equal(split.pop("ids"), alone["ids"])
    # Rollouts differ between contexts and between samples of one context, so that a mixed-up order would show.
    assert len(np.unique(alone["ids"].reshape(16, -1), axis=0)) > 12
    largest = max(float(np.abs(value).max()) for name, value in alone.items() if name.startswith("["))
    for name, value in split.items():
        atol = max(1e-5 * float(np.abs(alone[name]).max()), 1e-6 * largest if name.startswith("[") else 0)
        np.testing.assert_allclose(value, alone[name], rtol=0, atol=atol, err_msg=name)
    assert jnp.isfinite(alone["loss"])
