"""iVideoGPT's own code: its tokenizer, its sequence layout, its transformer with actions and rewards, its rollouts."""

import jax
import jax.numpy as jnp
import numpy as np
from case_fields import check_fields, tensors
from einops import rearrange
from rounding import SAFETY, compare, floor, measured, within_rounding

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
# Safety for sums over all pixels of all frames: the roundings of their terms have signs in common.
SUMS = 8 * SAFETY
KINDS = {"tokenizer", "layout", "transformer", "rollout"}
# Fields of all kinds of case that say how it was made.
ABOUT = ("system", "class", "case_kind", "dtype", "feat_limit", "out_limit", "detok_limit", "want_margins")


def serves(name: str, config: dict) -> bool:
    return config.get("system") == "iVideoGPT" and config.get("case_kind") in KINDS


def run(case) -> None:
    if case.config.get("dtype", "float32") != "float32":
        raise ValueError(f"dtype = {case.config['dtype']!r}: only float32 is supported.")
    {"tokenizer": tokenizer, "layout": layout, "transformer": transformer, "rollout": rollout}[
        case.config["case_kind"]
    ](case)


def channels_first(array: jax.Array) -> jax.Array:
    return rearrange(array, "... h w c -> ... c h w")


def channels_last(array: np.ndarray) -> np.ndarray:
    return rearrange(array, "... c h w -> ... h w c")


def network_of(constructor, config) -> Network:
    return Network.of(lambda rngs: constructor(config, rngs=rngs))


def expected_labels(layout: Layout, tokens: np.ndarray) -> np.ndarray:
    return np.where(layout.is_target, tokens, IGNORED)


def tokenizer_config(values: dict):
    made = {"in_channels", "out_channels", "down_block_types", "up_block_types", "block_out_channels",
            "layers_per_block", "act_fn", "latent_channels", "sample_size", "num_vq_embeddings", "norm_num_groups",
            "vq_embed_dim", "scaling_factor", "norm_type", "mid_block_add_attention", "lookup_from_codebook",
            "force_upcast", "num_dyn_embeddings", "context_length", "max_att_resolution", "resolution",
            "patch_size"}  # fmt: skip
    # `tokenizer_from_json` refuses values that the network does not support.
    check_fields(values, "init_args", read=made)
    return tokenizer_from_json({"_class_name": "CompressiveVQModel", **values})


# Tokenizer.


def tokenizer(case) -> None:
    check_fields(case.config, "config.json", read=("init_args", "param_order"), about=ABOUT)
    config = tokenizer_config(case.config["init_args"])
    network = network_of(CompressiveTokenizer, config)
    parameters = tokenizer_map(config).from_torch(case.weights, network.shapes)
    io = case.io
    video = jnp.asarray(channels_last(io["in.frames_uint8"]).astype(np.float32) / 255)
    layout = config.layout(video.shape[1])
    names = list(io)

    @jax.jit
    def detokenize(parameters, tokens):
        ids = Tokens(layout.context_ids(tokens), layout.future_ids(tokens))
        return channels_first(network.apply(parameters, ids, method="detokenize"))

    tokens = jax.jit(lambda p, x: network.apply(p, x, method="tokenize"))(parameters, video)
    np.testing.assert_array_equal(tokens.context, io["out.ctx_ids_raw"])
    np.testing.assert_array_equal(tokens.future, io["out.dyn_ids_raw"])
    flat = np.asarray(layout.flatten(*tokens))
    np.testing.assert_array_equal(flat, io["out.indices"])
    np.testing.assert_array_equal(expected_labels(layout, flat), io["out.labels"])
    compare(case, lambda p: {"out.detok": detokenize(p, flat)}, parameters)
    if "in.wild_indices" in names and any(name.startswith("out.detok_wild") for name in names):
        compare(case, lambda p: {"out.detok_wild": detokenize(p, io["in.wild_indices"])}, parameters)
    latents(network, parameters, video, case)
    if any(name.startswith("out.detok_cached_one") for name in names):
        cached(network, parameters, layout, case)
    if "out.total_l2" in names:
        training(network, parameters, config, video, case)
    if "out.ctx1_indices" in names:
        shorter_context(config, parameters, video, case)


