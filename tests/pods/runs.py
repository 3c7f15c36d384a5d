"""Which configs run on which slices, and what was found of each."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from jvgen.training.experiment import Experiment, load_experiment

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).with_name("results.json")
GIB = 2**30
# Parts of a step that take a smaller share of its time are not kept.
SMALL_PART = 0.003


@dataclasses.dataclass(frozen=True)
class PodRun:
    """One config on one slice.

    Attributes:
      config: as on the command line: "configs/cv_vae.py:sd21".
      topology: "v5p:4x4x8".
      overrides: what the config's docstring says to set on that slice.
    """

    config: str
    topology: str
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """For file names: "cv_vae-sd21-v5p-2x2x4", "repvideo_2b-v6e-8x16-mesh.seq=4"."""
        config = self.config.removeprefix("configs/").replace(".py", "").replace(":", "-")
        return "-".join((config, self.topology.replace(":", "-"), *self.overrides))

    def experiment(self) -> Experiment:
        """The config with its overrides."""
        return load_experiment(ROOT / self.config, self.overrides)


# In the order in which they are compiled: what takes least first. The topologies are those of the configs' docstrings.
RUNS = (
    PodRun("configs/ivideogpt_transformer.py:oxe_64", "v5e:4x4"),
    PodRun("configs/ivideogpt_tokenizer.py:oxe_64", "v5e:4x4"),
    PodRun("configs/ivideogpt_tokenizer.py:oxe_256", "v5e:4x8"),
    PodRun("configs/cogvideox_2b_lora.py", "v5e:2x4"),
    PodRun("configs/repvideo_2b.py", "v5p:4x4x4"),
    PodRun("configs/repvideo_2b.py", "v6e:8x8", ("sharding.frozen=replicated",)),
    PodRun("configs/repvideo_2b.py", "v5e:8x16", ("mesh.seq=4",)),
    PodRun("configs/cogvideox_2b.py", "v5p:4x4x8"),
    PodRun("configs/cogvideox_2b.py", "v5e:16x16"),
    PodRun("configs/cogvideox_2b.py", "v6e:16x16"),
    PodRun("configs/cogvideox_5b_lora.py:text_to_video", "v5e:2x4"),
    PodRun("configs/cogvideox_5b_lora.py:image_to_video", "v5e:2x4"),
    PodRun("configs/cogvideox_5b_lora.py:text_to_video_1_5", "v5p:2x2x4"),
    PodRun("configs/cogvideox_5b_lora.py:image_to_video_1_5", "v5p:2x2x4"),
    PodRun("configs/cogvideox_5b.py:text_to_video", "v5p:4x4x4"),
    PodRun("configs/cogvideox_5b.py:image_to_video", "v5p:4x4x4"),
    PodRun("configs/cogvideox_5b.py:repvideo", "v5p:4x4x4"),
    PodRun("configs/cogvideox_5b.py:repvideo_image_to_video", "v5p:4x4x4"),
    PodRun("configs/cogvideox1_5_5b.py:text_to_video", "v5p:4x4x4"),
    PodRun("configs/cogvideox1_5_5b.py:image_to_video", "v5p:4x4x4"),
    PodRun("configs/cogvideox1_5_5b.py:repvideo", "v5p:4x4x4"),
    PodRun("configs/cogvideox1_5_5b.py:repvideo_image_to_video", "v5p:4x4x4"),
    PodRun("configs/repvideo_2b_scratch.py", "v5p:4x4x8"),
    PodRun("configs/repvideo_2b_scratch.py", "v5p:4x4x8", ("mesh.seq=2", "task.denoiser.remat=save_matmuls")),
    PodRun("configs/repvideo_2b_scratch.py", "v5e:16x16"),
    PodRun("configs/repvideo_2b_scratch.py", "v6e:16x16"),
    PodRun("configs/repvideo_2b_scratch.py:heads_128", "v5p:4x4x4"),
    PodRun("configs/repvideo_2b_scratch.py:heads_256", "v6e:8x8"),
    PodRun("configs/image_vae_sd.py", "v5e:8x8"),
    PodRun("configs/image_vae_sd.py", "v5p:2x2x4"),
    PodRun("configs/cvd_2b.py", "v5p:4x4x4"),
    PodRun("configs/cv_vae.py:sd21", "v5p:2x2x4"),
    PodRun("configs/cv_vae.py:sd3", "v5p:2x2x2"),
    PodRun("configs/cv_vae.py:causal", "v5p:2x4x4"),
)


def results() -> dict[str, Any]:
    """What was found: by name of the run, by batch shape."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def row_of(report: dict[str, Any], bucket: dict[str, Any], about: dict[str, str]) -> dict[str, Any]:
    """What is kept of one batch shape of a report of `jvgen compile --json`."""
    memory, time = bucket["memory"], bucket["time"]
    row = {
        "batch_size": bucket["bucket"]["batch_size"],
        "memory_GiB": None if memory is None else round(bucket["total_bytes"] / GIB, 2),
        "hbm_GiB": round(report["hbm_bytes"] / GIB, 2),
        "sent_GiB": round(sum(one["count"] * one["bytes"] for one in bucket["collectives"] or ()) / GIB, 2),
        "compile_s": round(bucket["seconds"]),
        **about,
    }
    if time is not None:
        incomplete = bool(time["without_cycles"]) and time["has_code"]
        row |= {
            **({} if time["has_code"] else {"has_code": False}),
            "useful_TFLOP": round(time["useful_flops"] / 1e12, 1),
            "seconds": [float(f"{time['seconds'][name]:.3g}") for name in ("least", "likely", "most")],
            "mfu": [None if incomplete else round(value, 3) for value in reversed(time["utilization"])],
            "parts_ms": {
                name: _milliseconds(part["likely"])
                for name, part in time["parts"].items()
                if part["likely"] >= SMALL_PART * time["seconds"]["likely"]
            },
            "collectives_ms": {
                _traffic_name(one): {
                    "ms": _milliseconds(one["seconds"]["likely"]),
                    "hidden_ms": _milliseconds(one["hidden"]),
                    "GiB": round(one["bytes"] / GIB, 3),
                }
                for one in time["traffic"]
                if one["seconds"]["likely"] >= SMALL_PART * time["seconds"]["likely"]
            },
        }
    return row


def _milliseconds(seconds: float) -> float:
    return float(f"{seconds * 1e3:.3g}")


def _traffic_name(one: dict[str, Any]) -> str:
    name = f"{one['kind']} over {one['axes']}"
    return name + ", between slices" * one["network"] + ", frozen networks" * one["frozen"]
