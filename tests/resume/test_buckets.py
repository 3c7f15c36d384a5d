"""Everything in a bucket, through the command, against a server process on this machine: data, training, a kill,
resuming, a damaged checkpoint, evaluation, sampling and export."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import bucket_server
from tests.faults import tiny_run

pytest.importorskip("gcsfs", reason="needs gcsfs and gcp-storage-emulator (the extra test)")
pytest.importorskip("gcp_storage_emulator", reason="needs gcsfs and gcp-storage-emulator (the extra test)")

pytestmark = pytest.mark.slow

SAVED = Path(__file__).parent / "saved_by_0_1_0" / "files.tar.xz"
DATA, RUN = "gs://bucket/data/scenes", "gs://bucket/runs/vae"


class Machine:
    """Runs commands with a bucket server, in a working directory that must stay as it is."""

    def __init__(self, folder: Path, port: int):
        self.folder = folder
        self.environment = tiny_run.environment(folder / "compiled") | bucket_server.environment(port)
        self.environment |= {
            "JVGEN_CACHE": str(folder / "cache"), "PYTHONPATH": str(tiny_run.ROOT), "PYTHONUNBUFFERED": "1",
        }  # fmt: skip
        self.here = folder / "here"
        self.here.mkdir()

    def start(self, arguments: list[str]) -> subprocess.Popen:
        return subprocess.Popen(
            arguments, env=self.environment, cwd=self.here, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def jvgen(self, *arguments: object, code: int = 0) -> str:
        process = self.start(tiny_run.command(*arguments))
        output = process.communicate(timeout=600)[0]
        assert process.returncode == code, output
        return output

    def python(self, code: str) -> str:
        process = self.start([sys.executable, "-c", f"from jvgen import storage\n{code}"])
        output = process.communicate(timeout=100)[0]
        assert process.returncode == 0, output
        return output.splitlines()[-1] if output else ""

    def names(self, folder: str) -> list[str]:
        listed = f"print(__import__('json').dumps(sorted(p.name for p in storage.as_path({folder!r}).iterdir())))"
        return json.loads(self.python(listed))


@pytest.fixture(scope="module")
def machine(tmp_path_factory) -> Iterator[Machine]:
    port = tiny_run.free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.bucket_server", str(port)], cwd=tiny_run.ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        assert server.stdout.readline() == "ready\n"
        yield Machine(tmp_path_factory.mktemp("machine"), port)
    finally:
        server.kill()
        server.communicate()


def _train(data: object, workdir: object, steps: int) -> list[str]:
    sets = [*tiny_run.assignments(data), f"training.steps={steps}", "training.evaluate_every=0"]
    sets = [part for assignment in sets for part in ("--set", assignment)]
    return tiny_run.command("train", tiny_run.CONFIG, "--workdir", workdir, *sets)


def _losses(machine: Machine, path: str) -> list[tuple[int, float]]:
    text = machine.python(f"print(repr(storage.read_text(storage.as_path({path!r}))))")
    return [(row["step"], row["loss"]) for row in map(json.loads, eval(text).splitlines())]


def test_a_killed_run_in_a_bucket_continues_as_one_on_disk(machine, tmp_path):
    sizes = ["--train", 40, "--validation", 8, "--set", "height=16", "--set", "width=16", "--set", "frames=5"]
    machine.jvgen("data", "build", "scenes", "--out", DATA, *sizes)
    machine.jvgen("data", "build", "scenes", "--out", tmp_path / "scenes", *sizes)
    process = machine.start(_train(DATA, RUN, 40))
    end = time.monotonic() + 300
    while f"step {2 * tiny_run.SAVE_EVERY}" not in machine.python(
        f"print('step', *[p.name for p in storage.as_path('{RUN}/checkpoints').iterdir()] "
        f"if storage.as_path('{RUN}/checkpoints').exists() else '')"
    ):
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    resumed = machine.start(_train(DATA, RUN, 40))
    output = resumed.communicate(timeout=600)[0]
    assert resumed.returncode == 0, output
    assert "restored step" in output
    on_disk = machine.start(_train(tmp_path / "scenes", tmp_path / "vae", 40))
    assert on_disk.wait(600) == 0, on_disk.communicate()[0]
    on_disk.communicate()
    assert _losses(machine, f"{RUN}/metrics.jsonl") == _losses(machine, str(tmp_path / "vae" / "metrics.jsonl"))
    assert "config.json" in machine.names(RUN) and "lock.json" not in machine.names(RUN)


def test_a_damaged_checkpoint_is_moved_away(machine):
    path = f"{RUN}/checkpoints/40/digests/metadata"
    machine.python(f"storage.write_bytes(storage.as_path({path!r}), b'no'); print()")
    resumed = machine.start(_train(DATA, RUN, 41))
    output = resumed.communicate(timeout=600)[0]
    assert resumed.returncode == 0, output
    assert f"checkpoint {RUN}/checkpoints/40 is corrupt" in output
    assert machine.names(f"{RUN}/corrupt") == ["40"]
    assert "restored step 35" in output


def test_a_run_in_a_bucket_is_evaluated_and_exported(machine):
    machine.jvgen("evaluate", RUN, "--batches", 1, "--out", "gs://bucket/results/vae.json")
    assert machine.names("gs://bucket/results") == ["vae.json"]
    machine.jvgen("export", RUN, "--to", "gs://bucket/exported/vae")
    assert "model_index.json" in machine.names("gs://bucket/exported/vae")
    latents = ["--vae", "gs://bucket/exported/vae/vae", "--size", "16x16", "--out", "gs://bucket/data/latents"]
    machine.jvgen("data", "build", "latents", DATA, *latents)
    assert "dataset_info.json" in machine.names("gs://bucket/data/latents")
    assert "latents" in machine.jvgen("data", "show", "gs://bucket/data/latents", "--count", 1)


def test_clips_are_sampled_from_a_bucket_to_a_bucket(machine, tmp_path):
    shutil.unpack_archive(SAVED, tmp_path, filter="data")
    machine.python(
        f"storage.upload_folder(__import__('pathlib').Path({str(tmp_path)!r}), storage.as_path('gs://bucket/old'))"
    )
    config = json.loads((tmp_path / "runs/text_to_video/config.json").read_text())
    text = json.dumps(config)
    for name in os.listdir(tmp_path):
        text = text.replace(f'"{name}/', f'"gs://bucket/old/{name}/')
    (tmp_path / "config.json").write_text(text)
    machine.jvgen("train", tmp_path / "config.json", "--workdir", "gs://bucket/runs/text", "--stop-after", 1)
    machine.jvgen("sample", "gs://bucket/runs/text", "--prompt", "a red ball", "--out", "gs://bucket/clips")
    assert any(name.endswith(".mp4") for name in machine.names("gs://bucket/clips"))


def test_what_is_not_there_is_one_message(machine):
    missing = machine.jvgen("train", tiny_run.CONFIG, "--workdir", "gs://elsewhere/run", code=2)
    assert "the bucket gs://elsewhere does not exist" in missing and "Traceback" not in missing
    assert "unknown scheme ftp://" in machine.jvgen("train", tiny_run.CONFIG, "--workdir", "ftp://x/run", code=2)
    # Nothing of all this was written to a local folder.
    assert list(machine.here.iterdir()) == []
