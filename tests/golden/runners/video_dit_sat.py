"""CogVideoX and RepVideo as the SAT code trains and runs them: what goes in and out of every layer, and the outputs."""

import functools
import re

import jax
import numpy as np
from case_fields import check_fields
from rounding import EPSILON, measured, within_rounding

from jvgen.models.video_dit.config import AggregationConfig, Positions, VideoDiTConfig
from jvgen.models.video_dit.model import VideoDiT
from jvgen.models.video_dit.probe import LayerActivations, probe_layers
from jvgen.models.video_dit.torch_map import sat_tables, weight_map_sat
from jvgen.nn.network import Network

GATES = "transformer.learnable_gating"
POSITIONS = "mixins.pos_embed.pos_embedding"
# Names of a layer's tensors there, and what of a `LayerActivations` they are.
LAYER_TENSORS = {"layer_out": "output", "layer_in": "read", "agg": "mean"}


def serves(name: str, config: dict) -> bool:
    return name.startswith("repvideo_dit")


def run(case) -> None:
    config, weights, io = network_config(case.config), dict(case.weights), case.io
    if config.aggregation is None:
        assert not np.any(weights.pop(GATES)), "the case is about a network without aggregation"
    network = Network.of(lambda rngs: VideoDiT(config, rngs=rngs))
    table = weight_map_sat(config, prefix="")
    parameters = table.from_torch(weights, network.shapes)
    back = dict(table.to_torch(parameters))
    for name, array in back.items():
        np.testing.assert_array_equal(array, weights[name], err_msg=name)
    assert set(weights) - set(back) <= {POSITIONS}
    # Sines and cosines of float64 there and here, of positions that were divided in float32.
    (positions,) = sat_tables(config, prefix="").values()
    np.testing.assert_allclose(positions, weights[POSITIONS], rtol=0, atol=EPSILON * max(positions.shape))

    visited = dict.fromkeys(io, False)
    with_other_epsilon = config.replace(output_norm_epsilon=config.norm_epsilon)
    as_diffusers = Network.of(lambda rngs: VideoDiT(with_other_epsilon, rngs=rngs))
    for variant in (name.removesuffix("x") for name in io if name == "x" or name.endswith(".x")):
        latents = io[f"{variant}x"].transpose(0, 1, 3, 4, 2)
        batch = len(latents)
        # Variants with an own clip share captions and timesteps with the main one.
        text, timesteps = (io.get(f"{variant}{name}", io[name][:batch]) for name in ("context", "timesteps"))
        for other, names in (
            (network, (f"{variant}output", f"diffusers_eps1e-6.{variant}output")),
            (as_diffusers, (f"diffusers.{variant}output",)),
        ):
            names = [name for name in names if name in io]
            if names:
                output, moves = measured(_outputs(other, timesteps), parameters, latents, text)
                for name in names:
                    within_rounding(output, io[name], moves, name)
                    visited[name] = True
        visited |= {f"{variant}{name}": True for name in ("x", "context", "timesteps")}

    look = functools.partial(_between, _look(network), io["timesteps"])
    found, moves = measured(look, parameters, io["x"].transpose(0, 1, 3, 4, 2), io["context"])
    for name, array in found.items():
        if name in io:
            within_rounding(array, io[name], moves[name], name)
            visited[name] = True
    if config.aggregation is not None and "group_size" in io:
        sizes = network.bind(parameters).aggregation.plan(config.layers).count
        np.testing.assert_array_equal(sizes, io["group_size"])
        visited["group_size"] = True
    assert all(visited.values()), f"not compared: {[name for name, seen in visited.items() if not seen]}"


def _outputs(network: Network, timesteps: np.ndarray):
    """The output, channels second, from parameters, latents and text."""
    apply = jax.jit(network.apply)
    return lambda parameters, latents, text: apply(parameters, latents, text, timesteps).transpose(0, 1, 4, 2, 3)


def _between(look, timesteps: np.ndarray, parameters, latents, text) -> dict:
    """Everything between the inputs and the output, by the names of the case."""
    condition, tokens, normed, views = look(parameters, latents, text, timesteps)
    found = {"time_emb": condition, "embedding": tokens, "final_layernorm_out": normed}
    for name, field in LAYER_TENSORS.items():
        found |= {f"{name}.{number:02d}": array for number, array in enumerate(views[field])}
    return found


