"""Captions' embeddings from the data set: the loss is that of T5 in the step, and T5 is in none of it."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jvgen.config import validate_tree
from jvgen.data.store.empty_caption import read_empty_caption
from jvgen.data.store.records import Record
from jvgen.data.store.sources import open_source, read_metadata
from jvgen.data.store.writer import Writer
from jvgen.data.stream.captions import CaptionConfig
from jvgen.data.stream.config import DataConfig, SourceConfig
from jvgen.data.stream.loader import Loader
from jvgen.interop.from_torch import import_folder
from jvgen.nn.compute_dtype import cast
from jvgen.tasks.text import TextConfig
from jvgen.training.checkpoint.initial import write_first_checkpoint
from jvgen.training.config import TrainingConfig
from jvgen.training.experiment import Experiment

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_pipeline import ENCODER, write_pipeline  # noqa: E402
from tiny_text_to_video import BUCKET, CONFIG  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_compilations")

CAPTIONS = ("a red ball", "blue")
BUILD = ("--length", 6, "--batch-size", 1)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A pipeline's T5 and tokenizer, and twelve records of latents; one has no caption."""
    root = tmp_path_factory.mktemp("text")
    write_pipeline(root / "pipeline")
    rng = np.random.default_rng(0)
    with Writer(root / "latents", description="", metadata={"latents": {"format": 1, "encoder": "e"}}) as writer:
        for number in range(12):
            captions = (*CAPTIONS, f"a {'red ' * (number % 3)}") if number else ()
            names = ("long", "short", "short")[: len(captions)]
            writer.add("train", Record(
                id=str(number), kind="dynamic", clips=(), captions=captions, caption_names=names,
                latents=rng.standard_normal((1, 3, 4, 4, 8)).astype(np.float16), frames=3, height=8, width=8,
                frames_per_second=8.0,
            ))  # fmt: skip
    return root


@pytest.fixture(scope="module")
def built(work, jvgen):
    """Data sets with embeddings, by padding, made by the command."""
    t5 = ("--t5", work / "pipeline" / "text_encoder", "--tokenizer", work / "pipeline" / "tokenizer")
    for padding in ("attended", "zeros"):
        words = (
            "data",
            "build",
            "text-embeddings",
            work / "latents",
            *t5,
            "--out",
            work / padding,
            "--padding",
            padding,
        )
        done = jvgen(*words, *BUILD)
        assert done.status == 0, done.err
    again = jvgen(*words, *BUILD)
    assert again.status == 0 and "up to date" in again.out
    stale = jvgen(*words, "--length", 5)
    assert stale.status == 2 and "text_embeddings.length was 6, now 5" in stale.err
    return {padding: work / padding for padding in ("attended", "zeros")}


def config_of(work: Path, padding: str, embeddings: Path | None, **changes):
    text = TextConfig(
        encoder=ENCODER, length=6, weights=str(work / "pipeline" / "text_encoder"), padding=padding,
        tokenizer=str(work / "pipeline" / "tokenizer"), embeddings=None if embeddings is None else str(embeddings),
        unconditional=changes.pop("unconditional", "empty_caption"),
    )  # fmt: skip
    return CONFIG.replace(text=text, vae=None, vae_weights=None, **changes)


def data_of(folder: Path, **fields) -> DataConfig:
    return DataConfig(sources=(SourceConfig(path=str(folder)),), buckets=(BUCKET,), threads=1, prefetch=1, **fields)


def batch_of(task, folder: Path) -> dict[str, jax.Array]:
    data = data_of(folder, captions=CaptionConfig(weights={"short": 3}))
    with Loader(data, seed=1, preprocess=task.preprocess).batches(0, 1) as batches:
        arrays = next(batches).arrays
    return {**arrays, "slot": np.arange(BUCKET.batch_size, dtype=np.int32)}


def loss_of(task, parameters, frozen, batch):
    step = jax.jit(jax.value_and_grad(lambda p, b: task.loss(p, frozen, b, jax.random.key(5))[0]))
    return step(parameters, batch), step.lower(parameters, batch).cost_analysis()["flops"]


