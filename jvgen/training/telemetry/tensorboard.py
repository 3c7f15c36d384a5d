"""TensorBoard files of a run: scalars, the config as text, samples as animations."""

import contextlib
import io
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image

from jvgen import config, storage
from jvgen.storage import Path
from jvgen.training.telemetry.hooks import Hook, RunInfo
from jvgen.training.telemetry.run_files import SAMPLE_FRAME_RATE

FOLDER = "tensorboard"


class TensorBoard(Hook):
    """Writes the folder `tensorboard` of the run directory."""

    def __init__(self) -> None:
        self._writer: SummaryWriter | None = None

    def on_start(self, run: RunInfo) -> None:
        self._writer = SummaryWriter(run.workdir / FOLDER, run.start_step)
        self._writer.text(run.start_step, "config", config.dump(run.experiment))

    def on_step(self, row: Mapping[str, Any]) -> None:
        self._writer.scalars(row["step"], row)

    def on_evaluation(self, step: int, values: Mapping[str, float]) -> None:
        metrics = {name: value for name, value in values.items() if name != "seconds"}
        self._writer.scalars(step, metrics, "evaluation/")

    def on_samples(self, step: int, clips: Mapping[str, np.ndarray]) -> None:
        for name, batch in clips.items():
            self._writer.clips(step, name, batch)

    def on_report(self, name: str, step: int, values: Mapping[str, float]) -> None:
        self._writer.scalars(step, values, f"{name}/")

    def on_end(self, status: int | None) -> None:
        if self._writer is not None:
            self._writer.close()


class SummaryWriter:
    """A writer of TensorBoard event files; what an earlier start wrote for `start_step` and later is hidden.

    Files of a folder in a bucket are written locally and uploaded at intervals.
    """

    def __init__(self, folder: Path, start_step: int):
        self._mirror = storage.Mirror(folder)
        with _without_torch():
            from tensorboardX import SummaryWriter as EventWriter
        self._writer = EventWriter(str(self._mirror.local), purge_step=start_step or None, flush_secs=30)

    def scalars(self, step: int, values: Mapping[str, Any], prefix: str = "") -> None:
        """Write numbers; other values are left out."""
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._writer.add_scalar(f"{prefix}{name}", value, step)

    def text(self, step: int, name: str, content: str) -> None:
        """Write text, shown as code."""
        self._writer.add_text(name, "    " + content.replace("\n", "\n    "), step)

    def clips(self, step: int, name: str, clips: np.ndarray) -> None:
        """Write clips, uint8 `B F H W 3`, side by side: an animation, or a still image if there is one frame."""
        from tensorboardX.proto.summary_pb2 import Summary

        frames = np.concatenate(list(clips), axis=2)
        image = Summary.Image(
            height=frames.shape[1], width=frames.shape[2], colorspace=3,
            encoded_image_string=_encode_animation(frames, SAMPLE_FRAME_RATE),
        )  # fmt: skip
        self._writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)

    def close(self) -> None:
        self._writer.close()
        self._mirror.close()


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
    """tensorboardX imports torch if it is installed, for tensors that are never passed here: seconds and 200 MiB."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]