def _look(network: Network):
    def keep(view: LayerActivations) -> dict[str, jax.Array]:
        return {field: getattr(view, field) for field in LAYER_TENSORS.values()}

    @jax.jit
    def look(parameters: dict, latents: jax.Array, text: jax.Array, timesteps: jax.Array) -> tuple:
        model = network.bind(parameters)
        layout = model.layout(latents.shape[1:4], text.shape[1])
        context = model.context(timesteps, layout)
        tokens = model.embed(latents, text, layout)
        last, views = probe_layers(model, tokens, context, keep)
        return context.condition, tokens, model.final_norm(last), views

    return look


def network_config(values: dict) -> VideoDiTConfig:
    made, derived, rule = values["constructor"]["params"], values["derived"], values["aggregation"]
    about = ("batch", "latent_frames", "diffusers_crosscheck")
    check_fields(values, "config.json", read=("constructor", "derived", "aggregation"), about=about)
    read = ("time_embed_dim", "num_frames", "time_compressed_rate", "latent_width", "latent_height", "num_layers",
            "patch_size", "in_channels", "out_channels", "hidden_size", "num_attention_heads", "modules")  # fmt: skip
    about, fixed = ("adm_in_channels", "transformer_args"), {"elementwise_affine": True, "dtype": "fp32"}
    check_fields(made, "constructor.params", read=read, about=about, fixed=fixed)
    parts = made["modules"]
    check_fields(
        parts, "constructor.params.modules", read=("pos_embed_config", "patch_embed_config", "adaln_layer_config"),
        fixed={"final_layer_config": {"target": "dit_video_concat.FinalLayerMixin"}},
    )  # fmt: skip
    attention = {"target": "dit_video_concat.AdaLNMixin", "params": {"qk_ln": True}}
    assert parts["adaln_layer_config"] == attention, f"adaln_layer_config = {parts['adaln_layer_config']}"
    transformer = {"layernorm_order": "pre", "model_parallel_size": 1, "is_decoder": False}
    about = ("checkpoint_activations", "vocab_size", "max_sequence_length", "skip_init")
    check_fields(made["transformer_args"], "transformer_args", about=about, fixed=transformer)
    positions, patches = parts["pos_embed_config"], parts["patch_embed_config"]
    assert "Basic3DPositionEmbedding" in positions["target"], positions["target"]
    scales = positions["params"]
    named = ("text_length", "height_interpolation", "width_interpolation", "time_interpolation")
    check_fields(scales, "pos_embed_config.params", read=named)
    check_fields(patches["params"], "patch_embed_config.params", read=("text_hidden_size",))
    assert derived["mlp_hidden"] % made["hidden_size"] == 0
    assert derived.get("mlp_activation", "gelu tanh approximation") == "gelu tanh approximation"
    rows, columns = (float(scales.get(name, 1.0)) for name in ("height_interpolation", "width_interpolation"))
    # A case without aggregation says so in words.
    aggregation = None
    if isinstance(rule, dict):
        period = int(re.search(r"i % (\d+) == 0", rule["reset_rule"]).group(1))
        aggregation = AggregationConfig(period=period)
    return VideoDiTConfig(
        aggregation=aggregation,
        layers=made["num_layers"],
        heads=made["num_attention_heads"],
        head_width=made["hidden_size"] // made["num_attention_heads"],
        in_channels=made["in_channels"],
        out_channels=made["out_channels"],
        patch=made["patch_size"],
        text_width=patches["params"]["text_hidden_size"],
        text_length=scales["text_length"],
        condition_width=made["time_embed_dim"],
        feed_forward_ratio=derived["mlp_hidden"] // made["hidden_size"],
        positions=Positions.SINCOS,
        sample_height=made["latent_height"],
        sample_width=made["latent_width"],
        sample_frames=(made["num_frames"] - 1) // made["time_compressed_rate"] + 1,
        spatial_scale=rows,
        column_scale=None if columns == rows else columns,
        temporal_scale=float(scales.get("time_interpolation", 1.0)),
        temporal_compression=made["time_compressed_rate"],
        norm_epsilon=derived["layernorm_epsilon_in_blocks_and_final_layernorm"],
        query_key_epsilon=derived["qk_layernorm_eps"],
        output_norm_epsilon=derived["final_layer_norm_final_eps"],
    )
