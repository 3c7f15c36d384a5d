"""Which configs run on which slices, what was found of each, and the table of it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from jvgen.parallel.pods import SLICES, pod_named

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).with_name("results.json")
PAGE = ROOT / "docs" / "pods.md"
GIB = 2**30


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
        """For file names: "cv_vae-sd21-v5p-2x2x4"."""
        config = self.config.removeprefix("configs/").replace(".py", "").replace(":", "-")
        return f"{config}-{self.topology.replace(':', '-')}"


# In the order in which they are compiled: what takes least first. The topologies are those of the configs' docstrings.
RUNS = (
    PodRun("configs/ivideogpt_transformer.py:oxe_64", "v5e:4x4"),
    PodRun("configs/ivideogpt_tokenizer.py:oxe_64", "v5e:4x4"),
    PodRun("configs/ivideogpt_tokenizer.py:oxe_256", "v5e:4x8"),
    PodRun("configs/cogvideox_2b_lora.py", "v5e:2x4"),
    PodRun("configs/repvideo_2b.py", "v5p:4x4x4"),
    PodRun("configs/repvideo_2b.py", "v6e:8x16", ("mesh.seq=4",)),
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
    PodRun("configs/repvideo_2b_scratch.py", "v5e:16x16"),
    PodRun("configs/repvideo_2b_scratch.py", "v6e:16x16"),
    PodRun("configs/repvideo_2b_scratch.py:heads_128", "v5p:4x4x4"),
    PodRun("configs/repvideo_2b_scratch.py:heads_256", "v6e:16x16"),
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
        incomplete = bool(time["without_cycles"])
        row |= {
            "useful_TFLOP": round(time["useful_flops"] / 1e12, 1),
            "seconds": [float(f"{time['seconds'][name]:.3g}") for name in ("least", "likely", "most")],
            "mfu": [None if incomplete else round(value, 3) for value in reversed(time["utilization"])],
        }
    return row


def page(found: dict[str, Any]) -> str:
    """The table as Markdown."""
    lines = [
        "# Pods, as compiled",
        "",
        "Every config for pods on its slices, by XLA's TPU compiler: memory, FLOPs and bytes are those of the",
        "compiled step, times are estimated from it as `jvgen estimate` says, and nothing ran. Per device, which",
        "is a chip on all but tpu7x: GiB in use at most, TFLOP of trained networks without padding and",
        "recomputation, GiB in collectives. Seconds per step and MFU are likely values with the range of the",
        "estimate. `make aot` compiles what is missing and writes this page; `make aot AOT=--again` compiles all",
        "again. Layers are loops of the compiled program, so that all are in it at the cost of one: nothing is",
        "extrapolated from fewer. A row is of the config at its commit: where the config's docstring says other",
        "numbers, its mesh or rematerialization changed since, and [measured](measured.md) has both.",
        "",
        "| config | slice | chips | batch | GiB of HBM | TFLOP | GiB sent | s/step | MFU | date, commit, versions |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for run in RUNS:
        pod = pod_named(run.topology)
        name = SLICES[pod.chip.name].name_of(pod.chips)
        config = " --set ".join((run.config.removeprefix("configs/"), *run.overrides))
        head = f"| `{config}` | `{run.topology}`" + (f" ({name})" if name else "")
        rows = found.get(run.name, {})
        if not rows:
            lines.append(f"{head} | {pod.chips} | | | | | | | not compiled |")
        for bucket, row in rows.items():
            cells = [
                f"{bucket} x {row['batch_size']}",
                _memory(row),
                _cell(row.get("useful_TFLOP")),
                f"{row['sent_GiB']:.2f}",
            ]
            cells += [_range(row.get("seconds"), 1, ""), _range(row.get("mfu"), 100, "%")]
            cells.append(f"{row['date']}, {row['commit']}, {row['versions']}")
            lines.append(" | ".join((f"{head} | {pod.chips}", *cells)) + " |")
    return "\n".join(lines) + "\n"


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _memory(row: dict[str, Any]) -> str:
    return "does not fit" if row["memory_GiB"] is None else f"{row['memory_GiB']:.2f} of {row['hbm_GiB']:.2f}"


def _range(values: list[float | None] | None, factor: float, unit: str) -> str:
    if values is None or None in values:
        return "not known"
    low, likely, high = (value * factor for value in (min(values), sorted(values)[1], max(values)))
    return f"{likely:.3g}{unit} ({low:.3g} to {high:.3g})"
