"""Where numbers of a run go: JSON-lines files that never repeat a step, and TensorBoard."""

import contextlib
import io
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
from PIL import Image

from jvgen.tasks.task import Mean, Metrics


def to_host(metrics: Metrics) -> dict[str, float]:
    """Wait for metrics and return them as Python numbers; a `Mean` of nothing is left out."""
    values: dict[str, float] = {}
    for name, metric in jax.device_get(dict(metrics)).items():
        if isinstance(metric, Mean):
            if float(metric.count) > 0:
                values[name] = float(metric.total) / float(metric.count)
        elif np.issubdtype(np.asarray(metric).dtype, np.integer):
            values[name] = int(metric)
        else:
            values[name] = float(metric)
    return values


class RunningMeans:
    """Means of metrics over batches: `Mean` by its own count, other metrics by one each."""

    def __init__(self) -> None:
        self._totals: dict[str, float] = {}
        self._counts: dict[str, float] = {}

    def add(self, metrics: Metrics) -> None:
        """Add one batch's metrics (waits for them)."""
        for name, metric in jax.device_get(dict(metrics)).items():
            total, count = (metric.total, metric.count) if isinstance(metric, Mean) else (metric, 1)
            self._totals[name] = self._totals.get(name, 0.0) + float(total)
            self._counts[name] = self._counts.get(name, 0.0) + float(count)

    def result(self) -> dict[str, float]:
        """Means of everything that was counted."""
        return {name: self._totals[name] / count for name, count in self._counts.items() if count > 0}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file; a torn last line (of a killed run) is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


class RowLog:
    """A JSON-lines file with one object a step, floats at full precision.

    Opening it drops the rows of `start` and later: a run that goes on from a checkpoint writes them again.
    """

    def __init__(self, path: Path, start: int):
        kept = [row for row in read_rows(path) if row["step"] < start]
        partial = path.with_name(f"{path.name}.partial")
        with partial.open("w") as file:
            file.writelines(_line(row) for row in kept)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        self._file: TextIO = path.open("a")

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row; it has a "step"."""
        self._file.write(_line(row))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps({name: _plain(value) for name, value in row.items()}) + "\n"


def _plain(value: Any) -> Any:
    # JSON has no NaN: written as text, so that strict readers can read the file.
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


class Summaries:
    """TensorBoard files of a run; does nothing where `folder` is None."""

    def __init__(self, folder: Path | None, start: int):
        self._writer = None
        if folder is not None:
            with _without_torch():
                from tensorboardX import SummaryWriter
            # `purge_step` hides what a killed run wrote beyond its checkpoint.
            self._writer = SummaryWriter(str(folder), purge_step=start or None, flush_secs=30)

    def scalars(self, step: int, values: Mapping[str, Any], prefix: str = "") -> None:
        """Write numbers."""
        if self._writer is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._writer.add_scalar(f"{prefix}{name}", value, step)

    def text(self, step: int, name: str, content: str) -> None:
        """Write text, shown as code."""
        if self._writer is not None:
            self._writer.add_text(name, "    " + content.replace("\n", "\n    "), step)

    def clips(self, step: int, name: str, clips: np.ndarray, frames_per_second: int = 8) -> None:
        """Write clips, uint8 `B F H W 3`, side by side: a moving image, or a still one when there is one frame."""
        if self._writer is None:
            return
        from tensorboardX.proto.summary_pb2 import Summary

        frames = np.concatenate(list(clips), axis=2)
        image = Summary.Image(
            height=frames.shape[1], width=frames.shape[2], colorspace=3,
            encoded_image_string=_encode_animation(frames, frames_per_second),
        )  # fmt: skip
        self._writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _encode_animation(frames: np.ndarray, frames_per_second: int) -> bytes:
    """uint8 `F H W 3` as a GIF, which is TensorBoard's form of a video; one frame as a PNG."""
    images = [Image.fromarray(frame) for frame in frames]
    buffer = io.BytesIO()
    if len(images) == 1:
        images[0].save(buffer, format="PNG")
    else:
        images[0].save(
            buffer, format="GIF", save_all=True, append_images=images[1:], duration=1000 // frames_per_second, loop=0
        )
    return buffer.getvalue()


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """tensorboardX imports torch where it is installed, for tensors that it never gets here: seconds and 200 MiB."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]
