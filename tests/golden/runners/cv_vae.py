"""Both published CV-VAEs against the authors' code: clips, single images, chunks and tiles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jvgen.models.cv_vae.config import CVVAEConfig
from jvgen.models.cv_vae.model import CVVAE
from jvgen.models.cv_vae.tiling import decode_tiled, encode_tiled
from jvgen.models.cv_vae.torch_map import from_diffusers_config, weight_map
from jvgen.models.image_vae import posterior
from jvgen.nn.network import Network

ATOL = 2e-5  # of the largest value
# Compiling many shapes is what takes time, so compile carelessly.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def serves(name: str, config: dict) -> bool:
    return config.get("system") == "CV-VAE"


def run(case) -> None:
    config = network_config(case.config)
    network = Network.of(lambda rngs: CVVAE(config, rngs=rngs))
    table = weight_map(config, case.config["class"])
    parameters = table.from_torch(case.weights, network.shapes)
    for name, tensor in table.to_torch(parameters):
        np.testing.assert_array_equal(tensor, case.weights[name], err_msg=name)
    assert set(table.torch_shapes(network.shapes)) == set(case.weights)
    encode, decode = (
        functools.partial(
            jax.jit(functools.partial(network.apply, method=method, **options), compiler_options=QUICK),
            jax.device_put(parameters),
        )
        for method, options in (("encode", {"allow_remainder": True}), ("decode", {}))
    )
    {"video": video, "image": image, "tiled": tiled}[case.config["case_kind"]](Given(case), config, encode, decode)


def network_config(values: dict) -> CVVAEConfig:
    patched = values.get("patched_constants", {})
    groups = {"norm_num_groups": patched["Normalize.num_groups"]} if patched else {}
    return from_diffusers_config({"_class_name": values["class"], **values["init_args"], **groups})


class Given:
    """The tensors of a case, channels last, and the comparison with them."""

    def __init__(self, case):
        self.name, self.config, self.io = case.name, case.config, case.io

    def __contains__(self, name: str) -> bool:
        return name in self.io

    def __getitem__(self, name: str) -> jax.Array:
        tensor = self.io[name]
        return jnp.asarray(np.moveaxis(tensor, 1, -1) if tensor.ndim >= 4 else tensor)

    def compare(self, name: str, compute) -> None:
        """With the tensor of this name, or with every n-th row and column of it; nothing if the case has none."""
        found = [key for key in self.io if key == f"out.{name}" or key.startswith(f"out.{name}.sub")]
        if not found:
            return
        result = compute()
        expected, step = self[found[0]], int(found[0].rpartition(".sub")[2]) if ".sub" in found[0] else 1
        result = np.asarray(result)
        result = result[..., ::step, ::step, :] if step > 1 else result
        atol = ATOL * max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(result, expected, atol=atol, rtol=0, err_msg=f"{self.name} {name}")


def video(given, config, encode, decode) -> None:
    moments = encode(given["in.x"])
    mean, log_variance = posterior.split_moments(moments)
    given.compare("moments", lambda: moments)
    given.compare("mean", lambda: mean)
    given.compare("logvar", lambda: log_variance)
    given.compare("std", lambda: jnp.exp(0.5 * log_variance))
    given.compare("kl_per_sample", lambda: posterior.kl_divergence(moments))
    given.compare("z_sample", lambda: posterior.sample(moments, given["in.eps"]))
    given.compare("recon_mode", lambda: decode(mean))
    given.compare("dec_zrand", lambda: decode(given["in.z"]))
    for frames in given.config["prefix_lengths"]:
        given.compare(f"moments_first{frames}", lambda n=frames: encode(given["in.x"][:, :n]))
    for frames in given.config["latent_prefix_lengths"]:
        given.compare(f"dec_zrand_first{frames}", lambda n=frames: decode(given["in.z"][:, :n]))


def image(given, config, encode, decode) -> None:
    """Images are clips of one frame, with an axis for it; clips that were flattened for the original are not."""
    moments = encode(given["in.image"][:, None])
    mean, log_variance = posterior.split_moments(moments)
    given.compare("moments", lambda: moments)
    given.compare("mean", lambda: mean)
    given.compare("logvar", lambda: log_variance)
    given.compare("recon_mode", lambda: decode(mean))
    given.compare("dec_z4", lambda: decode(given["in.z4"][:, None]))
    frames = given.config["clip_frames"]
    flat = given["in.frames"]
    moments = encode(flat.reshape(-1, frames, *flat.shape[1:]))
    given.compare("moments_flat_clip", lambda: moments)
    clips = decode(posterior.mode(moments))
    given.compare("dec_flat_z", lambda: clips.reshape(-1, *clips.shape[2:]))
    given.compare("moments_still", lambda: encode(jnp.repeat(given["in.image"][:, None], frames, axis=1)))
    latent_frames = config.latent_frames(frames)
    given.compare("dec_still", lambda: decode(jnp.repeat(given["out.mean"], latent_frames, axis=1)))


def tiled(given, config, encode, decode) -> None:
    clip, latents = given["in.x"], given["in.z"]
    moments = encode_tiled(encode, clip, config)
    given.compare("moments", lambda: moments)
    given.compare("dec_z", lambda: decode_tiled(decode, latents, config))
    given.compare("recon_mode", lambda: decode_tiled(decode, posterior.mode(moments), config))
    in_time = config.replace(tile_size=None)
    given.compare("moments_temporal_only", lambda: encode_tiled(encode, clip, in_time))
    given.compare("dec_z_temporal_only", lambda: decode_tiled(decode, latents, in_time))
    in_space, frames = config.replace(tile_frames=None), given.config["spatial_only_frames"]
    given.compare("moments_spatial_only", lambda: encode_tiled(encode, clip[:, :frames], in_space))
    latent_frames = config.latent_frames(frames)
    given.compare("dec_z_spatial_only", lambda: decode_tiled(decode, latents[:, :latent_frames], in_space))
    given.compare("moments_untiled", lambda: encode(clip))
    for length in given.config["odd_lengths"]:
        given.compare(f"moments_first{length}", lambda n=length: encode_tiled(encode, clip[:, :n], config))
