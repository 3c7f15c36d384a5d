"""Files of a run that hold every number and sample: metrics.jsonl, evaluation.jsonl, reports.jsonl, samples."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jvgen import storage
from jvgen.data.video_files import encode_image, encode_video
from jvgen.storage import Path
from jvgen.training.telemetry.hooks import Hook, RunInfo
from jvgen.training.telemetry.json_lines import JsonLinesFile

METRICS, EVALUATION, REPORTS, SAMPLES = "metrics.jsonl", "evaluation.jsonl", "reports.jsonl", "samples"
# Frames per second of written samples.
SAMPLE_FRAME_RATE = 8


class RunFiles(Hook):
    """Writes metrics.jsonl (one row per step), evaluation.jsonl (one row per evaluation), reports.jsonl (times of each
    start, goodput) and `samples/step_.../`.
    """

    def __init__(self) -> None:
        self._metrics: JsonLinesFile | None = None
        self._evaluation: JsonLinesFile | None = None
        self._reports: JsonLinesFile | None = None

    def on_start(self, run: RunInfo) -> None:
        self._samples = run.workdir / SAMPLES
        self._metrics = JsonLinesFile(run.workdir / METRICS, run.start_step)
        # Evaluations at the start step belong to the checkpoint of that step: they are kept.
        self._evaluation = JsonLinesFile(run.workdir / EVALUATION, run.start_step + 1)
        # About the time of every start, also of steps that were done again.
        self._reports = JsonLinesFile(run.workdir / REPORTS)

    def on_step(self, row: Mapping[str, Any]) -> None:
        self._metrics.write(row)

    def on_evaluation(self, step: int, values: Mapping[str, float]) -> None:
        self._evaluation.write({"step": step, **values})

    def on_checkpoint(self, step: int) -> None:
        # A start that resumes there must find the rows before it.
        for file in (self._metrics, self._evaluation, self._reports):
            file.sync()

    def on_samples(self, step: int, clips: Mapping[str, np.ndarray]) -> None:
        write_samples(self._samples, step, clips)

    def on_report(self, name: str, step: int, values: Mapping[str, float]) -> None:
        self._reports.write({"step": step, "report": name, **values})

    def on_end(self, status: int | None) -> None:
        for file in (self._metrics, self._evaluation, self._reports):
            if file is not None:
                file.close()


def write_samples(folder: Path, step: int, clips: Mapping[str, np.ndarray]) -> None:
    """Write clips as mp4 and single frames as png: `folder/step_00001000/NAME_0.mp4`."""
    target = folder / f"step_{step:08d}"
    for name, batch in clips.items():
        for number, clip in enumerate(batch):
            if clip.shape[0] == 1:
                storage.write_bytes(target / f"{name}_{number}.png", encode_image(clip[0]))
            else:
                storage.write_bytes(target / f"{name}_{number}.mp4", encode_video(clip, SAMPLE_FRAME_RATE))
