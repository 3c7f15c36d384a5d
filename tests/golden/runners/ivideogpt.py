"""iVideoGPT's own code: its tokenizer, its sequence layout, its transformer with actions and rewards, its rollouts."""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from jvgen.models.ivideogpt import torch_map
from jvgen.models.ivideogpt.decoding import Decoder
from jvgen.models.ivideogpt.layout import Layout
from jvgen.models.ivideogpt.objective import loss_terms, symexp, symlog
from jvgen.models.ivideogpt.sampling import SamplingConfig
from jvgen.models.ivideogpt.tokenizer import CompressiveTokenizer, Tokens
from jvgen.models.ivideogpt.tokenizer_map import tokenizer_from_json, tokenizer_map
from jvgen.models.ivideogpt.transformer import FrameTransformer
from jvgen.models.ivideogpt.transformer_map import transformer_from_json, transformer_map
from jvgen.nn.network import Network

IGNORED = -100
KINDS = {"tokenizer", "layout", "transformer", "rollout"}


def serves(name: str, config: dict) -> bool:
    return config.get("system") == "iVideoGPT" and config.get("case_kind") in KINDS


def run(case) -> None:
    # Cases are of float32 runs whose own rounding, against float64, is up to 6e-5 for logits and 1e-5 for pixels.
    {"tokenizer": tokenizer, "layout": layout, "transformer": transformer, "rollout": rollout}[
        case.config["case_kind"]
    ](case)


def close(actual, expected, what: str, tolerance: float = 1e-5) -> None:
    """Within a share of the largest expected value (at least 1)."""
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(actual, expected, atol=tolerance * scale, rtol=0, err_msg=what)


def channels_last(array: np.ndarray) -> np.ndarray:
    return rearrange(array, "... c h w -> ... h w c")


def network_of(constructor, config) -> Network:
    return Network.of(lambda rngs: constructor(config, rngs=rngs))


def expected_labels(layout: Layout, tokens: np.ndarray) -> np.ndarray:
    return np.where(layout.is_target, tokens, IGNORED)


# Tokenizer.


def tokenizer(case) -> None:
    config = tokenizer_from_json({"_class_name": "CompressiveVQModel", **case.config["init_args"]})
    network = network_of(CompressiveTokenizer, config)
    parameters = tokenizer_map(config).from_torch(case.weights, network.shapes)
    io = case.io
    video = jnp.asarray(channels_last(io["in.frames_uint8"]).astype(np.float32) / 255)
    layout = config.layout(video.shape[1])
    names = list(io)

    def detokenize(parameters, tokens):
        ids = Tokens(layout.context_ids(tokens), layout.future_ids(tokens))
        return network.apply(parameters, ids, method="detokenize")

    run_detokenize = jax.jit(detokenize)
    tokens = jax.jit(lambda p, x: network.apply(p, x, method="tokenize"))(parameters, video)
    np.testing.assert_array_equal(tokens.context, io["out.ctx_ids_raw"])
    np.testing.assert_array_equal(tokens.future, io["out.dyn_ids_raw"])
    flat = np.asarray(layout.flatten(*tokens))
    np.testing.assert_array_equal(flat, io["out.indices"])
    np.testing.assert_array_equal(expected_labels(layout, flat), io["out.labels"])
    frames(run_detokenize(parameters, flat), io, "out.detok")
    if "in.wild_indices" in names and any(name.startswith("out.detok_wild") for name in names):
        frames(run_detokenize(parameters, io["in.wild_indices"]), io, "out.detok_wild")
    latents(network, parameters, video, io)
    if any(name.startswith("out.detok_cached_one") for name in names):
        cached(network, parameters, layout, io)
    if "out.total_l2" in names:
        training(network, parameters, config, video, case)
    if "out.ctx1_indices" in names:
        shorter_context(config, parameters, video, io)


def frames(made: jax.Array, io, name: str) -> None:
    """Compare clips with what is kept of theirs: every nth row and column."""
    (found,) = [key for key in io if key == name or key.startswith(f"{name}.sub")]
    step = int(found.rpartition(".sub")[2]) if ".sub" in found else 1
    close(np.asarray(made)[..., ::step, ::step, :], channels_last(io[found]), f"{name}", 2e-5)


