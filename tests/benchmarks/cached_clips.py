"""What reading costs a host of the 2B step: cached latents of 49x480x720 and T5-XXL's embeddings, by our Loader."""

import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from jvgen.data.store.records import Record
from jvgen.data.store.writer import Writer
from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig
from jvgen.data.stream.loader import Loader
from tests.benchmarks import readers, timing
from tests.benchmarks.machine import Settings, peak_memory_mib
from tests.benchmarks.report import Result

# `jvgen estimate configs/repvideo_2b.py --topology v5p:4x4x4 --set task.denoiser.attention=tpu` (docs/measured.md): 32
# clips in 1.08 s, 4 chips a host, which reads 2 clips of every batch. With flash_tpu it is 0.74 s.
CLIPS, SECONDS, HOSTS = 32, 1.08, 16


def run(settings: Settings) -> Result:
    """Latents alone, and with text."""
    latent = (1, 3, 4, 4, 32) if settings.quick else (1, 13, 60, 90, 32)
    text = (6, 64) if settings.quick else (226, 4096)
    frames, height, width = (latent[1] - 1) * 4 + 1, latent[2] * 8, latent[3] * 8
    count, batches = (4, 2) if settings.quick else (24, 12)
    demand = CLIPS / SECONDS / HOSTS
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        for name, rows_of_text in (("latents", 0), ("latents and text", text[0])):
            out = Path(folder) / name.replace(" ", "_")
            embedding = rng.standard_normal((rows_of_text, text[1]), np.float32).astype(ml_dtypes.bfloat16)
            captions = {"text_embeddings": embedding, "text_lengths": np.array([rows_of_text], np.int32)}
            with Writer(out, description="benchmark") as writer:
                for number in range(count):
                    writer.add("train", Record(
                        id=str(number), kind="dynamic", clips=(), captions=("a caption",), frames=frames, height=height,
                        width=width, frames_per_second=8.0,
                        latents=rng.standard_normal(latent, np.float32).astype(np.float16),
                        **(captions if rows_of_text else {}),
                    ))  # fmt: skip
            config = DataConfig(
                sources=(SourceConfig(path=str(out)),), threads=settings.cores, prefetch=2,
                buckets=(BucketConfig(frames=frames, height=height, width=width, batch_size=2),),
            )  # fmt: skip
            loader = Loader(config, seed=0, preprocess=readers.cached)

            def read(loader=loader) -> None:
                with loader.batches(0, batches) as stream:
                    for _ in stream:
                        pass

            waits = _paced(loader, 3 if settings.quick else 24, 0.05 if settings.quick else SECONDS)
            measured = timing.in_turns({"ours": read}, settings.repeats)["ours"]
            clips = 2 * batches
            processor = float(np.median(measured.processor)) / clips
            rows.append({
                "what": name, "MB_clip": out_bytes(out) / count / 1e6, "cpu_ms_clip": 1000 * processor,
                "clips_s": clips / measured.median, "needed_clips_s_host": demand, "cores_needed": demand * processor,
                "data_wait": float(np.median(waits)), "data_wait_most": max(waits),
                "peak_memory_mib": peak_memory_mib(),
            })  # fmt: skip
    return Result(
        title="reading cached clips for the 2B step",
        settings={"latents": latent, "text": text, "batch": 2},
        rows=rows,
        shown=(
            "what", "MB_clip", "cpu_ms_clip", "clips_s", "needed_clips_s_host", "cores_needed", "data_wait",
            "data_wait_most", "peak_memory_mib",
        ),
        notes=(
            "files are in the page cache. cores_needed: of one host of v5p:4x4x4, so that a step never waits.",
            "data_wait: as in metrics.jsonl, the share of a step's time that the loop waits for its batch, where steps",
            "take as long as estimated (the loop sleeps); median and most of 24 steps after the first.",
        ),
    )  # fmt: skip


def _paced(loader: Loader, steps: int, seconds: float) -> list[float]:
    """Shares of the steps that wait for data, of a loop whose steps take so long."""
    waits = []
    with loader.batches(0, steps + 1) as stream:
        for batch in stream:
            waits.append(batch.read_seconds / (batch.read_seconds + seconds))
            time.sleep(seconds)
    return waits[1:]


def out_bytes(folder: Path) -> int:
    """Bytes of a data set."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