def latents(network: Network, parameters, video: jax.Array, case) -> None:
    """Latents before quantization, and quantized ones."""

    @jax.jit
    def run(parameters, video):
        model = network.bind(parameters)
        count, grid = model.config.context_frames, model.config.grid
        context, conditions = model.encode_context(video[:, :count])
        future = model.encode_future(video[:, count:], conditions)
        quantized, quantized_future = model.context_codebook.quantize(context), model.future_codebook.quantize(future)
        return {
            "feat.tok.quant_conv": rearrange(context, "b t (h w) d -> (b t) d h w", h=grid),
            "feat.tok.quant_linear": rearrange(future, "b f m d -> (b f) m d"),
            # The straight-through sum rounds once more than a lookup.
            "out.quant_ctx": rearrange(quantized.vectors, "b t (h w) d -> (b t) d h w", h=grid),
            "out.quant_dyn": rearrange(quantized_future.vectors, "b f m d -> (b f) d m 1"),
        }

    compare(case, run, parameters, video)


def cached(network: Network, parameters, layout: Layout, case) -> None:
    """One frame decoded with conditions that were read before, as a rollout does."""
    start = layout.prompt_length + 1
    own = case.io["in.wild_indices"][:, start : start + layout.future_tokens]

    @jax.jit
    def run(parameters):
        model = network.bind(parameters)
        context, conditions = model.detokenize_context(layout.context_ids(jnp.asarray(case.io["out.indices"])))
        frame = model.detokenize_future(layout.clamp_future_codes(jnp.asarray(own))[:, None], conditions)
        return {"out.detok_cached_one": channels_first(jnp.concatenate([context, frame], axis=1))}

    compare(case, run, parameters)


def training(network: Network, parameters, config, video: jax.Array, case) -> None:
    """Losses, term by term, and the gradient of the squared-error total."""
    count = config.context_frames

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
        frames = {
            "fwd_dec": rearrange(made.future, "b f h w c -> (b f) c h w"),
            "fwd_ref_dec": rearrange(made.context, "b f h w c -> (b f) c h w"),
        }
        return losses["total_l2"], losses | frames

    differentiate = jax.jit(jax.value_and_grad(total, has_aux=True))

    def run(parameters):
        (_, results), gradient = differentiate(parameters)
        named = dict(tokenizer_map(config).to_torch(jax.tree.map(np.asarray, gradient)))
        order = case.config["param_order"]
        assert set(order) == set(named)
        norms = np.array([np.linalg.norm(named[name]) for name in order])
        return {f"out.{name}": value for name, value in results.items()} | {
            "grad.norms": norms, **{f"grad.{name}": value for name, value in named.items()},
        }  # fmt: skip

    compare(case, run, parameters, draws=1, safety=SUMS)


def shorter_context(config, parameters, video: jax.Array, case) -> None:
    """The same weights with one frame of context, a part of what they were made for."""
    shorter = config.replace(context_frames=1)
    network = network_of(CompressiveTokenizer, shorter)
    parameters = torch_map.adapt_tokenizer(parameters, config, shorter)
    skipped = config.context_frames - 1
    layout = shorter.layout(video.shape[1] - skipped)
    tokens = jax.jit(lambda p, x: network.apply(p, x, method="tokenize"))(parameters, video[:, skipped:])
    flat = np.asarray(layout.flatten(*tokens))
    np.testing.assert_array_equal(flat, case.io["out.ctx1_indices"])
    np.testing.assert_array_equal(expected_labels(layout, flat), case.io["out.ctx1_labels"])
    detokenize = jax.jit(lambda p: channels_first(network.apply(p, tokens, method="detokenize")))
    compare(case, lambda p: {"out.ctx1_detok": detokenize(p)}, parameters)


# Layout.