def latents(network: Network, parameters, video: np.ndarray, io) -> None:
    """Latents before quantization, and quantized ones."""

    def run(parameters, video):
        model = network.bind(parameters)
        count = model.config.context_frames
        context, conditions = model.encode_context(video[:, :count])
        future = model.encode_future(video[:, count:], conditions)
        return context, future, model.context_codebook.quantize(context), model.future_codebook.quantize(future)

    context, future, quantized, quantized_future = jax.jit(run)(parameters, video)
    grid = int(round(context.shape[2] ** 0.5))
    close(rearrange(context, "b t (h w) d -> (b t) d h w", h=grid), io["feat.tok.quant_conv"], "quant_conv")
    close(rearrange(future, "b f m d -> (b f) m d"), io["feat.tok.quant_linear"], "quant_linear")
    # The straight-through sum rounds once more than a lookup.
    close(rearrange(quantized.vectors, "b t (h w) d -> (b t) d h w", h=grid), io["out.quant_ctx"], "quant_ctx")
    close(rearrange(quantized_future.vectors, "b f m d -> (b f) d m 1"), io["out.quant_dyn"], "quant_dyn")


def cached(network: Network, parameters, layout: Layout, io) -> None:
    """One frame decoded with conditions that were read before, as a rollout does."""
    start = layout.prompt_length + 1
    own = io["in.wild_indices"][:, start : start + layout.future_tokens]

    def run(parameters, tokens, own):
        model = network.bind(parameters)
        context, conditions = model.detokenize_context(layout.context_ids(tokens))
        frame = model.detokenize_future(layout.clamp_future_codes(own)[:, None], conditions)
        return jnp.concatenate([context, frame], axis=1)

    frames(jax.jit(run)(parameters, io["out.indices"], own), io, "out.detok_cached_one")


def training(network: Network, parameters, config, video: np.ndarray, case) -> None:
    """Losses, term by term, and the gradient of the squared-error total."""
    io, count = case.io, config.context_frames

    def total(parameters):
        made = network.apply(parameters, video)
        past, future = made.context - video[:, :count], made.future - video[:, count:]
        losses = {
            "commit_loss": made.context_codes.loss,
            "dyn_commit_loss": made.future_codes.loss,
            "recon_l1": jnp.mean(jnp.abs(future)),
            "ref_recon_l1": jnp.mean(jnp.abs(past)),
            "recon_l2": jnp.mean(jnp.square(future)),
            "ref_recon_l2": jnp.mean(jnp.square(past)),
        }
        codes = losses["commit_loss"] + losses["dyn_commit_loss"]
        losses["total_no_lpips"] = losses["recon_l1"] + losses["ref_recon_l1"] + codes
        losses["total_l2"] = losses["recon_l2"] + losses["ref_recon_l2"] + codes
        return losses["total_l2"], (losses, made.context, made.future)

    (_, (losses, context, future)), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(parameters)
    for name, value in losses.items():
        np.testing.assert_allclose(value, io[f"out.{name}"], rtol=2e-6, err_msg=name)
    frames(rearrange(future, "b f h w c -> (b f) h w c"), io, "out.fwd_dec")
    frames(rearrange(context, "b f h w c -> (b f) h w c"), io, "out.fwd_ref_dec")
    named = dict(tokenizer_map(config).to_torch(jax.tree.map(np.asarray, gradient)))
    order = case.config["param_order"]
    assert set(order) == set(named)
    norms = np.array([np.linalg.norm(named[name]) for name in order])
    # Gradients of biases before a norm are zero up to rounding.
    np.testing.assert_allclose(norms, io["grad.norms"], rtol=3e-4, atol=1e-5 * io["grad.norms"].max())
    for name in io:
        if name.startswith("grad.") and name != "grad.norms":
            expected = io[name]
            close(
                named[name.removeprefix("grad.")] / np.abs(expected).max(),
                expected / np.abs(expected).max(),
                name,
                2e-4,
            )


def shorter_context(config, parameters, video: np.ndarray, io) -> None:
    """The same weights with one frame of context less."""
    shorter = config.replace(context_frames=1)
    network = network_of(CompressiveTokenizer, shorter)
    parameters = torch_map.adapt_tokenizer(parameters, config, shorter)
    layout = shorter.layout(video.shape[1] - 1)
    tokens = jax.jit(lambda p, x: network.apply(p, x, method="tokenize"))(parameters, video[:, 1:])
    flat = np.asarray(layout.flatten(*tokens))
    np.testing.assert_array_equal(flat, io["out.ctx1_indices"])
    np.testing.assert_array_equal(expected_labels(layout, flat), io["out.ctx1_labels"])
    frames(jax.jit(lambda p, t: network.apply(p, t, method="detokenize"))(parameters, tokens), io, "out.ctx1_detok")


