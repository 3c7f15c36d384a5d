"""`jvgen demo`: the whole way on a small scale, as the commands that a user would type, and a report of what came out.

An image VAE is trained and grown into a causal video VAE that shares its latents; a video DiT is trained on the video
VAE's latents, four frames for one, and what it makes is decoded by either. Every part is a `jvgen` command in a process
of its own; the image VAE and the DiT are interrupted once, one by SIGKILL and one by SIGTERM, and go on. Parts that are
done already are not done again.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from jvgen.demo.report import write_report

# Eight latent frames of the video VAE: one of the first frame, then four frames for one.
FRAMES, SIZE = 29, 32
SCENES = (
    f"frames={FRAMES}", f"height={SIZE}", f"width={SIZE}", "background=plain", "wander=0.0", "shapes=ball,cube",
    "colors=red,yellow,green,blue,purple,cyan",
)  # fmt: skip
TRAIN_SCENES, HELD_OUT_SCENES = 900, 64
CLIPS_PER_PROMPT = 2
# The environment of every part: one compilation cache, so that a resumed run does not compile again.
CACHE = "compilation_cache"


class DemoFailed(RuntimeError):
    """A part of the demo ended with an unexpected status."""


def demo(workdir: Path, configs: Path) -> int:
    """Run all parts below `workdir` and write `workdir/report.html`.

    Args:
      workdir: gets data sets, runs, exports, samples, a log of commands and the report.
      configs: folder with `demo_image_vae.py`, `demo_cv_vae.py` and `demo_text_to_video.py`.

    Raises:
      ValueError: the config files are not there.
      DemoFailed: a part failed; its output is in `workdir/logs`.
    """
    for name in ("demo_image_vae.py", "demo_cv_vae.py", "demo_text_to_video.py"):
        if not (configs / name).is_file():
            raise ValueError(
                f"{configs / name}: no such file; run the demo in a checkout, or name the folder with --configs."
            )
    workdir.mkdir(parents=True, exist_ok=True)
    parts = Parts(workdir)
    scenes, latents = workdir / "scenes", workdir / "latents"
    image_run, vae_run, run = workdir / "image_vae", workdir / "video_vae", workdir / "text_to_video"
    export = workdir / "export"
    image_vae, video_vae = export / "image_vae" / "vae", export / "video_vae" / "vae"
    size = f"{SIZE}x{SIZE}"

    sets = [word for field in SCENES for word in ("--set", field)]
    parts.run(
        "data", ["data", "build", "scenes", "--out", scenes, "--train", TRAIN_SCENES, "--validation", HELD_OUT_SCENES,
                 "--overwrite", *sets],
    )  # fmt: skip
    parts.run("data_show", ["data", "show", scenes, "--out", workdir / "pictures"])

    train = ["train", configs / "demo_image_vae.py", "--workdir", image_run, *_data(scenes)]
    parts.interrupt("train_image_vae", train, image_run, signal.SIGKILL)
    parts.run("evaluate_image_vae", ["evaluate", image_run, "--batches", 8, "--out", workdir / "image_vae.json"])
    parts.run("export_image_vae", ["export", image_run, "--to", export / "image_vae"])

    grown = [configs / "demo_cv_vae.py", *_data(scenes), "--set", f"task.image_vae_weights={image_vae}"]
    parts.run("inflate", ["import", image_vae, "--inflate", "--config", *grown, "--to", vae_run])
    parts.run("train_video_vae", ["train", *grown, "--workdir", vae_run])
    parts.run("export_video_vae", ["export", vae_run, "--to", export / "video_vae"])
    parts.run(
        "evaluate_video_vae",
        ["evaluate", "--vae", video_vae, "--image-vae", image_vae, "--data", scenes, "--frames", FRAMES, "--size", size,
         "--batch", 8, "--batches", 4, "--out", workdir / "video_vae_evaluation"],
    )  # fmt: skip

    parts.run(
        "latents",
        ["data", "build", "latents", scenes, "--vae", video_vae, "--size", size, "--out", latents, "--overwrite"],
    )
    statistics = json.loads((latents / "latent_statistics.json").read_text())
    train = [
        "train", configs / "demo_text_to_video.py", "--workdir", run, *_data(latents),
        "--set", f"task.vae_weights={video_vae}",
        "--set", f"task.latent_shift={statistics['mean']:.6g}",
        "--set", f"task.latent_scale={1 / statistics['deviation']:.6g}",
    ]  # fmt: skip
    parts.interrupt("train_text_to_video", train, run, signal.SIGTERM)
    parts.run("evaluate_text_to_video", ["evaluate", run, "--batches", 2, "--out", workdir / "text_to_video.json"])

    prompts = workdir / "prompts.txt"
    prompts.write_text("".join(f"{prompt}\n" for prompt in demo_prompts()))
    sample = ["sample", run, "--prompts", prompts, "--batch", 24, "--seed", 1]
    several = [*sample, "--num", CLIPS_PER_PROMPT]
    parts.run("sample", [*several, "--out", workdir / "samples"])
    # The same seed gives the same latents; the image VAE's decoder makes one frame of each.
    parts.run("sample_swapped", [*several, "--vae", image_vae, "--out", workdir / "samples_swapped"])
    parts.run("sample_untrained", [*sample, "--untrained", "--out", workdir / "samples_untrained"])

    parts.run("export_text_to_video", ["export", run, "--to", export / "text_to_video"])
    if _has_torch():
        parts.run("verify_image_vae", ["verify", image_vae])
        parts.run("verify_denoiser", ["verify", export / "text_to_video" / "denoiser"])

    report = write_report(workdir, parts.log)
    print(f"report: {report}")
    return 0


def demo_prompts() -> list[str]:
    """One caption for every colour and direction of the demo's scenes, in the words of the training captions."""
    from jvgen.data.scenes.labels import Labels, captions_of

    colors = next(field for field in SCENES if field.startswith("colors=")).removeprefix("colors=").split(",")
    shapes = ("ball", "cube")
    prompts = []
    for number, color in enumerate(colors):
        for turn, direction in enumerate(("left", "right", "toward", "away")):
            labels = Labels(color=color, shape=shapes[(number + turn) % 2], direction=direction)
            prompts.append(captions_of("dynamic", labels)[0])
    return prompts


