"""Runs of a LoRA, of image to video and of several views with cached embeddings of captions are those with T5."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvgen import exit_codes
from jvgen.data.store.records import Record
from jvgen.data.store.writer import Writer
from jvgen.data.stream.config import DataConfig, SourceConfig
from jvgen.data.video_files import encode_video
from jvgen.geometry import paths
from jvgen.interop.digest import content_digest
from jvgen.interop.to_torch import export_network
from jvgen.nn.lora import LoraConfig
from jvgen.tasks.text import TextConfig
from jvgen.training.config import PrecisionConfig, TrainingConfig
from jvgen.training.experiment import Experiment
from jvgen.training.loop import train
from tests.unit.test_multiview_task import CONFIG as VIEWS

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_pipeline import ENCODER, write_pipeline  # noqa: E402
from tiny_text_to_video import BUCKET, CONFIG, VAE, random_frozen  # noqa: E402

pytestmark = [pytest.mark.usefixtures("quick_compilations"), pytest.mark.slow]

EIGHT = BUCKET.replace(batch_size=8)  # one for each device
TASKS = {
    "lora": (CONFIG.replace(lora=LoraConfig(rank=2, alpha=1.0)), EIGHT),
    "image to video": (
        CONFIG.replace(condition="first_frame", denoiser=CONFIG.denoiser.replace(in_channels=8)), EIGHT,
    ),
    "views": (VIEWS, EIGHT.replace(views=2)),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory, jvgen) -> Path:
    """A VAE, a denoiser, T5, and data sets of one and of two views, of pixels and latents, with and without text."""
    root = tmp_path_factory.mktemp("text")
    write_pipeline(root / "pipeline")
    export_network(VAE, random_frozen()["vae"], root / "vae")
    rng = np.random.default_rng(0)
    network = CONFIG.build().networks["denoiser"]
    drawn = jax.tree.map(lambda leaf: jnp.asarray(0.5 * rng.standard_normal(leaf.shape, np.float32)), network.shapes)
    export_network(CONFIG.denoiser, drawn, root / "denoiser")
    extrinsics = paths.named_paths("circle", 2, 3, distance=1.0).astype(np.float32)
    for views in (1, 2):
        metadata = {"latents": {"format": 1, "encoder": content_digest(str(root / "vae"))}}
        with Writer(root / f"{views}", description="", metadata=metadata) as writer:
            for number in range(8):
                shape = (views, 3, 8, 8, 3)
                clips = tuple(encode_video(rng.integers(0, 255, shape[1:], np.uint8), 8.0) for _ in range(views))
                cameras = {"intrinsics": np.full((6, 4), 0.8, np.float32), "extrinsics": extrinsics.reshape(6, 3, 4)}
                writer.add("train", Record(
                    id=str(number), kind="dynamic", clips=clips, captions=("a red ball", "blue")[: 1 + number % 2],
                    latents=rng.standard_normal((views, 3, 4, 4, 8)).astype(np.float16), frames=3, height=8, width=8,
                    frames_per_second=8.0, views=views, **(cameras if views == 2 else {}),
                ))  # fmt: skip
        done = jvgen("data", "build", "text-embeddings", root / f"{views}", "--out", root / f"text{views}", "--t5",
                     root / "pipeline" / "text_encoder", "--tokenizer", root / "pipeline" / "tokenizer", "--length", 6,
                     "--batch-size", 2, "--compute-dtype", "float32")  # fmt: skip
        assert done.status == 0, done.err
    return root


def losses(folder: Path, name: str, cached: bool) -> list[float]:
    """Of a run of three steps; with cached embeddings it is evaluated and draws samples too."""
    task, bucket = TASKS[name]
    data = str(folder / f"{'text' if cached else ''}{bucket.views}")
    text = TextConfig(
        encoder=ENCODER, length=6, weights=str(folder / "pipeline" / "text_encoder"),
        tokenizer=str(folder / "pipeline" / "tokenizer"), embeddings=data if cached else None,
    )  # fmt: skip
    task = task.replace(
        text=text, vae_weights=str(folder / "vae"), caption_dropout=0.5, validation_timesteps=1, visualize_clips=1,
        denoiser_weights=str(folder / "denoiser") if name == "lora" else None,
    )  # fmt: skip
    source = (SourceConfig(path=data),)
    experiment = Experiment(
        name="run", task=task,
        data=DataConfig(sources=source, evaluation_sources=source, buckets=(bucket,), threads=1, prefetch=1),
        training=TrainingConfig(
            steps=3, log_every=1, evaluate_every=3 * cached, visualize_every=3 * cached, evaluation_batches=1,
            precision=PrecisionConfig(compute_dtype="float32"),
        ),
    )  # fmt: skip
    run = folder / f"run {name} {cached}"
    assert train(experiment, run) == exit_codes.DONE
    if cached:
        assert list((run / "samples").rglob("*")), "no samples"
        assert np.isfinite(json.loads((run / "evaluation.jsonl").read_text().splitlines()[-1])["validation_loss"])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize("name", TASKS)
def test_losses_are_those_with_t5_in_the_step(folder, name):
    """Embeddings are stored in bfloat16, here of a T5 in float32."""
    inside, cached = losses(folder, name, False), losses(folder, name, True)
    assert len(inside) == len(cached) == 3
    np.testing.assert_allclose(cached, inside, rtol=2e-3)
