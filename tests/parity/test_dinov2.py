"""DINOv2 against transformers' Dinov2Model: outputs at the size of its positions and at others, weights both ways."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvgen.interop.from_torch import import_folder, read_config
from jvgen.interop.to_torch import export_network
from jvgen.models.dinov2.config import Dinov2Config, base, giant, large, small
from jvgen.models.dinov2.flops import forward_flops
from jvgen.models.dinov2.model import MEAN, STD, Dinov2, prepared
from jvgen.models.dinov2.torch_map import from_diffusers_config, to_diffusers_config, weight_map
from jvgen.nested import flatten
from jvgen.nn.network import Network

TINY = Dinov2Config(width=24, layers=2, heads=3, hidden=96, patch=4, side=20)
GATED = TINY.replace(hidden=64, gated=True)


def network_of(config: Dinov2Config) -> Network:
    return Network.of(lambda rngs: Dinov2(config, rngs=rngs))


def random_parameters(config: Dinov2Config) -> dict:
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32), network_of(config).shapes)


@pytest.mark.torch
@pytest.mark.parametrize("config", [TINY, GATED], ids=["plain", "gated"])
def test_outputs_are_those_of_transformers(config, tmp_path):
    """Of weights that the class reads strictly and writes again, which come back unchanged."""
    torch, transformers = (pytest.importorskip(name) for name in ("torch", "transformers"))
    parameters = random_parameters(config)
    export_network(config, parameters, tmp_path / "ours")
    model, told = transformers.Dinov2Model.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(told[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    apply = jax.jit(network_of(config).apply)
    # A square of the table's size, larger, smaller, and another aspect.
    for size in ((20, 20), (28, 36), (8, 12), (20, 24)):
        images = np.random.default_rng(1).standard_normal((2, *size, 3)).astype(np.float32)
        with torch.no_grad():
            theirs = model.eval()(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).last_hidden_state.numpy()
        ours = apply(parameters, images)
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max(), rtol=0, err_msg=str(size))
    # With the mask token that published files have.
    model = transformers.Dinov2Model(
        transformers.Dinov2Config(**to_diffusers_config(config) | {"use_mask_token": True})
    )
    model.save_pretrained(tmp_path / "theirs")
    found, values = import_folder(tmp_path / "theirs")
    assert found == config
    named = model.state_dict()
    for path, name in (("positions", "embeddings.position_embeddings"), ("class_token", "embeddings.cls_token")):
        np.testing.assert_array_equal(values[path], named[name].numpy().reshape(values[path].shape))
    kernel = named["embeddings.patch_embeddings.projection.weight"].numpy()
    np.testing.assert_array_equal(values["patches"]["kernel"].T, kernel.transpose(0, 2, 3, 1).reshape(24, -1))


@pytest.mark.parametrize("config", [TINY, GATED], ids=["plain", "gated"])
def test_weights_return_unchanged_by_either_name(config):
    parameters, network = random_parameters(config), network_of(config)
    state = dict(weight_map(config).to_torch(parameters))
    renamed = {name.replace("attention.attention.query", "attention.q_proj"): value for name, value in state.items()}
    for tensors in (state, renamed):
        back = flatten(weight_map(config).from_torch(tensors, network.shapes))
        for path, value in flatten(parameters).items():
            np.testing.assert_array_equal(back[path], value, err_msg=path)


@pytest.mark.parametrize("config", [TINY, GATED, giant()], ids=["plain", "gated", "giant"])
def test_configuration_returns_unchanged(config):
    assert from_diffusers_config(to_diffusers_config(config)) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act = 'relu'; only 'gelu'"),
        ({"num_channels": 1}, "num_channels = 1; only 3"),
        ({"qkv_bias": False}, "qkv_bias = False; only True"),
        ({"hidden_size": 24.5}, "does not describe a Dinov2Model"),
        ({"mlp_ratio": "four"}, "does not describe a Dinov2Model"),
        ({"patch_size": [4, 4]}, "does not describe a Dinov2Model"),
        ({"num_attention_heads": 5}, "heads = 5: must divide width = 24"),
    ],
)
def test_networks_of_another_make_are_refused(changes, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(to_diffusers_config(TINY) | changes))
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path)


def test_a_width_that_the_class_does_not_have_is_refused():
    with pytest.raises(ValueError, match=r"hidden = 100: Dinov2Model has a multiple of width = 24"):
        to_diffusers_config(TINY.replace(hidden=100))


def test_images_are_prepared_as_published():
    """Constant pictures keep their color in any size; the mean of ImageNet becomes zero."""
    images = jnp.broadcast_to(jnp.asarray(MEAN), (1, 6, 9, 3)).at[..., 0].add(0.1)
    found = prepared(images, (4, 8))
    assert found.shape == (1, 4, 8, 3)
    np.testing.assert_allclose(found, np.broadcast_to([0.1 / STD[0], 0, 0], found.shape), atol=1e-5)
    with pytest.raises(ValueError, match="images of 6x8: must be multiples of patch = 4"):
        network_of(TINY).apply(random_parameters(TINY), jnp.zeros((1, 6, 8, 3)))


def test_published_sizes():
    sizes = [
        sum(s.size for s in jax.tree.leaves(network_of(preset()).shapes)) for preset in (small, base, large, giant)
    ]
    # Without the mask token, which is one token more.
    assert sizes == [22_056_192, 86_579_712, 304_367_616, 1_136_479_232]


def test_flops_agree_with_the_compiler():
    config = TINY.replace(width=192, hidden=768, unroll=True)
    network, images = network_of(config), jax.ShapeDtypeStruct((1, 20, 20, 3), jnp.float32)
    counted = jax.jit(network.apply).lower(network.shapes, images).cost_analysis()["flops"]
    assert sum(forward_flops(config, 20, 20).values()) == pytest.approx(counted, rel=0.06)
