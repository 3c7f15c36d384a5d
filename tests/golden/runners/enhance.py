"""Enhance-A-Video's official code: scores alone, layouts of several networks, and a CogVideoX with it switched on."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
from case_fields import check_fields, tensors
from einops import rearrange
from rounding import EPSILON, measured, within_rounding

from jvgen.models.video_dit.enhance import EnhanceConfig, Enhancement
from jvgen.models.video_dit.model import TokenLayout, VideoDiT
from jvgen.models.video_dit.torch_map import from_diffusers_config, weight_map
from jvgen.nn.frame_diagonal import mean_diagonal
from jvgen.nn.modulation import modulated_norm
from jvgen.nn.network import Network

# The published arithmetic: one factor for the whole batch.
PUBLISHED = EnhanceConfig(share="batch")
# Of sums and quotients of numbers up to one.
CHAIN = 8 * EPSILON


def serves(name: str, config: dict) -> bool:
    return name.startswith("enhance")


def run(case) -> None:
    config, io = case.config, case.io
    check_fields(config, "config.json", read=("enhance_weights", "score", "layout", "models", "single_frame_result"))
    temperatures = config["enhance_weights"]
    for name, dtype in _scores(config, io).items():
        _score(tensors(io, f"score.{name}."), name, dtype, temperatures)
    _layouts(tensors(io, "layout."), config["layout"], temperatures)
    for name, made in config["models"].items():
        about = ("enhanced_modules_in_call_order", "num_frames_seen", "max_abs_effect")
        check_fields(made, f"models.{name}", read=("class", "constructor", "enhance_weight"), about=about)
        # Of the first layer; places and batch are one axis there, and queries were recorded with the scale in them.
        query, key = (io[f"model.{name}.layer0.{what}_positions"] for what in ("query", "key"))
        rows = [query * np.float32(query.shape[-1] ** 0.5), key]
        off = (query.shape[2] + made["enhance_weight"]) * _intensity_off(*rows, "float32").mean()
        factor = _factor(*_one_place(rows), made["enhance_weight"])
        np.testing.assert_allclose(factor, io[f"model.{name}.layer_scores"][0], rtol=CHAIN, atol=off, err_msg=name)
        # The others are networks that are not here: their attention was compared.
        if made["class"] == "CogVideoXTransformer3DModel":
            _network(case, name, made)


def _scores(config: dict, io) -> dict[str, str]:
    """Names and dtypes of the scores in the case, whatever their names and their number."""
    declared = config.get("score", [])
    declared = {score["name"]: score for score in declared} if isinstance(declared, list) else declared
    found = [
        name.removeprefix("score.").removesuffix(".query") for name in io if re.fullmatch(r"score\..*\.query", name)
    ]
    assert set(declared) <= set(found), f"score: {sorted(set(declared) - set(found))} have no tensors"
    # All but the dtype says how queries and keys were drawn, which are in the case.
    return {name: declared.get(name, {}).get("dtype", "float32") for name in found}


def _one_place(rows: list[np.ndarray]) -> tuple:
    rows = [rearrange(array, "p n f d -> p f n d") for array in rows]
    return *rows, TokenLayout(text=0, grid=(rows[0].shape[1], 1, 1))


def _factor(query, key, layout: TokenLayout, temperature: float) -> np.ndarray:
    hook = Enhancement(PUBLISHED, jnp.full((1,), temperature, jnp.float32))
    return np.asarray(hook(jnp.asarray(query), jnp.asarray(key), layout, jnp.int32(0)))[0, 0]


def _intensity_off(query: np.ndarray, key: np.ndarray, dtype: str) -> np.ndarray:
    """How far rounding may take the cross-frame intensity of each place: `places heads` from `places heads frames D`.

    Scaled queries and the products with keys are rounded to the dtype there and not here; both sum products in float32.
    With products off by d, an entry of the softmax is off by at most exp(2 d) - 1 of itself.
    """
    frames, width = query.shape[-2:]
    query, key = query.astype(np.float64) / width**0.5, key.astype(np.float64)
    added = np.abs(query) @ np.abs(np.swapaxes(key, -1, -2))
    roundings = EPSILON * (width + 4) + (0 if dtype == "float32" else float(jnp.finfo(dtype).eps))
    off = np.expm1(2 * roundings * added.max(axis=-1, keepdims=True)) + CHAIN
    products = query @ np.swapaxes(key, -1, -2)
    weights = np.exp(products - products.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    between = off * weights * (1 - np.eye(frames))
    # Ours are one minus the mean of the diagonal.
    return between.sum(axis=(-2, -1)) / (frames * max(frames - 1, 1)) + CHAIN / max(frames - 1, 1)


def _score(read: dict, name: str, dtype: str, temperatures: list[float]) -> None:
    given = [read["query"], read["key"]]
    query, key, layout = _one_place(given)
    query, key = jnp.asarray(query, dtype), jnp.asarray(key, dtype)
    frames = layout.grid[0]
    if frames == 1:
        # Theirs divide zero by zero.
        assert np.isnan(read["enhance_scores"]).all(), name
        assert all(_factor(query, key, layout, temperature) == 1 for temperature in temperatures), name
        return
    off = _intensity_off(*given, dtype)
    diagonal = mean_diagonal(query, key, frames=frames, start=layout.text, stop=layout.valid)
    between = np.asarray((1 - diagonal) / (frames - 1), np.float64)
    expected = read["cross_frame_mean_per_position"].reshape(between.shape)
    _within(between, expected, off, f"{name}.cross_frame_mean_per_position")
    _within(between.mean(), read["cross_frame_intensity"], off.mean(), f"{name}.cross_frame_intensity")
    if "attention" in read:
        own = np.diagonal(read["attention"], axis1=1, axis2=2).mean(axis=1).reshape(between.shape)
        _within(between * (frames - 1), 1 - own, off * (frames - 1), f"{name}.attention")
    for temperature, factor in zip(temperatures, read["enhance_scores"], strict=True):
        ours, allowed = (
            _factor(query, key, layout, temperature),
            abs(frames + temperature) * off.mean() + CHAIN * factor,
        )
        _within(ours, factor, allowed, f"{name} at {temperature}")


def _within(ours, theirs, bound, what: str) -> None:
    excess = np.abs(np.asarray(ours, np.float64) - theirs) / bound
    assert np.max(excess) <= 1, f"{what}: {np.max(excess)} times what rounding explains"


def _layouts(io: dict, sizes: dict, temperatures: list[float]) -> None:
    check_fields(sizes, "layout", read=("T", "S", "L"), about=("B", "N", "C"))
    grid = (sizes["T"], 1, sizes["S"])
    rows = {name: rearrange(io[name], "b n l d -> b l n d") for name in
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
    unknown = set(io) - set(rows) - set(layouts)
    assert not unknown, f"layout: {sorted(unknown)} are not known to the runner"
    places = [rearrange(io[f"video_{what}"], "b n (t s) d -> (b s) n t d", t=sizes["T"]) for what in ("query", "key")]
    off = _intensity_off(*places, "float32").mean()
    for name, (order, layout) in layouts.items():
        if name not in io:
            continue
        for temperature, factor in zip(temperatures, io[name], strict=True):
            ours = _factor(with_text("query", order), with_text("key", order), layout, temperature)
            allowed = abs(sizes["T"] + temperature) * off + CHAIN * factor
            _within(ours, factor, allowed, f"{name} at {temperature}")


def _network(case, name: str, values: dict) -> None:
    io = tensors(case.io, f"model.{name}.")
    made = values["constructor"]
    assert made.get("patch_size_t") is None, "constructor.patch_size_t: theirs takes patches of time for places"
    assert made.get("dropout", 0.0) == 0, "constructor.dropout: theirs ran without"
    config = from_diffusers_config(made)
    network = Network.of(lambda rngs: VideoDiT(config, rngs=rngs))
    parameters = weight_map(config).from_torch(tensors(case.weights, f"{name}/"), network.shapes)
    latents = io["in.hidden_states"].transpose(0, 1, 3, 4, 2)
    text, timesteps = io["in.encoder_hidden_states"], jnp.float32(io["in.timestep"])
    weight, inputs = values["enhance_weight"], (parameters, latents, text)
    factors: list[tuple[int, float]] = []
    hook = Enhancement(PUBLISHED, jnp.full((config.layers,), weight, jnp.float32))

    def noting(*seen):
        factor = hook(*seen)
        jax.debug.callback(lambda number, value: factors.append((int(number), float(value))), seen[-1], factor[0, 0])
        return factor

    plain = jax.jit(lambda parameters, latents, text: network.apply(parameters, latents, text, timesteps))
    scaled = jax.jit(
        lambda parameters, latents, text: network.apply(parameters, latents, text, timesteps, attention_scale=noting)
    )

    def with_factors(parameters, latents, text) -> tuple[jax.Array, np.ndarray]:
        factors.clear()
        output = scaled(parameters, latents, text)
        jax.effects_barrier()
        return output, np.array([value for _, value in sorted(factors)])

    @jax.jit
    def first_attention(parameters, latents, text):
        model = network.bind(parameters)
        layout = model.layout(latents.shape[1:4], text.shape[1])
        context = model.context(timesteps, layout, attention_scale=hook)
        block = model.blocks.layer(jax.tree.map(lambda leaf: leaf[0], model.blocks.variables()))
        x = model.embed(latents, text, layout)
        rows = block.attention_modulation(context.condition, context.is_video, x.dtype)
        context = dataclasses.replace(context, layer=jnp.int32(0))
        attended = block.attention(modulated_norm(block.attention_norm, x, rows.shift, rows.scale), context)
        return attended[:, : text.shape[1]], attended[:, text.shape[1] :]

    def channels_second(output) -> np.ndarray:
        return np.asarray(output).transpose(0, 1, 4, 2, 3)

    output, moves = measured(plain, *inputs)
    within_rounding(channels_second(output), io["output_stock"], moves, "output_stock")
    (output, found), (moves, factors_move) = measured(with_factors, *inputs)
    within_rounding(channels_second(output), io["output_enhanced"], moves, "output_enhanced")
    within_rounding(found, io["layer_scores"], factors_move, "layer_scores")
    frames = latents.shape[1]
    active = io["layer_scores"] > 1
    intensities, off = found / (frames + weight), factors_move / (frames + weight)
    within_rounding(intensities[active], io["layer_cross_frame_intensity"][active], off, "layer_cross_frame_intensity")
    for kind, ours, move in zip(("text", "video"), *measured(first_attention, *inputs), strict=True):
        within_rounding(ours, io[f"layer0.attention_out_{kind}"], move, f"layer0.attention_out_{kind}")