class Parts:
    """Runs the parts and keeps a log of them: name, command, seconds, status, and whether it was interrupted."""

    def __init__(self, workdir: Path):
        self._workdir = workdir
        self._logs = workdir / "logs"
        self._logs.mkdir(exist_ok=True)
        self._path = workdir / "parts.json"
        self.log: list[dict] = json.loads(self._path.read_text()) if self._path.exists() else []

    def run(self, name: str, words: Sequence[object]) -> None:
        """Run one command to its end, unless an earlier demo in this folder did; its `--to` folder begins empty."""
        if self._done(name):
            print(f"[{name}] done before")
            return
        if "--to" in words and (self._logs / f"{name}.log").exists():
            # What a part that was killed had begun to write stands in its way.
            shutil.rmtree(words[words.index("--to") + 1], ignore_errors=True)
        began = time.perf_counter()
        self._announce(name, words)
        status = self._start(name, words).wait()
        self._note(name, words, began, status)
        if status != 0:
            raise DemoFailed(f"part {name} ended with status {status}:\n{self._tail(name)}")

    def interrupt(self, name: str, words: Sequence[object], run: Path, by: signal.Signals) -> None:
        """Run a training command, send it a signal after its first checkpoint, and run the same command again."""
        first = f"{name}_interrupted"
        if not self._done(first) and not self._done(name):
            began = time.perf_counter()
            self._announce(first, words)
            process = self._start(first, words)
            while process.poll() is None and not _checkpoints(run):
                time.sleep(0.2)
            if process.poll() is None:
                print(f"[{first}] sending {by.name}")
                process.send_signal(by)
            status = process.wait()
            self._note(first, words, began, status, interrupted_by=by.name)
            expected = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 75}[by]
            if status not in (expected, 0):
                raise DemoFailed(f"part {first} ended with status {status}, not {expected}:\n{self._tail(first)}")
        self.run(name, words)

    def _done(self, name: str) -> bool:
        return any(part["name"] == name and (part["status"] == 0 or "interrupted_by" in part) for part in self.log)

    def _announce(self, name: str, words: Sequence[object]) -> None:
        print(f"[{name}] {command_line(words)}", flush=True)

    def _start(self, name: str, words: Sequence[object]) -> subprocess.Popen:
        environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str((self._workdir / CACHE).absolute()),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1",
            "PYTHONUNBUFFERED": "1",
            # glibc would give the memory of every step back to the system and fetch it anew: a tenth of a step's time.
            "MALLOC_MMAP_MAX_": "0",
            "MALLOC_TRIM_THRESHOLD_": str(1 << 36),
        }
        arguments = [sys.executable, "-m", "jvgen.cli", *(str(word) for word in words)]
        with (self._logs / f"{name}.log").open("w") as log:
            return subprocess.Popen(arguments, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def _note(self, name: str, words: Sequence[object], began: float, status: int, **more: object) -> None:
        seconds = time.perf_counter() - began
        self.log.append({"name": name, "command": command_line(words), "seconds": seconds, "status": status} | more)
        self._path.write_text(json.dumps(self.log, indent=1))
        print(f"[{name}] {seconds:.1f} s", flush=True)

    def _tail(self, name: str) -> str:
        return "\n".join((self._logs / f"{name}.log").read_text(errors="replace").splitlines()[-25:])


def command_line(words: Sequence[object]) -> str:
    """The command as a user would type it."""
    return "jvgen " + shlex.join(str(word) for word in words)


def _data(folder: Path) -> list[object]:
    return ["--set", f"data.sources.0.path={folder}", "--set", f"data.evaluation_sources.0.path={folder}"]


def _checkpoints(run: Path) -> list[Path]:
    folder = run / "checkpoints"
    return [path for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []


def _has_torch() -> bool:
    import importlib.util

    return all(importlib.util.find_spec(name) is not None for name in ("torch", "diffusers"))
