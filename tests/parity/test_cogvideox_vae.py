"""CogVideoX's autoencoder against diffusers' AutoencoderKLCogVideoX with random weights: outputs, tiles, both maps."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvgen.interop.from_torch import import_folder
from jvgen.interop.to_torch import export_network
from jvgen.interop.verify import verify
from jvgen.models.cogvideox_vae import flops
from jvgen.models.cogvideox_vae.config import CogVideoXVAEConfig
from jvgen.models.cogvideox_vae.model import CogVideoXVAE, stream_chunks
from jvgen.models.cogvideox_vae.tiling import Tiling, tiled
from jvgen.models.cogvideox_vae.torch_map import from_diffusers_config, to_diffusers_config, weight_map, weight_map_sat
from jvgen.models.weight_map import WeightError
from jvgen.nested import flatten
from jvgen.nn.network import Network
from jvgen.saved_config import from_json

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("quick_compilations")]

# One level that halves time and space, and one that halves space; the published four are in the test of exported files.
CONFIG = CogVideoXVAEConfig.tiny().replace(
    block_channels=(8, 8, 12), temporal_downsampling=2, sample_height=48, sample_width=40
)
SIZE = (8, 12)


@dataclasses.dataclass(frozen=True)
class Pair:
    network: Network
    parameters: dict
    reference: "torch.nn.Module"
    encode: types.FunctionType
    decode: types.FunctionType


@pytest.fixture(scope="module")
def pair(quick_compilations) -> Pair:
    torch.manual_seed(1)
    reference = diffusers.AutoencoderKLCogVideoX.from_config(to_diffusers_config(CONFIG)).eval()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            # Random norms and biases too: their defaults hide mistakes.
            offset = 1.0 if "norm" in name and "conv" not in name and name.endswith("weight") else 0.0
            scale = 0.2 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.copy_(offset + scale * torch.randn_like(parameter))
    network = config_network(CONFIG)
    state = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    parameters = jax.device_put(weight_map(CONFIG).from_torch(state, network.shapes))
    return Pair(
        network,
        parameters,
        reference,
        jax.jit(lambda clip: network.apply(parameters, clip, method="encode")),
        jax.jit(lambda latents: network.apply(parameters, latents, method="decode")),
    )


def config_network(config: CogVideoXVAEConfig) -> Network:
    return Network.of(lambda rngs: CogVideoXVAE(config, rngs=rngs))


def random_array(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def to_torch(clip: np.ndarray) -> "torch.Tensor":
    return torch.from_numpy(np.ascontiguousarray(np.asarray(clip).transpose(0, 4, 1, 2, 3)))


def to_ours(clip: "torch.Tensor") -> np.ndarray:
    return clip.detach().numpy().transpose(0, 2, 3, 4, 1)


# An image; three chunks, of which the first is longer.
@pytest.mark.parametrize("frames", [1, 25])
def test_moments(pair, frames):
    clip = random_array(frames, 1, frames, *SIZE, 3)
    with torch.no_grad():
        expected = to_ours(pair.reference.encode(to_torch(clip)).latent_dist.parameters)
    np.testing.assert_allclose(pair.encode(clip), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("frames", [1, 2, 7])
def test_decoding(pair, frames):
    latents = random_array(frames, 1, frames, 2, 3, CONFIG.latent_channels)
    with torch.no_grad():
        expected = to_ours(pair.reference.decode(to_torch(latents)).sample)
    np.testing.assert_allclose(pair.decode(latents), expected, atol=2e-5, rtol=0)


def test_chunks_equal_the_whole_clip(pair):
    latents = jnp.asarray(random_array(3, 1, 7, 2, 3, CONFIG.latent_channels))
    clip = jnp.asarray(random_array(4, 1, 25, *SIZE, 3))
    for method, whole, frames, size in (
        ("decode_chunk", pair.decode, latents, CONFIG.decode_chunk_frames),
        ("encode_chunk", pair.encode, clip, CONFIG.encode_chunk_frames),
    ):
        shapes = []

        @jax.jit
        def step(part, past, method=method):
            return pair.network.apply(pair.parameters, part, past, method=method)

        def noting(part, past, step=step, shapes=shapes):
            result, past = step(part, past)
            shapes.append(jax.tree.map(jnp.shape, past))
            return result, past

        parts = list(stream_chunks(noting, frames, size))
        assert len(parts) == 3 and shapes[0] == shapes[1] == shapes[2]
        np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole(frames), atol=1e-6, rtol=0)


def test_memory_does_not_grow_with_the_length_of_a_clip(pair):
    def temporary(frames: int) -> int:
        shape = jax.ShapeDtypeStruct((1, frames, 2, 3, CONFIG.latent_channels), jnp.float32)
        return pair.decode.lower(shape).compile().memory_analysis().temp_size_in_bytes

    frame = 8 * 12 * 3 * 4
    # The rest is the result, before and after its chunks are joined.
    assert temporary(21) - temporary(7) < 3 * 14 * 2 * frame


def test_second_chunk_depends_on_the_cache(pair):
    latents = random_array(3, 1, 7, 2, 3, CONFIG.latent_channels)
    whole = np.asarray(pair.decode(latents))
    alone = np.asarray(pair.decode(latents[:, 5:]))
    assert np.abs(whole[:, 9:] - alone).max() > 0.05


def test_single_pass_differs_from_chunks_after_the_first(pair):
    once = config_network(CONFIG.replace(encode_chunk_frames=None))
    clip = random_array(5, 1, 25, *SIZE, 3)
    moments = np.asarray(jax.jit(lambda x: once.apply(pair.parameters, x, method="encode"))(clip))
    batched = np.asarray(pair.encode(clip))
    with torch.no_grad():
        expected = to_ours(pair.reference.encoder(to_torch(clip))[0])
    np.testing.assert_allclose(moments, expected, atol=2e-5, rtol=0)
    assert moments.shape == batched.shape and np.abs(moments - batched).max() > 0.01


def test_tiles_equal_those_of_diffusers(pair):
    # Three by three tiles, the last ones of other sizes.
    latents = jnp.asarray(random_array(6, 1, 1, 12, 11, CONFIG.latent_channels))
    clip = jnp.asarray(random_array(7, 1, 1, 48, 44, 3))
    pair.reference.enable_tiling()
    try:
        with torch.no_grad():
            decoded = to_ours(pair.reference.decode(to_torch(latents)).sample)
            moments = to_ours(pair.reference.encode(to_torch(clip)).latent_dist.parameters)
    finally:
        pair.reference.disable_tiling()
    ours = tiled(pair.decode, latents, Tiling.decoding(CONFIG))
    np.testing.assert_allclose(ours, decoded, atol=2e-5, rtol=0)
    np.testing.assert_allclose(tiled(pair.encode, clip, Tiling.encoding(CONFIG)), moments, atol=2e-5, rtol=0)
    whole = pair.decode(latents)
    assert whole.shape == ours.shape and np.abs(whole - ours).max() > 0.01


def test_published_tiles():
    config = CogVideoXVAEConfig()
    assert Tiling.decoding(config) == Tiling(size=(30, 45), stride=(25, 36), blend=(40, 72), keep=(200, 288))
    assert Tiling.encoding(config) == Tiling(size=(240, 360), stride=(200, 288), blend=(5, 9), keep=(25, 36))
    with pytest.raises(ValueError, match="stride of 12 and contributes 14 rows"):
        Tiling.decoding(CONFIG.replace(sample_height=32))
    assert not Tiling.decoding(config).needed(30, 45) and Tiling.decoding(config).needed(31, 45)


def test_weights_load_strictly_and_round_trip_bitwise(tmp_path):
    config = CogVideoXVAEConfig.tiny()
    shapes = config_network(config).shapes
    leaves, structure = jax.tree.flatten(shapes)
    parameters = structure.unflatten([0.3 * random_array(seed, *leaf.shape) for seed, leaf in enumerate(leaves)])
    folder = export_network(config, parameters, tmp_path / "vae")
    report = verify(folder, config, parameters)
    assert set(report.errors) == {"moments", "decoded"} and report.max_abs_error < 5e-5, report
    model = diffusers.AutoencoderKLCogVideoX.from_pretrained(folder)
    loaded = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    before, after = flatten(parameters), flatten(weight_map(config).from_torch(loaded, shapes))
    assert all(np.array_equal(before[path], after[path]) for path in before) and list(before) == list(after)


def test_sat_weights_round_trip(pair):
    """Names as `scripts/convert_cogvideox_to_diffusers.py` of diffusers tells them apart."""
    table = weight_map_sat(CONFIG, "first_stage_model.")
    state = dict(table.to_torch(pair.parameters))
    down, up = "first_stage_model.encoder.down.", "first_stage_model.decoder.up."
    same = {
        f"{down}2.block.0.nin_shortcut.weight": "encoder.down_blocks.2.resnets.0.conv_shortcut.weight",
        f"{down}1.downsample.conv.bias": "encoder.down_blocks.1.downsamplers.0.conv.bias",
        f"{up}2.upsample.conv.weight": "decoder.up_blocks.0.upsamplers.0.conv.weight",
        f"{up}0.block.1.norm2.conv_y.conv.weight": "decoder.up_blocks.2.resnets.1.norm2.conv_y.conv.weight",
        "first_stage_model.decoder.mid.block_2.conv1.conv.weight": "decoder.mid_block.resnets.1.conv1.conv.weight",
        "first_stage_model.encoder.norm_out.weight": "encoder.norm_out.weight",
    }
    theirs = pair.reference.state_dict()
    assert len(state) == len(theirs)
    for name, other in same.items():
        np.testing.assert_array_equal(state[name], theirs[other].numpy())
    state["first_stage_model.loss.discriminator.weight"] = np.zeros(3, np.float32)
    again = flatten(table.from_torch(state, pair.network.shapes))
    assert all(np.array_equal(array, again[path]) for path, array in flatten(pair.parameters).items())
    state["first_stage_model.decoder.extra"] = np.zeros(3, np.float32)
    with pytest.raises(WeightError, match="1 not expected"):
        table.from_torch(state, pair.network.shapes)


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_files_of_the_training_code_are_imported(pair, prefix, tmp_path):
    """As released: a pickle with "state_dict", and with other networks where the names have a prefix."""
    others = {"model.diffusion_model.x": np.zeros(2, np.float32)} if prefix else {}
    state = dict(weight_map_sat(CONFIG, prefix).to_torch(pair.parameters)) | others
    state[f"{prefix}loss.discriminator.weight"] = np.zeros(3, np.float32)
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in state.items()}
    torch.save({"state_dict": tensors}, tmp_path / "3d-vae.pt")
    again = flatten(import_folder(tmp_path / "3d-vae.pt", CONFIG)[1])
    assert all(np.array_equal(array, again[path]) for path, array in flatten(pair.parameters).items())


def test_configuration_round_trip_through_diffusers(pair):
    assert from_diffusers_config(pair.reference.config) == CONFIG
    with pytest.raises(ValueError, match="use_quant_conv = True"):
        from_diffusers_config({**pair.reference.config, "use_quant_conv": True})
    with pytest.raises(ValueError, match="blocks of type CogVideoXDownBlock3D only"):
        from_diffusers_config({"down_block_types": ["Other"]})


def test_published_size():
    network = config_network(CogVideoXVAEConfig.cogvideox_2b())
    shapes = weight_map(CogVideoXVAEConfig()).torch_shapes(network.shapes)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 215_583_907
    with torch.device("meta"):
        reference = diffusers.AutoencoderKLCogVideoX()
    assert shapes == {name: tuple(tensor.shape) for name, tensor in reference.state_dict().items()}
    assert from_diffusers_config(reference.config) == CogVideoXVAEConfig.cogvideox_2b()


def test_flops_equal_those_that_torch_counts(pair):
    """Except for the maps of latents to scales and shifts, which torch applies to upsampled latents."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        pair.reference.encode(torch.zeros(1, 3, 17, *SIZE))
    assert sum(flops.encode(CONFIG, 17, *SIZE).values()) == counter.get_total_flops() > 0
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        pair.reference.decode(torch.zeros(1, CONFIG.latent_channels, 5, 2, 3))
    counted = counter.get_flop_counts()
    conditions = sum(
        sum(kinds.values()) for name, kinds in counted.items() if name.split(".")[-1] in ("conv_y", "conv_b")
    )
    ours = sum(flops.decode(CONFIG, 5, 2, 3).values())
    small = sum(flops.decode(CONFIG.replace(latent_channels=4), 5, 2, 3).values())
    assert ours == small and 0 < ours - (counter.get_total_flops() - conditions) < conditions