# Layout.


def layout(case) -> None:
    values, io = case.config, case.io
    for name, context_frames in values["layouts"].items():
        future_frames = io[f"in.{name}.dyn_ids"].shape[1]
        grid = Layout(
            context_frames=context_frames, future_frames=future_frames, context_tokens=256, future_tokens=16,
            context_codes=values["num_vq_embeddings"], future_codes=values["num_dyn_embeddings"],
        )  # fmt: skip
        given = {key: jnp.asarray(io[f"in.{name}.{key}"], jnp.int32) for key in ("ctx_ids", "dyn_ids", "wild")}
        flat = np.asarray(grid.flatten(given["ctx_ids"], given["dyn_ids"]))
        np.testing.assert_array_equal(flat, io[f"out.{name}.indices"])
        np.testing.assert_array_equal(expected_labels(grid, flat), io[f"out.{name}.labels"])
        shifted = np.append(expected_labels(grid, flat)[:, 1:], np.full((len(flat), 1), IGNORED), axis=1)
        np.testing.assert_array_equal(shifted, io[f"out.{name}.loss_targets"])
        tokens = jnp.asarray(flat)
        targets, where = grid.targets(tokens)
        np.testing.assert_array_equal(targets, shifted[:, where])
        for ids, read in ((tokens, "detok_indices"), (given["wild"], "detok_wild")):
            np.testing.assert_array_equal(grid.context_ids(ids), io[f"out.{name}.{read}.ctx_ids"])
            np.testing.assert_array_equal(grid.future_ids(ids), io[f"out.{name}.{read}.dyn_ids"])
        np.testing.assert_array_equal(grid.future_slots, io[f"out.{name}.action_position"])
        np.testing.assert_array_equal(grid.action_frames, io[f"out.{name}.action_index"])
        np.testing.assert_array_equal(grid.reward_positions, io[f"out.{name}.reward_position"])
        mask = np.isin(np.arange(grid.length), grid.future_slots)
        np.testing.assert_array_equal(np.broadcast_to(mask, flat.shape), io[f"out.{name}.action_mask"])
        if "head_args" not in values:
            continue
        network, parameters = transformer_of(values, case.weights)
        tokens, actions = jnp.asarray(flat), jnp.asarray(io[f"in.{name}.action"][:, grid.action_frames])
        embedded = network.apply(parameters, tokens, grid, actions, method="embed")
        close(embedded, io[f"out.{name}.inputs_embeds"], "inputs_embeds", 1e-6)
        loss = jax.jit(lambda p, t, a, n=network, g=grid: loss_terms(n.bind(p), t, g, actions=a).cross_entropy)
        np.testing.assert_allclose(loss(parameters, tokens, actions), io[f"out.{name}.loss"], rtol=1e-6)


# Transformer.


def transformer_of(values: dict, weights, prefix: str = "") -> tuple[Network, dict]:
    heads = values["head_args"]
    config = transformer_from_json(
        {
            **values["llama_config"],
            "action_dim": heads["action_dim"],
            "reward_prediction": heads["reward_prediction"],
            "action_recon": heads["action_recon"] is not None,
        }
    )
    network = network_of(FrameTransformer, config)
    found = {name.removeprefix(prefix): weights[name] for name in weights if name.startswith(prefix)}
    return network, transformer_map(config).from_torch(found, network.shapes)


