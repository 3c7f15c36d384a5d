"""Both published CV-VAEs against the authors' code: clips, single images, chunks and tiles."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from case_fields import check_fields
from rounding import floor, measured, within_rounding

from jvgen.models.cv_vae.config import CVVAEConfig
from jvgen.models.cv_vae.model import CVVAE
from jvgen.models.cv_vae.tiling import decode_tiled, encode_tiled
from jvgen.models.cv_vae.torch_map import from_diffusers_config, weight_map
from jvgen.models.image_vae import posterior
from jvgen.nn.network import Network
from tests import quick_xla


def serves(name: str, config: dict) -> bool:
    return config.get("system") == "CV-VAE"


def run(case) -> None:
    about = ("system", "init_rule", "feat_limit", "out_limit")
    read = ("class", "case_kind", "init_args", "patched_constants", "prefix_lengths", "latent_prefix_lengths",
            "clip_frames", "spatial_only_frames", "odd_lengths")  # fmt: skip
    check_fields(case.config, "config.json", read=read, about=about, fixed={"dtype": "float32"})
    config = network_config(case.config)
    network = Network.of(lambda rngs: CVVAE(config, rngs=rngs))
    table = weight_map(config, case.config["class"])
    parameters = table.from_torch(case.weights, network.shapes)
    for name, tensor in table.to_torch(parameters):
        np.testing.assert_array_equal(tensor, case.weights[name], err_msg=name)
    assert set(table.torch_shapes(network.shapes)) == set(case.weights)
    encode, decode = (
        jax.jit(functools.partial(network.apply, method=method, **options), compiler_options=quick_xla.OPTIONS)
        for method, options in (("encode", {"allow_remainder": True}), ("decode", {}))
    )
    kinds = {"video": video, "image": image, "tiled": tiled}
    kinds[case.config["case_kind"]](Given(case, jax.device_put(parameters)), config, encode, decode)


def network_config(values: dict) -> CVVAEConfig:
    patched = values.get("patched_constants", {})
    check_fields(patched, "patched_constants", read=("Normalize.num_groups",))
    groups = {"norm_num_groups": patched["Normalize.num_groups"]} if patched else {}
    # A key or value that the network does not have is an error.
    return from_diffusers_config({"_class_name": values["class"], **values["init_args"], **groups})


class Given:
    """The tensors of a case, channels last, and the comparison with them."""

    def __init__(self, case, parameters: dict):
        self.case, self.config, self.io, self.parameters = case, case.config, case.io, parameters

    def __contains__(self, name: str) -> bool:
        return name in self.io

    def __getitem__(self, name: str) -> jax.Array:
        return jnp.asarray(_channels_last(self.io[name]))

    def compare(self, function: Callable[..., dict[str, Any]], *inputs: jax.Array) -> dict[str, float]:
        """What a function of parameters and inputs finds, with the tensors of these names that the case has.

        Some are kept with every n-th row and column only. Returns how far each result moves.
        """
        found, moves = measured(function, self.parameters, *inputs, draws=1)
        for name, ours in found.items():
            for key in self.io:
                if key != f"out.{name}" and not key.startswith(f"out.{name}.sub"):
                    continue
                step = int(key.rpartition(".sub")[2]) if ".sub" in key else 1
                ours = np.asarray(ours)[..., ::step, ::step, :] if step > 1 else ours
                off = floor(self.config, f"out.{name}")
                within_rounding(ours, _channels_last(self.io[key]), moves[name], key, theirs_off=off)
        return moves

    def has(self, name: str) -> bool:
        return any(key == f"out.{name}" or key.startswith(f"out.{name}.sub") for key in self.io)


def _channels_last(tensor: np.ndarray) -> np.ndarray:
    return np.moveaxis(tensor, 1, -1) if tensor.ndim >= 4 else tensor


def video(given: Given, config, encode, decode) -> None:
    def whole(p, clip, noise, latents):
        moments = encode(p, clip)
        mean, log_variance = posterior.split_moments(moments)
        return {
            "moments": moments,
            "mean": mean,
            "logvar": log_variance,
            "std": jnp.exp(0.5 * log_variance),
            "z_sample": posterior.sample(moments, jnp.asarray(noise)),
            "recon_mode": decode(p, mean),
            "dec_zrand": decode(p, latents),
        }

    moments_move = given.compare(whole, given["in.x"], given["in.eps"], given["in.z"])["moments"]
    if given.has("kl_per_sample"):
        divergence(given, encode(given.parameters, given["in.x"]), moments_move)
    for frames in given.config["prefix_lengths"]:
        name = f"moments_first{frames}"
        given.compare(lambda p, clip, name=name: {name: encode(p, clip)}, given["in.x"][:, :frames])
    for frames in given.config["latent_prefix_lengths"]:
        name = f"dec_zrand_first{frames}"
        given.compare(lambda p, latents, name=name: {name: decode(p, latents)}, given["in.z"][:, :frames])


def divergence(given: Given, moments: jax.Array, moves: float) -> None:
    """A sum over all moments: roundings that they have in common add up and do not cancel."""
    mean, log_variance = posterior.split_moments(moments)
    slopes = jnp.abs(mean) + 0.5 * jnp.abs(jnp.expm1(log_variance))
    together = float(jnp.sum(slopes.reshape(len(slopes), -1), axis=1).max()) * moves
    off = floor(given.config, "out.kl_per_sample")
    ours, theirs = posterior.kl_divergence(moments), given.io["out.kl_per_sample"]
    within_rounding(ours, theirs, together, "kl_per_sample", theirs_off=off)


def image(given: Given, config, encode, decode) -> None:
    """Images are clips of one frame, with an axis for it; clips that were flattened for the original are not."""

    def of_images(p, images, latents):
        moments = encode(p, images)
        mean, log_variance = posterior.split_moments(moments)
        return {
            "moments": moments,
            "mean": mean,
            "logvar": log_variance,
            "recon_mode": decode(p, mean),
            "dec_z4": decode(p, latents),
        }

    def of_clips(p, clips):
        moments = encode(p, clips)
        decoded = decode(p, posterior.mode(moments))
        return {"moments_flat_clip": moments, "dec_flat_z": decoded.reshape(-1, *decoded.shape[2:])}

    given.compare(of_images, given["in.image"][:, None], given["in.z4"][:, None])
    frames, flat = given.config["clip_frames"], given["in.frames"]
    given.compare(of_clips, flat.reshape(-1, frames, *flat.shape[1:]))
    if given.has("moments_still"):
        still = jnp.repeat(given["in.image"][:, None], frames, axis=1)
        given.compare(lambda p, clip: {"moments_still": encode(p, clip)}, still)
    if given.has("dec_still"):
        still = jnp.repeat(given["out.mean"], config.latent_frames(frames), axis=1)
        given.compare(lambda p, latents: {"dec_still": decode(p, latents)}, still)


def tiled(given: Given, config, encode, decode) -> None:
    def encoded(p, clip, config):
        return encode_tiled(functools.partial(encode, p), jnp.asarray(clip), config)

    def decoded(p, latents, config):
        return decode_tiled(functools.partial(decode, p), jnp.asarray(latents), config)

    clip, latents = given["in.x"], given["in.z"]

    def whole(p, clip, latents):
        moments = encoded(p, clip, config)
        again = decoded(p, posterior.mode(moments), config)
        return {"moments": moments, "dec_z": decoded(p, latents, config), "recon_mode": again}

    given.compare(whole, clip, latents)
    frames = given.config["spatial_only_frames"]
    latent_frames = config.latent_frames(frames)
    in_time, in_space = config.replace(tile_size=None), config.replace(tile_frames=None)
    others = {
        "moments_temporal_only": (encoded, clip, in_time),
        "dec_z_temporal_only": (decoded, latents, in_time),
        "moments_spatial_only": (encoded, clip[:, :frames], in_space),
        "dec_z_spatial_only": (decoded, latents[:, :latent_frames], in_space),
        "moments_untiled": (encoded, clip, config.replace(tile_size=None, tile_frames=None)),
        **{f"moments_first{n}": (encoded, clip[:, :n], config) for n in given.config["odd_lengths"]},
    }
    for name, (function, values, how) in others.items():
        if given.has(name):
            given.compare(lambda p, x, name=name, f=function, how=how: {name: f(p, x, how)}, values)