@pytest.mark.parametrize(
    "frames, height, width, said",
    [
        (13, 16, 16, "take 9 or 17"),
        (0, 16, 16, "8n \\+ 1 frames"),
        (9, 12, 16, "height = 12"),
        (9, 16, 20, "width = 20"),
    ],
)
def test_clips_that_decode_to_another_size_are_refused(frames, height, width, said):
    with pytest.raises(ValueError, match=said):
        CogVideoXVAEConfig().check_clip(frames, height, width)
    CogVideoXVAEConfig().check_clip(49, 480, 720)
    assert CogVideoXVAEConfig().latent_shape(49, 480, 720) == (13, 60, 90)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"block_channels": ()}, "block_channels is empty"),
        ({"groups": 5}, "groups = 5 does not divide"),
        ({"temporal_downsampling": 3}, "power of two"),
        ({"temporal_downsampling": 8}, "at most 4"),
        ({"encode_chunk_frames": 7}, "multiple of temporal_downsampling"),
        ({"scaling_factor": 0.0}, "must be positive"),
        ({"decode_chunk_frames": 0}, "decode_chunk_frames = 0"),
    ],
)
def test_invalid_configurations_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        CONFIG.replace(**changes).validate()


def test_bfloat16_output_for_bfloat16_input(pair):
    latents = random_array(0, 1, 2, 2, 3, CONFIG.latent_channels)
    rough = pair.decode(latents.astype(jnp.bfloat16))
    exact = np.asarray(pair.decode(latents))
    assert rough.dtype == jnp.bfloat16
    assert np.abs(np.asarray(rough, np.float32) - exact).max() < 0.1 * np.abs(exact).max()


def test_chunk_sizes_that_version_0_1_0_saved():
    saved = {"class": "jvgen.models.cogvideox_vae.config:CogVideoXVAEConfig", "encode_batch": None, "decode_batch": 4}
    assert from_json(json.dumps(saved)) == CogVideoXVAEConfig(encode_chunk_frames=None, decode_chunk_frames=4)