def transformer(case) -> None:
    values, io = case.config, case.io
    network, parameters = transformer_of(values, case.weights)
    heads, tokens = values["head_args"], io["in.input_ids"].astype(np.int32)
    grid = Layout(
        context_frames=heads["context"], future_frames=heads["segment_length"] - heads["context"], context_tokens=256,
        future_tokens=heads["tokens_num_per_dyna"], context_codes=values["num_vq_embeddings"],
        future_codes=values["num_dyn_embeddings"],
    )  # fmt: skip
    assert grid.length == tokens.shape[1] and grid.prompt_length == heads["prelude_tokens_num"]
    actions = {name: io[f"in.{name}"][:, grid.action_frames] for name in ("action", "action2")}

    def run(parameters, tokens, actions):
        model = network.bind(parameters)
        hidden = model(tokens, grid, actions)
        rewards = model.rewards(hidden[:, grid.reward_positions])
        rest = loss_terms(model, tokens, grid, actions=actions)
        plain = loss_terms(model, tokens, grid, actions=jnp.zeros_like(actions))
        return model.embed(tokens, grid, actions), hidden, model.logits(hidden), rewards, rest, plain

    embedded, hidden, logits, rewards, parts, zero = jax.jit(run)(parameters, tokens, actions["action"])
    tail = io["out.hidden_last_tail"].shape[1]
    close(embedded[:, -tail:], io["out.inputs_embeds_tail"], "inputs_embeds", 1e-6)
    close(hidden[:, -tail:], io["out.hidden_last_tail"], "hidden")
    close(logits, io["out.logits"], "logits")
    close(rewards[..., None], io["out.reward_pred"], "rewards")
    np.testing.assert_allclose(parts.cross_entropy, io["out.loss_ce"], rtol=2e-6)
    np.testing.assert_allclose(zero.cross_entropy, io["out.loss_ce_zero_action"], rtol=2e-6)
    np.testing.assert_allclose(parts.action_reconstruction, io["out.action_recon_loss"], rtol=2e-6)
    total = parts.cross_entropy + heads["action_recon"] * parts.action_reconstruction
    np.testing.assert_allclose(total, io["out.loss_total"], rtol=2e-6)

    for name, given, forced in (
        ("gen_action", actions["action"], True),
        ("gen_action2", actions["action2"], True),
        ("gen_without_action", None, True),
        ("gen_free", None, False),
    ):
        made, of_frames = generate(network, parameters, grid, tokens, given, forced)
        expected = io[f"out.{name}"]
        np.testing.assert_array_equal(made, expected[:, grid.future_positions], err_msg=name)
        if name == "gen_action":
            close(of_frames[..., None], io["out.gen_action_tf_reward"], "rewards of what was generated")
    free = io["out.gen_free"]
    if (free[:, grid.future_slots] == grid.future_slot).all():
        assert values["generation_margins"]["free"] > 0


def generate(network: Network, parameters, grid: Layout, tokens, actions, forced: bool):
    config = network.bind(parameters).config
    for parallel in (False, True):
        decoder = Decoder(config, grid, SamplingConfig(greedy=True, parallel=parallel), forced_slots=forced)
        keys = jax.random.split(jax.random.key(0), len(tokens))
        made = jax.jit(lambda p, t, a, d=decoder, k=keys: d.rollout(d.prepare(p), t, a, k))(
            parameters, tokens[:, : grid.prompt_length], actions
        )
        if parallel:
            np.testing.assert_array_equal(made[0], ids, err_msg="ids guessed together and one by one")
        ids, rewards = made
    return ids, rewards


# Rollout.


def rollout(case) -> None:
    values, io = case.config, case.io
    config = tokenizer_from_json({"_class_name": "CompressiveVQModel", **values["tokenizer_init_args"]})
    tokenizer_network = network_of(CompressiveTokenizer, config)
    tokenizer_weights = {
        n.removeprefix("tokenizer."): case.weights[n] for n in case.weights if n.startswith("tokenizer.")
    }
    read = tokenizer_map(config).from_torch(tokenizer_weights, tokenizer_network.shapes)
    network, parameters = transformer_of(values, case.weights, "model.")
    stacked = rearrange(io["in.obs"], "b (t c) h w -> b t h w c", c=3) / 255
    context, actions = stacked[:, -config.context_frames :], io["in.action"]
    layout = config.layout(config.context_frames + values["horizon"])
    decoder = Decoder(network.bind(parameters).config, layout, SamplingConfig(greedy=True))

    def run(read, parameters, context, actions):
        model = tokenizer_network.bind(read)
        ids = model.tokenize_context(context)
        keys = jax.random.split(jax.random.key(0), len(context))
        made, rewards = decoder.rollout(decoder.prepare(parameters), layout.prompt(ids), actions, keys)
        _, conditions = model.detokenize_context(ids)
        return made, rewards, jnp.clip(model.detokenize_future(layout.clamp_future_codes(made), conditions), 0, 1)

    ids, rewards, made = jax.jit(run)(read, parameters, context, actions)
    np.testing.assert_array_equal(ids, io["out.tokens"][:, :, : layout.future_tokens])
    rewards = symexp(rewards) if values["symlog"] else rewards
    close(np.asarray(rewards)[..., None], io["out.rewards"][:, 1:], "rewards", 2e-5)
    newest = channels_last(rearrange(io["out.obss"], "b t (s c) h w -> b t s c h w", c=3)[:, 1:, -1])
    close(made, newest, "frames", 2e-5)
    np.testing.assert_allclose(symlog(symexp(rewards)), rewards, rtol=1e-5)
