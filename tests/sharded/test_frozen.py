"""A frozen text encoder on eight host devices: replicated or sharded, its embeddings are those of one device."""

import re

import jax
import numpy as np
import pytest

from jvgen import nested
from jvgen.models.cogvideox_vae.config import CogVideoXVAEConfig
from jvgen.models.t5.config import T5Config
from jvgen.models.t5.model import T5Encoder
from jvgen.nn.network import Network, run_frozen
from jvgen.parallel import axes
from jvgen.parallel.chips import CHIPS, Chip
from jvgen.parallel.mesh import MeshConfig, make_mesh
from jvgen.parallel.rules import Sharding, ShardingConfig
from jvgen.tasks.clip_vae import ClipVAE

ENCODER = T5Config(vocabulary=64, width=32, layers=2, heads=2, head_width=16, hidden=64)
TOKENS = np.arange(8 * 6, dtype=np.int32).reshape(8, 6) % 64


@pytest.fixture(scope="module")
def encoder():
    network = Network.of(lambda rngs: T5Encoder(ENCODER, rngs=rngs))
    network.freeze()
    parameters = network.init(jax.random.key(0))
    return network, parameters, jax.jit(network.apply)(parameters, TOKENS)


def sharding_of(network, **config):
    mesh = make_mesh(MeshConfig(fsdp=2, seq=2, tensor=2))
    return Sharding(mesh, ShardingConfig(replicate_below=0, **config)).holding(network.axes, network.shapes)


@pytest.mark.parametrize("frozen", ["sharded", "replicated"])
def test_embeddings_are_those_of_one_device(encoder, frozen):
    network, parameters, expected = encoder
    sharding = sharding_of(network, frozen=frozen)

    def embed(parameters, tokens):
        with axes.partitioned(sharding):
            return network.apply(parameters, tokens)

    places = sharding.frozen(network.axes, network.shapes)
    lowered = jax.jit(embed, in_shardings=(places, sharding.batch(TOKENS))).lower(network.shapes, TOKENS)
    compiled = lowered.compile()
    np.testing.assert_allclose(
        compiled(jax.device_put(parameters, places), jax.device_put(TOKENS, sharding.batch(TOKENS))),
        expected,
        rtol=1e-5,
        atol=1e-5,
    )
    # No kernel travels where each device has its own: only activations are gathered, and summed over `tensor`.
    gathered = {
        tuple(map(int, shape.split(",")))
        for shape in re.findall(r"f32\[([\d,]+)\]\S* all-gather\(", compiled.as_text())
    }
    kernels = {leaf.shape[-2:] for path, leaf in nested.flatten(network.shapes).items() if path.endswith("kernel")}
    kernels |= {(rows // 2, columns) for rows, columns in kernels} | {(rows, columns // 2) for rows, columns in kernels}
    assert any(shape[-2:] in kernels for shape in gathered) == (frozen == "sharded"), gathered


def test_auto_replicates_what_takes_a_tenth_of_the_memory_of_a_device(encoder, monkeypatch):
    network, _, _ = encoder
    # The memory of a CPU device is not known.
    assert not sharding_of(network).frozen_replicated
    whole = sharding_of(network, frozen="replicated")
    size = whole.frozen_bytes(network.axes, network.shapes)
    # Its kernels are split over `tensor` in any case.
    largest = max(leaf.size for leaf in jax.tree.leaves(network.shapes))
    assert 4 * largest / 2 <= size < sum(4 * leaf.size for leaf in jax.tree.leaves(network.shapes))
    for memory, replicated in ((10 * size, True), (10 * size - 10, False)):
        chip = Chip("small", "cpu", memory, 1e12)
        monkeypatch.setattr("jvgen.parallel.chips.CHIPS", (*CHIPS, chip))
        sharding = sharding_of(network)
        assert sharding.frozen_replicated is replicated
        text = sharding.describe_frozen(network.axes, network.shapes)
        assert ("replicated" in text) is replicated and "sharding.frozen = auto" in text


CODER = CogVideoXVAEConfig(
    block_channels=(8, 16), layers_per_block=1, groups=4, latent_channels=4, temporal_downsampling=2
)
CLIP = (5, 16, 24, 3)


@pytest.mark.parametrize("count,shares", [(8, 8), (4, 4), (2, 2)])
def test_clips_are_encoded_once_if_they_divide_over_all_devices(count, shares):
    """With 8 clips on 2 x 2 x 2 devices, each encodes one; devices along `seq` and `tensor` would repeat the work."""
    coder = ClipVAE(CODER)
    sharding = sharding_of(coder.network)
    clips = np.random.default_rng(0).integers(0, 255, (count, *CLIP), np.uint8)
    parameters = coder.network.init(jax.random.key(0))

    def encode(parameters, clips):
        with axes.partitioned(sharding):
            return run_frozen(lambda: coder.encode(parameters, clips), len(clips))

    alone = jax.jit(coder.encode).lower(parameters, clips).compile()
    together = jax.jit(encode, in_shardings=(sharding.replicated, sharding.batch(clips)))
    together = together.lower(parameters, clips).compile()
    made = together(parameters, jax.device_put(clips, sharding.batch(clips)))
    np.testing.assert_allclose(made, alone(parameters, clips), rtol=1e-4, atol=1e-4)
    assert made.sharding.is_equivalent_to(sharding.batch(made), made.ndim)
    flops = [program.cost_analysis()["flops"] for program in (alone, together)]
    assert flops[0] / flops[1] == pytest.approx(shares, rel=0.1)


def test_a_batch_is_over_axes_that_divide_it_and_that_no_layer_splits():
    sharding = Sharding(make_mesh(MeshConfig(fsdp=2, seq=2, tensor=2)), ShardingConfig())
    clip = (axes.BATCH, axes.FRAMES, axes.LENGTH, axes.ACTIVATION_HEADS)

    def place(examples, *split):
        return tuple(sharding.spreading(examples, split).activation(clip, (examples, 4, 4, 4)).spec)

    assert place(8) == (("data", "fsdp", "seq", "tensor"), None, None, None)
    assert place(8, axes.HEADS) == (("data", "fsdp", "seq"), None, None, "tensor")
    assert place(2) == (("data", "fsdp"), None, "seq", "tensor") and sharding.spreading(6) is sharding
