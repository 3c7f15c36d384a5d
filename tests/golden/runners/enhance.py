"""Enhance-A-Video's official code: scores alone, layouts of several networks, and a CogVideoX with it switched on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from jvgen.models.video_dit.enhance import EnhanceConfig, Enhancement
from jvgen.models.video_dit.model import TokenLayout, VideoDiT
from jvgen.models.video_dit.torch_map import from_diffusers_config, weight_map
from jvgen.nn.frame_diagonal import mean_diagonal
from jvgen.nn.modulation import modulated_norm
from jvgen.nn.network import Network

# The published arithmetic: one factor for the whole batch.
PUBLISHED = EnhanceConfig(share="batch")


def serves(name: str, config: dict) -> bool:
    return name.startswith("enhance")


def run(case) -> None:
    config, io = case.config, case.io
    for score in config["score"]:
        _score(case, score, config["enhance_weights"])
    _layouts(io, config)
    for name in config["models"]:
        # Of the first layer; places and batch are one axis there, and queries were recorded with the scale in them.
        query, key = (io[f"model.{name}.layer0.{what}_positions"] for what in ("query", "key"))
        rows = [query * query.shape[-1] ** 0.5, key]
        factor = _factor(*_one_place(rows), config["models"][name]["enhance_weight"])
        np.testing.assert_allclose(factor, io[f"model.{name}.layer_scores"][0], rtol=2e-6, err_msg=name)
    _network(case, config["models"]["cogvideox"])


def _one_place(rows: list[np.ndarray]) -> tuple:
    rows = [rearrange(array, "p n f d -> p f n d") for array in rows]
    return *rows, TokenLayout(text=0, grid=(rows[0].shape[1], 1, 1))


def _factor(query, key, layout: TokenLayout, temperature: float) -> np.ndarray:
    hook = Enhancement(PUBLISHED, jnp.full((1,), temperature, jnp.float32))
    return np.asarray(hook(jnp.asarray(query), jnp.asarray(key), layout, jnp.int32(0)))[0, 0]


def _score(case, score: dict, temperatures: list[float]) -> None:
    name = f"score.{score['name']}"
    query, key, layout = _one_place([case.io[f"{name}.{what}"] for what in ("query", "key")])
    dtype = jnp.dtype(score.get("dtype", "float32"))
    query, key = jnp.asarray(query, dtype), jnp.asarray(key, dtype)
    # The products are rounded to the dtype there, and not here.
    tolerance = 2e-6 if dtype == jnp.float32 else 4e-3
    diagonal = mean_diagonal(query, key, frames=layout.grid[0], start=layout.text, stop=layout.valid)
    between = (1 - diagonal) / (layout.grid[0] - 1)
    expected = case.io[f"{name}.cross_frame_mean_per_position"]
    np.testing.assert_allclose(rearrange(between, "p n -> (p n)"), expected, atol=tolerance, err_msg=name)
    np.testing.assert_allclose(jnp.mean(between), case.io[f"{name}.cross_frame_intensity"], atol=tolerance)
    attention = case.io[f"{name}.attention"]
    own = np.diagonal(attention, axis1=1, axis2=2).mean(axis=1)
    np.testing.assert_allclose(rearrange(between, "p n -> (p n)") * (layout.grid[0] - 1), 1 - own, atol=10 * tolerance)
    for temperature, factor in zip(temperatures, case.io[f"{name}.enhance_scores"], strict=True):
        ours = _factor(query, key, layout, temperature)
        np.testing.assert_allclose(ours, factor, rtol=5 * tolerance, err_msg=f"{name} at {temperature}")


def _layouts(io, config: dict) -> None:
    sizes = config["layout"]
    grid = (sizes["T"], 1, sizes["S"])
    rows = {name: rearrange(io[f"layout.{name}"], "b n l d -> b l n d") for name in
            ("text_query", "text_key", "video_query", "video_key")}  # fmt: skip

    def with_text(what: str, order: tuple[str, ...]) -> np.ndarray:
        return np.concatenate([rows[f"{kind}_{what}"] for kind in order], axis=1)

    # Text after the video is padding to our layout.
    layouts = {
        "cogvideox_text_first": (("text", "video"), TokenLayout(text=sizes["L"], grid=grid)),
        "hunyuan_single_text_last": (("video", "text"), TokenLayout(text=0, grid=grid, padding=sizes["L"])),
        "hunyuan_dual_video_only": (("video",), TokenLayout(text=0, grid=grid)),
        "wan_video_only": (("video",), TokenLayout(text=0, grid=grid)),
    }
    for name, (order, layout) in layouts.items():
        for temperature, factor in zip(config["enhance_weights"], io[f"layout.{name}"], strict=True):
            ours = _factor(with_text("query", order), with_text("key", order), layout, temperature)
            np.testing.assert_allclose(ours, factor, rtol=5e-6, err_msg=f"{name} at {temperature}")


def _network(case, values: dict) -> None:
    io, prefix = case.io, "model.cogvideox"
    config = from_diffusers_config(values["constructor"])
    network = Network.of(lambda rngs: VideoDiT(config, rngs=rngs))
    weights = {name.removeprefix("cogvideox/"): array for name, array in case.weights.items()
               if name.startswith("cogvideox/")}  # fmt: skip
    parameters = weight_map(config).from_torch(weights, network.shapes)
    latents = io[f"{prefix}.in.hidden_states"].transpose(0, 1, 3, 4, 2)
    text, timesteps = io[f"{prefix}.in.encoder_hidden_states"], io[f"{prefix}.in.timestep"].astype(np.float32)
    factors = []

    def hook(temperature: jax.Array) -> Enhancement:
        return Enhancement(PUBLISHED, jnp.broadcast_to(temperature, (config.layers,)))

    def noting(temperature: float):
        def scale(*seen):
            factor = hook(temperature)(*seen)
            jax.debug.callback(
                lambda number, value: factors.append((int(number), float(value))), seen[-1], factor[0, 0]
            )
            return factor

        return scale

    def close(ours, name: str) -> None:
        np.testing.assert_allclose(ours, io[f"{prefix}.{name}"], atol=2e-5, rtol=0, err_msg=name)

    def channels_second(output) -> np.ndarray:
        return np.asarray(output).transpose(0, 1, 4, 2, 3)

    close(channels_second(jax.jit(network.apply)(parameters, latents, text, timesteps)), "output_stock")
    weight = values["enhance_weight"]
    enhanced = jax.jit(lambda *inputs: network.apply(parameters, *inputs, attention_scale=noting(weight)))
    close(channels_second(enhanced(latents, text, timesteps)), "output_enhanced")
    jax.effects_barrier()
    np.testing.assert_allclose([value for _, value in sorted(factors)], io[f"{prefix}.layer_scores"], rtol=5e-6)
    frames = latents.shape[1]
    intensities = [value / (frames + weight) for _, value in sorted(factors)]
    active = io[f"{prefix}.layer_scores"] > 1
    expected = io[f"{prefix}.layer_cross_frame_intensity"]
    np.testing.assert_allclose(np.asarray(intensities)[active], expected[active], rtol=5e-6)

    @jax.jit
    def first_attention(latents, text, timesteps):
        model = network.bind(parameters)
        layout = model.layout(latents.shape[1:4], text.shape[1])
        context = model.context(timesteps, layout, attention_scale=hook(weight))
        block = model.blocks.layer(jax.tree.map(lambda leaf: leaf[0], model.blocks.variables()))
        x = model.embed(latents, text, layout)
        rows = block.attention_modulation(context.condition, context.is_video, x.dtype)
        context = dataclasses.replace(context, layer=jnp.int32(0))
        return block.attention(modulated_norm(block.attention_norm, x, rows.shift, rows.scale), context)

    attended = np.asarray(first_attention(*(jnp.asarray(array) for array in (latents, text, timesteps))))
    close(attended[:, : text.shape[1]], "layer0.attention_out_text")
    close(attended[:, text.shape[1] :], "layer0.attention_out_video")
