"""CogVideoX and RepVideo as the SAT code trains and runs them: what goes in and out of every layer, and the outputs."""

import functools
import re

import jax
import numpy as np

from jvgen.models.video_dit.config import AggregationConfig, Positions, VideoDiTConfig
from jvgen.models.video_dit.model import VideoDiT
from jvgen.models.video_dit.probe import LayerActivations, probe_layers
from jvgen.models.video_dit.torch_map import weight_map_sat
from jvgen.nn.network import Network

GATES = "transformer.learnable_gating"
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
    check = functools.partial(_check, case)
    back = dict(table.to_torch(parameters))
    for name, array in back.items():
        np.testing.assert_array_equal(array, weights[name], err_msg=name)
    assert set(weights) - set(back) <= {"mixins.pos_embed.pos_embedding"}

    visited = dict.fromkeys(io, False)
    denoise = jax.jit(network.apply)
    as_diffusers = Network.of(lambda rngs: VideoDiT(config.replace(output_norm_epsilon=config.norm_epsilon), rngs=rngs))
    for variant in (name.removesuffix("x") for name in io if name == "x" or name.endswith(".x")):
        latents = io[f"{variant}x"].transpose(0, 1, 3, 4, 2)
        batch = len(latents)
        # Variants with an own clip share captions and timesteps with the main one.
        inputs = (latents, io["context"][:batch], io["timesteps"][:batch])
        output = denoise(parameters, *inputs).transpose(0, 1, 4, 2, 3)
        # Ours are off by 5e-7; the wrong epsilon in the last norm is off by 4e-6.
        names = [f"{variant}output", f"diffusers_eps1e-6.{variant}output"]
        visited |= {name: check(name, output, 2e-6) for name in names if name in io}
        name = f"diffusers.{variant}output"
        if name in io:
            output = jax.jit(as_diffusers.apply)(parameters, *inputs).transpose(0, 1, 4, 2, 3)
            visited[name] = check(name, output, 2e-6)
        visited |= dict.fromkeys((f"{variant}x", "context", "timesteps"), True)

    for name, array in layers(network, config, parameters, io).items():
        if name in io:
            visited[name] = check(name, array, 3e-6)
    assert all(visited.values()), f"not compared: {[name for name, seen in visited.items() if not seen]}"


def layers(network: Network, config: VideoDiTConfig, parameters: dict, io: dict) -> dict[str, np.ndarray]:
    """Everything between the inputs and the output, by the names of the case."""

    @jax.jit
    def look(parameters: dict, latents: jax.Array, text: jax.Array, timesteps: jax.Array) -> tuple:
        model = network.bind(parameters)
        layout = model.layout(latents.shape[1:4], text.shape[1])
        context = model.context(timesteps, layout)
        tokens = model.embed(latents, text, layout)
        last, views = probe_layers(model, tokens, context, keep)
        return context.condition, tokens, model.final_norm(last), views

    def keep(view: LayerActivations) -> dict[str, jax.Array]:
        return {field: getattr(view, field) for field in LAYER_TENSORS.values()}

    latents = io["x"].transpose(0, 1, 3, 4, 2)
    condition, tokens, normed, views = look(parameters, latents, io["context"], io["timesteps"])
    found = {"time_emb": condition, "embedding": tokens, "final_layernorm_out": normed}
    for name, field in LAYER_TENSORS.items():
        found |= {f"{name}.{number:02d}": array for number, array in enumerate(views[field])}
    if config.aggregation is not None:
        found["group_size"] = network.bind(parameters).aggregation.plan(config.layers).count
    return found


def _check(case, name: str, ours, tolerance: float) -> bool:
    expected = case.io[name]
    atol = tolerance * np.abs(expected).max()
    np.testing.assert_allclose(ours, expected, atol=atol, rtol=0, err_msg=f"{case.name} {name}")
    return True


def network_config(values: dict) -> VideoDiTConfig:
    made, derived = values["constructor"]["params"], values["derived"]
    positions = made["modules"]["pos_embed_config"]
    assert "Basic3DPositionEmbedding" in positions["target"], positions["target"]
    scales = positions["params"]
    assert scales["height_interpolation"] == scales["width_interpolation"]
    assert derived["mlp_hidden"] % made["hidden_size"] == 0
    # A case without aggregation says so in words.
    rule = values["aggregation"]
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
        text_width=made["modules"]["patch_embed_config"]["params"]["text_hidden_size"],
        text_length=scales["text_length"],
        condition_width=made["time_embed_dim"],
        feed_forward_ratio=derived["mlp_hidden"] // made["hidden_size"],
        positions=Positions.SINCOS,
        sample_height=made["latent_height"],
        sample_width=made["latent_width"],
        sample_frames=(made["num_frames"] - 1) // made["time_compressed_rate"] + 1,
        spatial_scale=scales["height_interpolation"],
        temporal_scale=scales.get("time_interpolation", 1.0),
        temporal_compression=made["time_compressed_rate"],
        norm_epsilon=derived["layernorm_epsilon_in_blocks_and_final_layernorm"],
        query_key_epsilon=derived["qk_layernorm_eps"],
        output_norm_epsilon=derived["final_layer_norm_final_eps"],
    )