def layout(case) -> None:
    values, io = case.config, case.io
    read = ("layouts", "num_vq_embeddings", "num_dyn_embeddings", "llama_config", "head_args")
    check_fields(values, "config.json", read=read, about=(*ABOUT, "full_llama_config"))
    for name, context_frames in values["layouts"].items():
        context_ids, future_ids = (io[f"in.{name}.{kind}_ids"] for kind in ("ctx", "dyn"))
        grid = Layout(
            context_frames=context_frames, future_frames=future_ids.shape[1], context_tokens=context_ids.shape[2],
            future_tokens=future_ids.shape[2], context_codes=values["num_vq_embeddings"],
            future_codes=values["num_dyn_embeddings"],
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
        for ids, read_as in ((tokens, "detok_indices"), (given["wild"], "detok_wild")):
            np.testing.assert_array_equal(grid.context_ids(ids), io[f"out.{name}.{read_as}.ctx_ids"])
            np.testing.assert_array_equal(grid.future_ids(ids), io[f"out.{name}.{read_as}.dyn_ids"])
        np.testing.assert_array_equal(grid.future_slots, io[f"out.{name}.action_position"])
        np.testing.assert_array_equal(grid.action_frames, io[f"out.{name}.action_index"])
        np.testing.assert_array_equal(grid.reward_positions, io[f"out.{name}.reward_position"])
        mask = np.isin(np.arange(grid.length), grid.future_slots)
        np.testing.assert_array_equal(np.broadcast_to(mask, flat.shape), io[f"out.{name}.action_mask"])
        if "head_args" not in values:
            continue
        network, parameters = transformer_of(values, case.weights)
        actions = jnp.asarray(io[f"in.{name}.action"][:, grid.action_frames])

        def run(parameters, actions, network=network, grid=grid, tokens=tokens, name=name):
            model = network.bind(parameters)
            return {
                f"out.{name}.inputs_embeds": model.embed(tokens, grid, actions),
                f"out.{name}.loss": loss_terms(model, tokens, grid, actions=actions).cross_entropy,
            }

        compare(case, jax.jit(run), parameters, actions)


# Transformer.


def transformer_of(values: dict, weights, prefix: str = "") -> tuple[Network, dict]:
    heads = values["head_args"]
    about = ("prelude_tokens_num", "tokens_num_per_dyna", "context", "segment_length")
    read = ("action_dim", "reward_prediction", "action_recon")
    check_fields(heads, "head_args", read=read, about=about, fixed={"model_type": "llama"})
    llama = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
             "attention_bias", "mlp_bias", "head_dim", "rope_theta", "rope_scaling", "rope_parameters")  # fmt: skip
    # Dropout is for training; no id ends a sequence where these are outside the vocabulary.
    about = ("use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "attention_dropout",
             "pretraining_tp", "model_type", "torch_dtype", "architectures")  # fmt: skip
    check_fields(values["llama_config"], "llama_config", read=llama, about=about)
    config = transformer_from_json(
        {
            **values["llama_config"],
            "action_dim": heads["action_dim"],
            "reward_prediction": heads["reward_prediction"],
            "action_recon": heads["action_recon"] is not None,
        }
    )
    network = network_of(FrameTransformer, config)
    return network, transformer_map(config).from_torch(tensors(weights, prefix), network.shapes)


def transformer(case) -> None:
    values, io = case.config, case.io
    read = ("llama_config", "head_args", "num_vq_embeddings", "num_dyn_embeddings", "generation_margins")
    check_fields(values, "config.json", read=read, about=(*ABOUT, "full_llama_config"))
    network, parameters = transformer_of(values, case.weights)
    heads, tokens = values["head_args"], jnp.asarray(io["in.input_ids"], jnp.int32)
    # The prompt ends with the first slot of a future frame; each context frame has a slot but the first.
    context_tokens, rest = divmod(heads["prelude_tokens_num"] + 1, heads["context"])
    assert rest == 0, f"head_args.prelude_tokens_num = {heads['prelude_tokens_num']}: not whole context frames"
    grid = Layout(
        context_frames=heads["context"], future_frames=heads["segment_length"] - heads["context"],
        context_tokens=context_tokens - 1, future_tokens=heads["tokens_num_per_dyna"],
        context_codes=values["num_vq_embeddings"], future_codes=values["num_dyn_embeddings"],
    )  # fmt: skip
    assert grid.length == tokens.shape[1] and grid.prompt_length == heads["prelude_tokens_num"]
    actions = {name: io[f"in.{name}"][:, grid.action_frames] for name in ("action", "action2") if f"in.{name}" in io}
    tails = {name: io[name].shape[1] for name in io if name.endswith("_tail")}

    @jax.jit
    def run(parameters, actions):
        model = network.bind(parameters)
        hidden = model(tokens, grid, actions)
        parts = loss_terms(model, tokens, grid, actions=actions)
        plain = loss_terms(model, tokens, grid, actions=jnp.zeros_like(actions))
        found = {
            "out.inputs_embeds_tail": model.embed(tokens, grid, actions)[:, -tails["out.inputs_embeds_tail"] :],
            "out.hidden_last_tail": hidden[:, -tails["out.hidden_last_tail"] :],
            "out.logits": model.logits(hidden),
            "out.loss_ce": parts.cross_entropy,
            "out.loss_ce_zero_action": plain.cross_entropy,
            "out.loss_total": parts.cross_entropy,
        }
        if heads["action_recon"] is not None:
            found["out.action_recon_loss"] = parts.action_reconstruction
            found["out.loss_total"] += heads["action_recon"] * parts.action_reconstruction
        if heads["reward_prediction"]:
            found["out.reward_pred"] = model.rewards(hidden[:, grid.reward_positions])[..., None]
        return found

    compare(case, run, parameters, actions["action"])

    for name, given, forced in (
        ("gen_action", actions["action"], True),
        ("gen_action2", actions.get("action2"), True),
        ("gen_without_action", None, True),
        ("gen_free", None, False),
    ):
        if f"out.{name}" not in io:
            continue
        made = generate(network, parameters, grid, tokens, given, forced)
        np.testing.assert_array_equal(made, io[f"out.{name}"][:, grid.future_positions], err_msg=name)
    if "out.gen_action" in io:
        generated = jnp.asarray(io["out.gen_action"], jnp.int32)

        @jax.jit
        def forced_again(parameters, actions):
            model = network.bind(parameters)
            hidden = model(generated, grid, actions)
            tail = tails.get("out.gen_action_tf_logits_tail", 1)
            found = {"out.gen_action_tf_logits_tail": model.logits(hidden)[:, -tail:]}
            if heads["reward_prediction"]:
                found["out.gen_action_tf_reward"] = model.rewards(hidden[:, grid.reward_positions])[..., None]
            return found

        compare(case, forced_again, parameters, actions["action"])
    if "out.gen_free" in io and (io["out.gen_free"][:, grid.future_slots] == grid.future_slot).all():
        assert values["generation_margins"]["free"] > 0


