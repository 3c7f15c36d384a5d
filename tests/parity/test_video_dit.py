"""The denoiser against diffusers' CogVideoXTransformer3DModel: outputs, all gradients, weights both ways."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvgen.models.video_dit.config import Positions, VideoDiTConfig
from jvgen.models.video_dit.model import VideoDiT
from jvgen.models.video_dit.torch_map import from_diffusers_config, to_diffusers_config, weight_map, weight_map_sat
from jvgen.models.weight_map import WeightError
from jvgen.nested import flatten, unflatten
from jvgen.nn.network import Network
from jvgen.nn.rope import RotaryGrid

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
from diffusers.models.embeddings import get_3d_rotary_pos_embed  # noqa: E402
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel  # noqa: E402
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid  # noqa: E402

pytestmark = pytest.mark.torch

TINY = VideoDiTConfig(
    layers=3,
    heads=3,
    head_width=16,
    in_channels=4,
    out_channels=3,
    text_width=20,
    text_length=5,
    condition_width=16,
    sample_height=8,
    sample_width=12,
    sample_frames=3,
)
VARIANTS = {
    "2b": TINY,
    "5b": TINY.replace(positions=Positions.ROTARY),
    "5b_image_to_video": TINY.replace(positions=Positions.ROTARY_AND_LEARNED, in_channels=8),
    "1.5": TINY.replace(positions=Positions.ROTARY, temporal_patch=2, rotary_grid=RotaryGrid.SLICE),
    "1.5_image_to_video": TINY.replace(
        positions=Positions.ROTARY, temporal_patch=2, rotary_grid=RotaryGrid.SLICE, offset_width=16
    ),
}


def network_of(config: VideoDiTConfig) -> Network:
    return Network.of(lambda rngs: VideoDiT(config, rngs=rngs))


def random_parameters(network: Network, seed: int = 0) -> dict:
    """Normal numbers everywhere, also where training starts from zero or one: no parameter is without effect."""
    rng = np.random.default_rng(seed)
    flat = {}
    for path, shape in flatten(network.shapes).items():
        values = 0.2 * rng.standard_normal(shape.shape).astype(np.float32)
        flat[path] = jnp.asarray(values + 1.0 if path.endswith("norm/scale") else values)
    return unflatten(flat)


def random_inputs(config: VideoDiTConfig, shape: tuple[int, int, int], seed: int = 1) -> dict:
    rng = np.random.default_rng(seed)
    normal = lambda *s: rng.standard_normal(s).astype(np.float32)  # noqa: E731
    inputs = {
        "latents": normal(2, *shape, config.in_channels),
        "text": normal(2, config.text_length, config.text_width),
        "timesteps": np.array([999.0, 437.0], np.float32),
    }
    if config.offset_width is not None:
        inputs["offsets"] = np.array([2.0, 2.0], np.float32)
    return inputs


def torch_network(config: VideoDiTConfig, parameters: dict) -> "CogVideoXTransformer3DModel":
    values = {key: value for key, value in to_diffusers_config(config).items() if not key.startswith("_")}
    model = CogVideoXTransformer3DModel(**values)
    state = {name: torch.from_numpy(array.copy()) for name, array in weight_map(config).to_torch(parameters)}
    model.load_state_dict(state, strict=True)
    return model.eval()


def torch_output(model: "CogVideoXTransformer3DModel", config: VideoDiTConfig, inputs: dict) -> "torch.Tensor":
    latents = torch.from_numpy(inputs["latents"]).permute(0, 1, 4, 2, 3)
    frames, height, width = latents.shape[1], latents.shape[3], latents.shape[4]
    rotary = None
    if config.positions is not Positions.SINCOS:
        grid = (height // config.patch, width // config.patch)
        rows, columns = config.base_grid
        if config.temporal_patch is None:
            crops = get_resize_crop_region_for_grid(grid, columns, rows)
            rotary = get_3d_rotary_pos_embed(config.head_width, crops, grid, frames)
        else:
            rotary = get_3d_rotary_pos_embed(
                config.head_width,
                None,
                grid,
                frames // config.temporal_patch,
                grid_type="slice",
                max_size=(rows, columns),
            )
    output = model(
        hidden_states=latents,
        encoder_hidden_states=torch.from_numpy(inputs["text"]),
        timestep=torch.from_numpy(inputs["timesteps"]),
        ofs=torch.from_numpy(inputs["offsets"]) if "offsets" in inputs else None,
        image_rotary_emb=rotary,
        return_dict=False,
    )[0]
    return output.permute(0, 1, 3, 4, 2)


def output_of(network: Network, parameters: dict, inputs: dict) -> jax.Array:
    return jax.jit(network.apply)(parameters, **inputs)


def loss_and_gradients(network: Network, parameters: dict, inputs: dict, direction: np.ndarray):
    def loss(p):
        output = network.apply(p, **{k: jnp.asarray(v) for k, v in inputs.items()})
        return jnp.sum(output.astype(jnp.float32) * direction), output

    (_, output), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(parameters)
    return output, gradients


def assert_close(ours, theirs, tolerance: float, what: str = "", least_size: float = 0.0) -> None:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape, what
    error, size = np.abs(ours - theirs).max(), np.abs(theirs).max()
    assert error <= tolerance * max(size, least_size), (
        f"{what}: error {error:.2e} where the largest value is {size:.2e}"
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_output_and_gradients_equal_those_of_diffusers(name):
    config = VARIANTS[name]
    network = network_of(config)
    parameters = random_parameters(network)
    frames = 3 if config.temporal_patch is None else 4
    inputs = random_inputs(config, (frames, 8, 12))
    model = torch_network(config, parameters)
    theirs = torch_output(model, config, inputs)
    direction = np.random.default_rng(2).standard_normal(theirs.shape).astype(np.float32)
    (theirs * torch.from_numpy(direction)).sum().backward()
    ours, gradients = loss_and_gradients(network, parameters, inputs, direction)
    assert_close(ours, theirs.detach(), 1e-5, "output")
    expected = {n: p.grad for n, p in model.named_parameters()}
    named = dict(weight_map(config).to_torch(gradients))
    # Learned positions are a buffer there: no gradient to compare with.
    assert set(named) - {"patch_embed.pos_embedding"} == set(expected)
    # The bias of the key norm moves all scores of a query alike without rotary positions: its gradient is rounding.
    least_size = 1e-3 * max(gradient.abs().max().item() for gradient in expected.values())
    for tensor, gradient in expected.items():
        assert_close(named[tensor], gradient, 3e-5, tensor, least_size)


@pytest.mark.parametrize("name", ["2b", "5b", "1.5"])
@pytest.mark.parametrize("shape", [(2, 4, 6), (4, 6, 16), (2, 12, 4)])
def test_other_resolutions(name, shape):
    config = VARIANTS[name].replace(sample_height=16, sample_width=16, layers=1)
    network = network_of(config)
    parameters = random_parameters(network)
    inputs = random_inputs(config, shape)
    with torch.no_grad():
        theirs = torch_output(torch_network(config, parameters), config, inputs)
    assert_close(output_of(network, parameters, inputs), theirs, 1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_weights_return_unchanged_from_pytorch(name):
    config = VARIANTS[name]
    network = network_of(config)
    parameters = random_parameters(network)
    state = {n: t.numpy() for n, t in torch_network(config, parameters).state_dict().items()}
    back = flatten(weight_map(config).from_torch(state, network.shapes))
    for path, value in flatten(parameters).items():
        np.testing.assert_array_equal(back[path], value, err_msg=path)


@pytest.mark.parametrize("name", VARIANTS)
def test_configuration_returns_unchanged_from_diffusers(name):
    config = VARIANTS[name]
    model = CogVideoXTransformer3DModel.from_config(to_diffusers_config(config))
    assert from_diffusers_config(dict(model.config)) == config


def test_final_epsilon_is_an_option():
    """1e-6 is what the released training code has; the difference is small and must be there."""
    inputs = random_inputs(TINY, (3, 8, 12)) | {"timesteps": np.array([3.0, 19.0], np.float32)}
    parameters = random_parameters(network_of(TINY))
    outputs = [
        np.asarray(output_of(network_of(TINY.replace(output_norm_epsilon=epsilon)), parameters, inputs))
        for epsilon in (1e-5, 1e-6)
    ]
    model = torch_network(TINY, parameters)
    model.norm_out.norm.eps = 1e-6
    with torch.no_grad():
        theirs = torch_output(model, TINY, inputs)
    assert_close(outputs[1], theirs, 2e-6)
    assert np.abs(outputs[0] - outputs[1]).max() > 2e-6 * np.abs(outputs[1]).max()


@pytest.mark.parametrize("name", VARIANTS)
def test_weights_go_through_the_training_codes_names(name):
    """Twelve chunks of modulation and fused queries, keys and values: and the values are where that code puts them."""
    config = VARIANTS[name]
    network = network_of(config)
    parameters = random_parameters(network)
    table = weight_map_sat(config)
    state = dict(table.to_torch(parameters))
    back = flatten(table.from_torch(state, network.shapes))
    for path, value in flatten(parameters).items():
        np.testing.assert_array_equal(back[path], value, err_msg=path)
    width = config.width
    diffusers = dict(weight_map(config).to_torch(parameters))
    prefix = "model.diffusion_model."
    chunks = state[f"{prefix}mixins.adaln_layer.adaLN_modulations.1.1.weight"].reshape(12, width, -1)
    first = diffusers["transformer_blocks.1.norm1.linear.weight"].reshape(6, width, -1)
    second = diffusers["transformer_blocks.1.norm2.linear.weight"].reshape(6, width, -1)
    np.testing.assert_array_equal(chunks[[0, 1, 2, 6, 7, 8]], first)
    np.testing.assert_array_equal(chunks[[3, 4, 5, 9, 10, 11]], second)
    qkv = state[f"{prefix}transformer.layers.2.attention.query_key_value.weight"]
    np.testing.assert_array_equal(qkv[width : 2 * width], diffusers["transformer_blocks.2.attn1.to_k.weight"])
    # A RepVideo file must not pass for the plain network.
    gates = {f"{prefix}transformer.learnable_gating": np.zeros(config.layers, np.float32)}
    with pytest.raises(WeightError, match="learnable_gating"):
        table.from_torch(state | gates, network.shapes)