@pytest.mark.parametrize(("padding", "unconditional"), [("attended", "empty_caption"), ("zeros", "zeros")])
def test_the_loss_is_that_of_t5_in_the_step(work, built, padding, unconditional):
    """With half of the captions dropped; both compute in bfloat16, where the last bits depend on what is fused."""
    changes = {"caption_dropout": 0.5, "unconditional": unconditional}
    own = config_of(work, padding, None, **changes)
    cached = config_of(work, padding, built[padding], **changes)
    validate_tree(cached)
    cached.check_weights()
    cached.check_data(data_of(built[padding]))
    tasks = own.build(), cached.build()
    rng = np.random.default_rng(0)
    shapes = tasks[0].networks["denoiser"].shapes
    drawn = jax.tree.map(lambda leaf: jnp.asarray(0.5 * rng.standard_normal(leaf.shape, np.float32)), shapes)
    parameters = {"denoiser": cast(drawn, tasks[0].networks["denoiser"].axes, jnp.bfloat16)}
    weights = jax.tree.map(jnp.asarray, import_folder(own.text.weights)[1])
    t5 = cast(weights, tasks[0].frozen_networks["text_encoder"].axes, jnp.bfloat16)
    ((first, gradients), flops), ((second, others), fewer) = (
        loss_of(task, parameters, frozen, batch_of(task, folder))
        for task, frozen, folder in zip(
            tasks, ({"text_encoder": t5}, {}), (work / "latents", built[padding]), strict=True
        )
    )
    assert float(first) == pytest.approx(float(second), rel=1e-3)
    for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(others), strict=True):
        scale = np.abs(np.asarray(one, np.float32)).max() + 1e-3
        np.testing.assert_allclose(np.asarray(one, np.float32), np.asarray(other, np.float32), atol=0.03 * scale)
    # T5 is in no memory and in no program, and its weights' digest is that of the run with it.
    assert "text_encoder" not in tasks[1].frozen_networks and tasks[1].load_frozen() == {}
    assert tasks[1].flops(BUCKET)["text_encoder"] == 0
    expected = BUCKET.batch_size * tasks[0].flops(BUCKET)["text_encoder"]
    # XLA counts norms and softmax too, which are a part of so small an encoder.
    assert expected <= flops - fewer < 1.5 * expected
    assert tasks[0].frozen_digest() == tasks[1].frozen_digest() != ""


def test_embeddings_are_as_long_as_their_captions(work, built):
    attended, zeros = (open_source(built[padding], "train").read(1) for padding in ("attended", "zeros"))
    assert attended.text_lengths.tolist() == [6, 6, 6] and zeros.text_lengths.tolist() == [4, 2, 3]
    assert zeros.text_embeddings.dtype == ml_dtypes.bfloat16 and zeros.text_embeddings.shape == (9, 8)
    assert attended.latents.tobytes() == open_source(work / "latents", "train").read(1).latents.tobytes()
    # What T5 makes of one caption alone, without any padding.
    alone = config_of(work, "attended", None).build().text
    tokens = jnp.asarray(alone.tokenize("blue")[None, :2])
    expected = alone.network.apply(import_folder(alone.config.weights)[1], tokens)[0]
    np.testing.assert_allclose(zeros.embedding(1).astype(np.float32), expected, atol=0.05)
    assert read_empty_caption(built["zeros"]).shape == (1, 8) and read_empty_caption(built["attended"]).shape == (6, 8)
    assert read_metadata(built["zeros"])["latents"] == {"format": 1, "encoder": "e"}
    # A record without a caption has the embedding of the empty one, in the bits of bfloat16.
    task = config_of(work, "zeros", built["zeros"]).build()
    found = task.text.of_example({"caption": ""})["text"]
    assert found.dtype == np.uint16 and found.shape == (6, 8) and not found[1:].any()
    assert np.array_equal(found[:1].view(ml_dtypes.bfloat16), read_empty_caption(built["zeros"]))


def test_a_run_that_names_t5_too_is_evaluated(work, built, jvgen):
    """T5 is there for prompts: the batches of the evaluation are those of the program that measures them."""
    config, data = config_of(work, "zeros", built["zeros"], validation_timesteps=0), data_of(built["zeros"])
    experiment = Experiment(
        name="cached", task=config, data=data.replace(evaluation_sources=data.sources), training=TrainingConfig(steps=1)
    )
    write_first_checkpoint(experiment, work / "run", {})
    done = jvgen("evaluate", work / "run", "--batches", 1)
    assert done.status == 0 and "loss" in done.out, done.err


def test_embeddings_of_something_else_are_refused(work, built, jvgen):
    config = config_of(work, "zeros", built["zeros"])

    def message(check, *arguments) -> str:
        with pytest.raises(ValueError) as error:
            check(*arguments)
        return str(error.value)

    other = message(config.replace(text=config.text.replace(length=5)).check_weights)
    assert "made with length 6, and not 5" in other
    assert "padding zeros, and not attended" in message(config_of(work, "attended", built["zeros"]).check_weights)
    without = message(config.check_data, data_of(work / "latents"))
    assert "has no embeddings of its captions; make them with `jvgen data build text-embeddings`" in without
    mixed = message(config.check_data, data_of(built["attended"]))
    assert "were made with padding attended, the run has zeros" in mixed
    shortened = data_of(built["zeros"], captions=CaptionConfig(first_sentence=0.5))
    assert "data.captions.first_sentence = 0.5" in message(config.check_data, shortened)
    task = config.build()
    assert "task.text.embeddings is set, but the data set" in message(task.text.of_example, {"caption": "a"})
    assert "prompts need the text encoder" in message(task.tokens, ["a"])
    assert config.for_prompts().build().tokens(["a red ball"]).tolist() == [[3, 4, 5, 1, 0, 0]]
    byte = message(validate_tree, CONFIG.replace(text=CONFIG.text.replace(embeddings="x")))
    assert "a byte encoder is trained with the denoiser" in byte
    wrong = jvgen("data", "build", "text-embeddings", work / "latents", "--t5", work / "pipeline" / "vae",
                  "--tokenizer", "x", "--out", work / "y")  # fmt: skip
    assert wrong.status == 2 and "not a T5 encoder" in wrong.err