def generate(network: Network, parameters, grid: Layout, tokens, actions, forced: bool):
    """Ids by decoding one by one, which decoding together repeats."""
    config = network.bind(parameters).config
    for parallel in (False, True):
        decoder = Decoder(config, grid, SamplingConfig(greedy=True, parallel=parallel), forced_slots=forced)
        keys = jax.random.split(jax.random.key(0), len(tokens))
        made = jax.jit(lambda p, t, a, d=decoder, k=keys: d.rollout(d.prepare(p), t, a, k))(
            parameters, tokens[:, : grid.prompt_length], actions
        )
        if parallel:
            np.testing.assert_array_equal(made[0], ids, err_msg="ids guessed together and one by one")
        ids = made[0]
    return ids


# Rollout.


def rollout(case) -> None:
    values, io = case.config, case.io
    read = ("tokenizer_init_args", "llama_config", "head_args", "symlog", "horizon")
    check_fields(values, "config.json", read=read, about=(*ABOUT, "full_llama_config"))
    config = tokenizer_config(values["tokenizer_init_args"])
    tokenizer_network = network_of(CompressiveTokenizer, config)
    read = tokenizer_map(config).from_torch(tensors(case.weights, "tokenizer."), tokenizer_network.shapes)
    network, parameters = transformer_of(values, case.weights, "model.")
    stacked = rearrange(io["in.obs"], "b (t c) h w -> b t h w c", c=config.channels) / 255
    context, actions = stacked[:, -config.context_frames :], io["in.action"]
    layout = config.layout(config.context_frames + values["horizon"])
    decoder = Decoder(network.bind(parameters).config, layout, SamplingConfig(greedy=True))
    keys = jax.random.split(jax.random.key(0), len(context))

    @jax.jit
    def run(read, parameters, context, actions):
        model = tokenizer_network.bind(read)
        ids = model.tokenize_context(context)
        made, rewards = decoder.rollout(decoder.prepare(parameters), layout.prompt(ids), actions, keys)
        _, conditions = model.detokenize_context(ids)
        return made, rewards, jnp.clip(model.detokenize_future(layout.clamp_future_codes(made), conditions), 0, 1)

    (ids, rewards, made), moves = measured(run, read, parameters, context, actions)
    np.testing.assert_array_equal(ids, io["out.tokens"][:, :, : layout.future_tokens])
    newest = rearrange(io["out.obss"], "b t (s c) h w -> b t s c h w", c=config.channels)[:, 1:, -1]
    within_rounding(channels_first(made), newest, moves[2], "out.obss", theirs_off=floor(values, "out.obss"))
    if not values["head_args"]["reward_prediction"]:
        return
    # Theirs are of before symexp, whose slope is at most the largest reward plus one.
    shown, slope = (symexp(rewards), 1 + float(np.abs(io["out.rewards"]).max())) if values["symlog"] else (rewards, 1.0)
    off = floor(values, "out.rewards")
    within_rounding(
        np.asarray(shown)[..., None], io["out.rewards"][:, 1:], slope * moves[1], "out.rewards", theirs_off=off
    )
    np.testing.assert_allclose(symlog(symexp(rewards)), rewards, rtol=1e-5)
