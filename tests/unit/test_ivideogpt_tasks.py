"""Training tasks of iVideoGPT: terms of the losses and their inputs, restarts of dead codes, evaluation, bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvgen.config import ConfigError, validate_tree
from jvgen.data.store.records import Record
from jvgen.data.store.writer import Writer
from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig
from jvgen.data.stream.segments import SegmentConfig
from jvgen.interop.to_torch import export_network
from jvgen.losses.perceptual import PerceptualConfig
from jvgen.models.clip_discriminator.config import ClipDiscriminatorConfig
from jvgen.models.ivideogpt.config import CompressiveTokenizerConfig, FrameTransformerConfig
from jvgen.models.ivideogpt.objective import symlog
from jvgen.models.ivideogpt.sampling import SamplingConfig
from jvgen.models.ivideogpt.transformer import FrameTransformer
from jvgen.nested import flatten
from jvgen.nn.network import Network
from jvgen.parallel.axes import LAYERS
from jvgen.saved_config import from_json, to_json
from jvgen.tasks.adversarial import AdversarialConfig
from jvgen.tasks.task import SampleRequest
from jvgen.tasks.video_tokenizer import RestartConfig, VideoTokenizerConfig
from jvgen.tasks.world_model import WorldModelConfig
from jvgen.training.optimization.optimizer import OptimizerConfig, _decays, make_schedule
from jvgen.training.step import accumulate
from jvgen.training.telemetry.metrics import to_host

NETWORK = CompressiveTokenizerConfig(
    resolution=16, block_channels=(8, 16), layers_per_block=1, groups=4, latent_channels=4, code_width=3,
    context_codes=18, future_codes=12, attention_side=8, attention_groups=4,
)  # fmt: skip
TOKENIZER = VideoTokenizerConfig(network=NETWORK, perceptual=PerceptualConfig(levels=2), perceptual_weight=0.5)
TRANSFORMER = FrameTransformerConfig(
    vocabulary=32, width=24, layers=1, heads=3, hidden=40, max_positions=256, action_width=2, reward=True
)
WORLD = WorldModelConfig(
    transformer=TRANSFORMER, tokenizer=NETWORK, tokenizer_weights="nowhere", sampling=SamplingConfig(top_k=8),
    evaluation_samples=2, visualize_clips=2, perceptual=PerceptualConfig(levels=2),
)  # fmt: skip
BUCKET = BucketConfig(frames=5, height=16, width=16, batch_size=4)


def batch_of(task, bucket: BucketConfig = BUCKET) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    batch = {"slot": jnp.arange(bucket.batch_size, dtype=jnp.int32)}
    for name, spec in task.fields(bucket).items():
        shape = (bucket.batch_size, *spec.shape)
        drawn = rng.integers(0, 256, shape) if spec.dtype == np.uint8 else rng.normal(size=shape)
        batch[name] = jnp.asarray(drawn.astype(spec.dtype))
    return batch


pytestmark = pytest.mark.usefixtures("quick_compilations")


def drawn(task, scale: float = 0.2) -> dict:
    """Random parameters: initializers would take longer to compile than everything tested here."""
    rng = np.random.default_rng(7)
    leaves, structure = jax.tree.flatten({name: network.shapes for name, network in sorted(task.networks.items())})
    values = [scale * rng.standard_normal(s.shape) + (s.ndim == 1) for s in leaves]
    return structure.unflatten([jnp.asarray(value, jnp.float32) for value in values])


@functools.cache
def loss_of(config):
    task = config.build()
    return jax.jit(
        lambda p, f, b, k, n: accumulate(lambda _, some: task.loss(p, f, some, k), {}, b, n)[0], static_argnums=4
    )


# Tokenizer.


@pytest.fixture(scope="module")
def tokenizer_parameters():
    return drawn(TOKENIZER.build())


@pytest.fixture(scope="module")
def tokenizer_loss(tokenizer_parameters):
    batch, key = batch_of(TOKENIZER.build()), jax.random.key(3)
    return [loss_of(TOKENIZER)(tokenizer_parameters, {}, batch, key, count) for count in (1, 2)]


def test_loss_is_the_sum_of_its_terms(tokenizer_loss):
    (loss, metrics), _ = tokenizer_loss
    values = to_host(metrics)
    total = sum(
        values[f"{stream}/reconstruction"]
        + 0.5 * values[f"{stream}/perceptual_laplacian"]
        + values[f"{stream}/codebook"]
        for stream in ("context", "future")
    )
    assert float(loss) == pytest.approx(total, rel=1e-5)
    assert 0 < values["future/codes_used"] <= 1 and 1 <= values["future/perplexity"] <= 12
    assert {"context/psnr", "future/psnr"} < set(values)


@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_moving_pixels_count_more(kind):
    """A fifth of the second future frame moves; other errors, and those of the context, count once."""
    video = jnp.full((1, 4, 10, 10, 3), 0.5).at[0, 3, :2, :, 1].set(0.9)
    made = video[0, 2:] + 0.25
    found = [
        TOKENIZER.replace(reconstruction=kind, moving_weight=weight)
        .build()
        .pixel_error(stream, made, video[0, 2:], video)
        for weight, stream in ((0.0, "future"), (10.0, "future"), (10.0, "context"))
    ]
    error = 0.25 if kind == "l1" else 0.0625
    assert [float(one) for one in found] == pytest.approx([error, error * (1 + 10 * 0.2 / 2), error])


def test_tokenizer_dropout_depends_on_the_slot(tokenizer_loss):
    (whole, _), (parts, _) = tokenizer_loss
    assert float(parts) == pytest.approx(float(whole), rel=1e-5)


def test_evaluation_and_visualization(tokenizer_parameters):
    task = TOKENIZER.build()
    batch = batch_of(task)

    @jax.jit
    def run(parameters, key):
        return task.evaluate(parameters, {}, batch, key), task.visualize(parameters, {}, batch, key)

    (first, shown), (second, _) = (run(tokenizer_parameters, jax.random.key(seed)) for seed in (0, 1))
    assert to_host(first) == to_host(second)
    wanted = {f"{s}/{n}" for s in ("context", "future") for n in ("psnr", "ssim", "l1", "perceptual_laplacian")}
    assert wanted | {"context/codes_used", "context/perplexity"} < set(to_host(first))
    reconstruction, finite = shown["reconstruction"]
    assert shown["data"].shape == reconstruction.shape == (4, 5, 16, 16, 3) and finite.all()
    error = np.asarray(reconstruction, np.float64)[:, 2:] - np.asarray(batch["video"], np.float64)[:, 2:]
    assert np.abs(error).mean() / 255 == pytest.approx(to_host(first)["future/l1"], abs=0.5 / 255)


def test_dead_codes_become_latents_of_the_batch():
    config = TOKENIZER.replace(restart=RestartConfig(every=3, below=0.3, decay=0.5))
    task = config.build()
    parameters = drawn(task)
    parameters["counts"] = jax.tree.map(jnp.zeros_like, parameters["counts"])
    for stream in ("context", "future"):
        # As initial ones: so near to each other that few are ever the nearest.
        book = parameters["tokenizer"][f"{stream}_codebook"]
        parameters["tokenizer"][f"{stream}_codebook"] = {"table": 0.05 * book["table"]}
    assert set(parameters) == {"counts", "tokenizer"} and set(task.network_configs) == {"tokenizer"}
    (objective,) = task.objectives()
    assert objective.parameters == "tokenizer/.*"
    batch = batch_of(task)
    update = jax.jit(lambda p, step: task.after_update(p, {}, batch, jax.random.key(1), step))

    evaluate = jax.jit(lambda p: task.evaluate(p, {}, batch, jax.random.key(0)))

    def used(parameters):
        values = to_host(evaluate(parameters))
        return values["context/codes_used"], values["future/codes_used"]

    still = update(parameters, jnp.int32(1))
    jax.tree.map(np.testing.assert_array_equal, still, parameters)
    moved = update(parameters, jnp.int32(2))
    assert all(after > before for before, after in zip(used(parameters), used(moved), strict=True))
    for name, layer in parameters["tokenizer"].items():
        if "codebook" not in name:
            jax.tree.map(np.testing.assert_array_equal, moved["tokenizer"][name], layer)
    # What is chosen often stays where it is.
    again = update(moved, jnp.int32(5))
    stayed = np.asarray(
        again["tokenizer"]["context_codebook"]["table"] == moved["tokenizer"]["context_codebook"]["table"]
    )
    assert stayed.all(axis=1).mean() > 0.3


@pytest.mark.slow
def test_adaptive_weight_balances_adversarial_and_perceptual_gradients():
    """Against the gradient of each loss alone, through the whole tokenizer."""
    config = TOKENIZER.replace(
        network=NETWORK.replace(dropout=0.0),
        adversarial=AdversarialConfig(
            network=ClipDiscriminatorConfig(width=4, groups=2, halvings=1), weight=0.8, start=5, limit=1e6
        ),
    )
    task = config.build()
    assert [objective.name for objective in task.objectives()] == ["model", "discriminator"]
    parameters, batch = drawn(task, 0.1), batch_of(task, BUCKET.replace(batch_size=2))

    def losses(parameters, step):
        given = {**batch, "step": jnp.full((2,), step)}
        return jax.value_and_grad(lambda p: task.loss(p, {}, given, jax.random.key(0)), has_aux=True)(parameters)

    (_, metrics), gradient = jax.jit(losses)(parameters, jnp.int32(5))
    (_, before), plain = jax.jit(losses)(parameters, jnp.int32(4))
    assert before["adaptive_weight"] == before["hinge"] == 0
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(plain["discriminator"]))

    video = jnp.asarray(batch["video"], jnp.float32) / 255

    def frames(tokenizer):
        made = task.networks["tokenizer"].apply(tokenizer, video)
        return 2 * made.context - 1, 2 * made.future - 1

    def push(tokenizer):
        judged = [task.adversarial.scores(parameters["discriminator"], clip.reshape(-1, 1, 16, 16, 3))
                  for clip in frames(tokenizer)]  # fmt: skip
        return -jnp.mean(jnp.concatenate(judged))

    def pull(tokenizer):
        made = frames(tokenizer)[1].reshape(-1, 16, 16, 3)
        return jnp.mean(task.perceptual.distance({}, made, 2 * video[:, 2:].reshape(-1, 16, 16, 3) - 1))

    pushed, pulled = jax.jit(lambda p: (jax.grad(push)(p), jax.grad(pull)(p)))(parameters["tokenizer"])
    kernels = [np.asarray(g["prediction_decoder"]["conv_out"]["kernel"]) for g in (pulled, pushed)]
    weight = 0.8 * np.linalg.norm(kernels[0]) / (np.linalg.norm(kernels[1]) + 1e-4)
    assert metrics["adaptive_weight"] == pytest.approx(weight, rel=1e-3)
    for path in (("prediction_decoder", "conv_out", "kernel"), ("encoder", "conv_in", "kernel")):
        more, own, against = (
            functools.reduce(lambda tree, name: tree[name], path, tree)
            for tree in (gradient["tokenizer"], plain["tokenizer"], pushed)
        )
        np.testing.assert_allclose(more, own + weight * against, rtol=2e-3, atol=2e-4 * float(jnp.abs(more).max()))
    assert any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient["discriminator"]))
    with pytest.raises(ConfigError, match="are both updated in every step"):
        validate_tree(config.replace(adversarial=AdversarialConfig(update_schedule="alternate")), "task")


def test_saved_update_schedule_is_read_under_its_earlier_name():
    config = AdversarialConfig(update_schedule="alternate")
    assert from_json(to_json(config).replace('"update_schedule"', '"turns"')) == config


# World model.


@pytest.fixture(scope="module")
def networks():
    return drawn(WORLD.build(), 0.02), drawn(TOKENIZER.build())


def losses(config: WorldModelConfig, networks, batch, parameters=None):
    parameters = networks[0] if parameters is None else parameters
    loss, metrics = loss_of(config)(parameters, networks[1], batch, jax.random.key(3), 1)
    return float(loss), to_host(metrics)


STILL = WORLD.replace(transformer=TRANSFORMER.replace(attention_dropout=0.0))


def test_untrained_loss_is_that_of_uniform_guesses(networks):
    loss, metrics = losses(STILL, networks, batch_of(STILL.build()))
    assert metrics["cross_entropy"] == pytest.approx(np.log(32), rel=0.05)
    assert loss == pytest.approx(metrics["cross_entropy"] + metrics["reward_error"], rel=1e-6)


def test_reward_targets_are_those_of_the_action_that_led_to_the_frame(networks):
    """Zero head: the error is the mean square of the targets, which are those of the frames before."""
    batch = batch_of(STILL.build())
    parameters = {"transformer": {**networks[0]["transformer"]}}
    head = parameters["transformer"]["reward"]
    parameters["transformer"]["reward"] = jax.tree.map(jnp.zeros_like, head)
    _, metrics = losses(STILL, networks, batch, parameters=parameters)
    targets = symlog(batch["rewards"][:, 1:4])
    assert metrics["reward_error"] == pytest.approx(float(jnp.mean(targets**2)), rel=1e-5)


def test_actions_that_lead_to_no_predicted_frame_are_ignored(networks):
    """The action of the last frame, and those before the last context frame."""
    batch = batch_of(STILL.build())
    parameters = networks[0]
    loss, _ = losses(STILL, networks, batch, parameters=parameters)
    for frame, matters in ((0, False), (1, True), (3, True), (4, False)):
        other = {**batch, "actions": batch["actions"].at[:, frame].add(1.0)}
        changed, _ = losses(STILL, networks, other, parameters=parameters)
        assert (changed != loss) == matters, frame


def test_a_goal_comes_first(networks):
    config = STILL.replace(goal=True)
    task = config.build()
    batch = batch_of(task)
    ordered = task._ordered(batch)
    assert ordered["video"].shape[1] == 6
    np.testing.assert_array_equal(ordered["video"][:, 0], batch["video"][:, -1])
    np.testing.assert_array_equal(ordered["video"][:, 1:], batch["video"])
    np.testing.assert_array_equal(ordered["actions"][:, 1], batch["actions"][:, 0])
    assert losses(config, networks, batch)[0] != losses(STILL, networks, batch)[0]


def test_transformer_dropout_depends_on_the_slot(networks):
    batch = batch_of(WORLD.build())
    parts = [float(loss_of(WORLD)(*networks, batch, jax.random.key(3), count)[0]) for count in (1, 2)]
    assert parts[0] == pytest.approx(parts[1], rel=1e-5)
    assert parts[0] != losses(STILL, networks, batch)[0]


def test_evaluation_rolls_out(networks):
    task, batch = WORLD.build(), batch_of(WORLD.build())

    @jax.jit
    def run(parameters, frozen, key):
        return task.evaluate(parameters, frozen, batch, key), task.visualize(parameters, frozen, batch, key)

    metrics, shown = run(*networks, jax.random.key(0))
    values = to_host(metrics)
    measures = ("psnr", "ssim", "perceptual_laplacian")
    wanted = {
        f"{before}{name}{after}" for name in measures for before, after in (("", ""), ("whole_", ""), ("", "_copying"))
    }
    wanted |= {"loss", "cross_entropy", "accuracy", "reward_error"}
    assert set(values) == wanted
    still = np.asarray(batch["video"], np.float64)[:, 1:2] - np.asarray(batch["video"], np.float64)[:, 2:]
    psnr = -10 * np.log10((still**2).mean(axis=(2, 3, 4)) / 255**2)
    assert values["psnr_copying"] == pytest.approx(psnr.mean(), rel=1e-4)
    assert values["whole_psnr"] != values["psnr"] and values["perceptual_laplacian"] > 0
    rollout, finite = shown["rollout"]
    assert shown["data"].shape == rollout.shape == (2, 5, 16, 16, 3) and finite.all()
    assert rollout.dtype == np.uint8
    np.testing.assert_array_equal(rollout[:, :2], batch["video"][:2, :2])


# The published optimizer.


def test_weight_decay_and_learning_rate_of_the_recipes():
    """The release leaves 26 tensors of the small model without decay, 28 with both heads; its cosine is over 1M."""
    optimizer = OptimizerConfig(learning_rate=1.0, warmup_steps=5000, schedule="cosine", weight_decay=0.01)
    for heads, count in (({}, 26), ({"action_width": 4, "reward": True}, 28)):
        config = FrameTransformerConfig.small().replace(**heads)
        axes = flatten(Network.of(lambda rngs, config=config: FrameTransformer(config, rngs=rngs)).axes)
        still = [(path, names) for path, names in axes.items() if not _decays(optimizer, path, names)]
        assert sum(config.layers if LAYERS in names else 1 for _, names in still) == count
        assert "embedding/table" in dict(still) and not {"head/kernel", "action/kernel"} & set(dict(still))
    schedule = make_schedule(optimizer, 1_000_000)
    assert float(schedule(jnp.int32(700_000))) == pytest.approx(0.20803, abs=1e-5)
    assert float(schedule(jnp.int32(2499))) == pytest.approx(0.5)


# Data and mistakes.


def write(folder, *, actions: int | None = 2, rewards: bool = True, value: float = 0.0) -> DataConfig:
    from jvgen.data.video_files import encode_video

    video = np.full((6, 16, 16, 3), 90, np.uint8)
    with Writer(folder, description="toy", metadata={"origin": "toy"}) as writer:
        for number in range(3):
            given = {} if actions is None else {"actions": np.full((6, actions), value, np.float32)}
            given |= {"rewards": np.ones(6, np.float32)} if rewards else {}
            record = Record(
                id=f"r{number}", kind="dynamic", clips=(encode_video(video, 8.0),), frames_per_second=8.0, frames=6,
                height=16, width=16, **given,
            )  # fmt: skip
            writer.add("train", record)
    return DataConfig(sources=(SourceConfig(path=str(folder)),), buckets=(BUCKET,))


def test_data_sets_that_do_not_fit(tmp_path):
    WORLD.check_data(write(tmp_path / "fits"))
    for name, options, words in (
        ("none", {"actions": None}, "3 of 3 recordings have no actions .*the first is r0.*action_width = 2"),
        ("wide", {"actions": 4}, "actions have 4 numbers, but transformer.action_width = 2"),
        ("unrewarded", {"rewards": False}, "no rewards, but transformer.reward = true"),
    ):
        with pytest.raises(ValueError, match=words):
            WORLD.check_data(write(tmp_path / name, **options))
    plain = WORLD.replace(transformer=TRANSFORMER.replace(action_width=0, reward=False))
    plain.check_data(write(tmp_path / "bare", actions=None, rewards=False))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"actions": np.zeros((5, 3))}, "have 3 numbers; transformer.action_width = 2"),
        ({"has_action": False, "actions": np.zeros((5, 0))}, "have none; transformer.action_width = 2"),
        ({"actions": np.full((5, 2), np.nan)}, "reach nan.*--clip-actions"),
        ({"actions": np.full((5, 2), 2e3)}, "reach 2000"),
        ({"rewards": np.full(5, np.inf)}, "rewards are not all finite"),
        ({"has_reward": False}, "a recording has no rewards; transformer.reward = true"),
    ],
)
def test_examples_that_do_not_fit(changes, words):
    example = {
        "video": np.zeros((5, 16, 16, 3), np.uint8), "actions": np.zeros((5, 2)), "has_action": True,
        "rewards": np.zeros(5),
    }  # fmt: skip
    assert set(WORLD.build().preprocess(example)) == {"video", "actions", "rewards"}
    with pytest.raises(ValueError, match=words):
        WORLD.build().preprocess(example | changes)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (WORLD.replace(reward_weight=-1.0), "reward_weight = -1.0"),
        (WORLD.replace(action_reconstruction_weight=0.1), "needs transformer.action_reconstruction"),
        (WORLD.replace(goal=True, tokenizer=NETWORK.replace(context_frames=1)), "goal needs at least 2 context frames"),
        (WORLD.replace(transformer=TRANSFORMER.replace(vocabulary=31)), "do not belong together"),
        (WORLD.replace(evaluation_samples=-1), "evaluation_samples = -1"),
        (TOKENIZER.replace(perceptual_weight=-1.0), "perceptual_weight = -1.0"),
        (TOKENIZER.replace(restart=RestartConfig(every=-1)), "every = -1"),
        (TOKENIZER.replace(restart=RestartConfig(every=1, below=0.0)), "below = 0.0"),
    ],
)
def test_bad_configs(config, words):
    with pytest.raises(ConfigError, match=words):
        validate_tree(config, "task")


@pytest.mark.parametrize(
    ("task", "bucket", "words"),
    [
        (TOKENIZER, BUCKET.replace(height=20), "frames of 20x16: the tokenizer takes 16x16"),
        (TOKENIZER, BUCKET.replace(frames=2), "no frame to predict"),
        (TOKENIZER, BUCKET.replace(views=2), "trains on single views"),
        (TOKENIZER, BUCKET.replace(segment=SegmentConfig(choice="later", horizon=8, context=1)), "segment.context = 1"),
        (WORLD, BUCKET.replace(segment=SegmentConfig(choice="shuffled", horizon=8)), "needs consecutive frames"),
        (WORLD, BUCKET.replace(frames=60), "more than transformer.max_positions = 256"),
    ],
)
def test_batches_that_do_not_fit(task, bucket, words):
    with pytest.raises(ValueError, match=words):
        task.check_bucket(bucket)


def test_weights_of_another_tokenizer(tmp_path, networks):
    with pytest.raises(ValueError, match="tokenizer_weights = none"):
        WORLD.replace(tokenizer_weights=None).check_weights()
    folder = export_network(NETWORK, networks[1]["tokenizer"], tmp_path / "tokenizer")
    fits = WORLD.replace(tokenizer_weights=str(folder))
    fits.check_weights()
    loaded = fits.build().load_frozen()["tokenizer"]
    np.testing.assert_array_equal(
        loaded["future_codebook"]["table"], networks[1]["tokenizer"]["future_codebook"]["table"]
    )
    assert fits.build().frozen_digest()
    with pytest.raises(ValueError, match="another network.*\n.*context_frames: 2 in the weights, 1 in the run"):
        fits.replace(tokenizer=NETWORK.replace(context_frames=1)).check_weights()
    with pytest.raises(ValueError, match="jvgen play"):
        fits.check_request(SampleRequest(5, 16, 16))
