"""Checkpoints: every corrupt byte is detected and named, no valid checkpoint is lost, any layout restores."""

import gc
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jvgen.config import ConfigError
from jvgen.training.checkpoint import digest
from jvgen.training.checkpoint.manager import Checkpoints
from jvgen.training.checkpoint.reader import CheckpointError, CheckpointReader
from jvgen.training.config import CheckpointConfig

# Orbax leaves coroutines behind when one of several concurrent reads fails, which is what happens to corrupt files.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <coroutine object:pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(autouse=True)
def collected():
    """Left-behind coroutines are collected within the test that left them."""
    yield
    gc.collect()


def mesh_of(count: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:count]), ("fsdp",))


def arrays_at(step: int, mesh: Mesh | None = None) -> dict[str, jax.Array]:
    rng = np.random.default_rng(step)
    mesh = mesh or mesh_of(1)
    values = {
        "step": np.int32(step),
        "parameters/net/kernel": rng.standard_normal((16, 8)).astype(np.float32),
        "ema/0.99/net/kernel": rng.standard_normal((16, 8)).astype(np.float32),
        "optimizer/model/adam/mu/net/bias": rng.standard_normal(8).astype(np.float32),
    }
    place = {0: PartitionSpec(), 1: PartitionSpec("fsdp"), 2: PartitionSpec("fsdp")}
    return {name: jax.device_put(v, NamedSharding(mesh, place[np.ndim(v)])) for name, v in values.items()}


def wanted_on(mesh: Mesh, transpose: bool = False) -> dict[str, jax.ShapeDtypeStruct]:
    def spec(value):
        if value.ndim == 2:
            return PartitionSpec(None, "fsdp") if transpose else PartitionSpec("fsdp")
        return PartitionSpec("fsdp") if value.ndim else PartitionSpec()

    return {
        name: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=NamedSharding(mesh, spec(v)))
        for name, v in arrays_at(0).items()
    }


def save(folder: Path, *steps: int, config: CheckpointConfig | None = None, log=print, mesh=None) -> None:
    manager = Checkpoints(folder, config or CheckpointConfig(keep_last=10), log=log)
    for step in steps:
        manager.save(step, arrays_at(step, mesh), {"step": step}, {"name": "run"})
    manager.close()


def restore(folder: Path, log=print, mesh=None, **options):
    manager = Checkpoints(folder, CheckpointConfig(), log=log)
    try:
        return manager.restore(wanted_on(mesh or mesh_of(1)), **options)
    finally:
        manager.close()


def assert_is(restored, step: int) -> None:
    assert restored.step == step and restored.data == {"step": step} and restored.run == {"name": "run"}
    for name, value in arrays_at(step).items():
        assert np.array_equal(np.asarray(restored.arrays[name]), np.asarray(value)), name


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("two")
    save(folder, 1, 2)
    return folder


@pytest.fixture
def copy(two, tmp_path):
    shutil.copytree(two, tmp_path / "run")
    return tmp_path / "run"


def files_of(folder: Path, step: int) -> list[Path]:
    return sorted(path for path in (folder / "checkpoints" / str(step)).rglob("*") if path.is_file())


def test_without_checkpoints_there_is_nothing_to_restore(tmp_path):
    assert restore(tmp_path) is None


def test_the_latest_is_restored(copy):
    assert_is(restore(copy), 2)


@pytest.mark.parametrize(("devices", "transpose"), [(8, False), (4, True), (1, False)])
def test_any_layout_restores_any_other(tmp_path, devices, transpose):
    save(tmp_path, 3, mesh=mesh_of(8))
    manager = Checkpoints(tmp_path, CheckpointConfig())
    wanted = wanted_on(mesh_of(devices), transpose)
    restored = manager.restore(wanted)
    manager.close()
    assert_is(restored, 3)
    for name, want in wanted.items():
        assert restored.arrays[name].sharding.is_equivalent_to(want.sharding, len(want.shape)), name


def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path):
    """The next step overwrites the buffers while the checkpoint is still being written."""
    manager = Checkpoints(tmp_path, CheckpointConfig(keep_last=10))
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    rng = np.random.default_rng(0)
    expected = rng.standard_normal((1024, 1024)).astype(np.float32)
    value = jax.device_put(expected)
    manager.save(1, {"x": value}, {}, {})
    for _ in range(5):
        value = overwrite(value)
    value.block_until_ready()
    manager.wait()
    want = {"x": jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=NamedSharding(mesh_of(1), PartitionSpec()))}
    found = manager.restore(want)
    manager.close()
    assert np.array_equal(np.asarray(found.arrays["x"]), expected)


def test_a_flipped_bit_in_any_file_is_harmless_or_falls_back(two, tmp_path):
    """Three bits of every file: what is restored is exactly step 2, or exactly step 1 with step 2 quarantined."""
    outcomes = {}
    for number, original in enumerate(files_of(two, 2)):
        name = original.relative_to(two / "checkpoints" / "2")
        if not original.stat().st_size:
            continue
        rng = np.random.default_rng(number)
        data = bytearray(original.read_bytes())
        for where in rng.integers(0, len(data), 3):
            data[where] ^= 1 << int(rng.integers(8))
        folder = tmp_path / str(number)
        shutil.copytree(two, folder)
        (folder / "checkpoints" / "2" / name).write_bytes(data)
        logged = []
        restored = restore(folder, logged.append)
        assert_is(restored, restored.step)
        outcomes[str(name)] = restored.step
        if restored.step == 1:
            assert "checkpoints/2 is corrupt" in logged[0] and (folder / "corrupt" / "2").is_dir()
            assert [p.name for p in (folder / "checkpoints").iterdir()] == ["1"]
    assert {Path(name).parts[0] for name, step in outcomes.items() if step == 1} >= {"state", "data", "run", "digests"}


def test_corrupt_values_are_named(copy):
    """Valid files with a wrong value in one array, such as that of another run."""
    manager = Checkpoints(copy, CheckpointConfig(keep_last=10))
    wrong = dict(arrays_at(3))
    real = digest.finish
    try:

        def lying(words):
            found = real(words)
            return found | {"ema/0.99/net/kernel": "0" * 16}

        digest.finish = lying
        manager.save(3, wrong, {"step": 3}, {"name": "run"})
    finally:
        digest.finish = real
    manager.close()
    logged = []
    assert_is(restore(copy, logged.append), 2)
    assert "corrupt array: ema/0.99/net/kernel" in logged[0] and "checkpoints/3" in logged[0]


def test_truncated_and_deleted_files_fall_back(two, tmp_path):
    for number, original in enumerate(files_of(two, 2)):
        for kind in ("truncated", "deleted"):
            folder = tmp_path / f"{kind}{number}"
            shutil.copytree(two, folder)
            path = folder / original.relative_to(two)
            if kind == "deleted":
                path.unlink()
            else:
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            restored = restore(folder, lambda text: None)
            assert_is(restored, restored.step)


def test_when_all_are_corrupt_the_run_stops(copy):
    for step in (1, 2):
        for path in files_of(copy, step):
            if path.parent.name == "d":
                path.write_bytes(b"")
    logged = []
    with pytest.raises(CheckpointError, match=r"none of the checkpoints \[1, 2\] is valid"):
        restore(copy, logged.append)
    assert len(logged) == 2 and sorted(p.name for p in (copy / "corrupt").iterdir()) == ["1", "2"]


def test_an_incomplete_folder_is_not_a_fresh_start(tmp_path):
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="none of the checkpoints"):
        restore(tmp_path, lambda text: None)


def test_leftovers_of_a_killed_save_are_deleted(copy):
    left = copy / "checkpoints" / "3.orbax-checkpoint-tmp"
    shutil.copytree(copy / "checkpoints" / "2", left)
    assert_is(restore(copy), 2)
    # Orbax deletes in the background, and waits for it before it saves.
    until = time.monotonic() + 30
    while left.exists() and time.monotonic() < until:
        time.sleep(0.01)
    assert not left.exists()


def test_reading_for_inference_changes_nothing_on_disk(copy):
    for path in files_of(copy, 2):
        if path.parent.name == "d":
            path.write_bytes(b"")
    before = sorted(copy.rglob("*"))
    manager = CheckpointReader(copy, log=lambda text: None)
    assert_is(manager.restore(wanted_on(mesh_of(1))), 1)
    manager.close()
    assert sorted(copy.rglob("*")) == before


@pytest.mark.parametrize("relative", [False, True])
def test_one_checkpoint_can_be_named(copy, monkeypatch, relative):
    folder = copy / "checkpoints" / "1"
    if relative:
        monkeypatch.chdir(folder)
        folder = Path(".")
    reader = CheckpointReader(folder)
    assert_is(reader.restore(wanted_on(mesh_of(1))), 1)
    assert reader.contents()[0] == reader.contents(1)[0] == 1
    for read in (lambda: reader.contents(2), lambda: reader.restore(wanted_on(mesh_of(1)), step=2)):
        with pytest.raises(
            CheckpointError, match="step 2 is asked for, but .*checkpoints/1 is the checkpoint of step 1"
        ):
            read()
    reader.close()


def test_a_corrupt_checkpoint_that_was_named_is_not_replaced_by_another(copy):
    for path in files_of(copy, 2):
        if path.parent.name == "d":
            path.write_bytes(b"")
    reader = CheckpointReader(copy / "checkpoints" / "2", log=lambda text: None)
    with pytest.raises(CheckpointError, match="none of the checkpoints \\[2\\] is valid"):
        reader.restore(wanted_on(mesh_of(1)))
    reader.close()


@pytest.mark.parametrize(
    ("folder", "said"),
    [("checkpoints/3", "no checkpoint of step 3; its steps are"), ("checkpoints", "RUN/checkpoints/STEP")],
)
def test_folders_that_are_no_checkpoint_are_refused(copy, folder, said):
    with pytest.raises(CheckpointError, match=said):
        CheckpointReader(copy / folder)


@pytest.mark.parametrize("part", ["_arrays", "_documents"])
@pytest.mark.parametrize("left", ["nothing", "a part"])
def test_a_reader_beside_a_run_takes_the_newer_one_when_its_own_is_deleted(tmp_path, monkeypatch, part, left):
    """The run keeps one checkpoint: it writes step 2 and deletes step 1 while another process reads that."""
    save(tmp_path, 1)
    told = []
    reader = CheckpointReader(tmp_path, log=told.append)
    real = getattr(reader, part)

    def overtaken(step: int, *arguments):
        if step == 1:
            save(tmp_path, 2)
            for path in sorted((tmp_path / "checkpoints" / "1").iterdir()):
                if left == "nothing" or path.is_dir():
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            if left == "nothing":
                (tmp_path / "checkpoints" / "1").rmdir()
        return real(step, *arguments)

    monkeypatch.setattr(reader, part, overtaken)
    if part == "_documents":
        assert reader.contents()[0] == 2
    else:
        assert_is(reader.restore(wanted_on(mesh_of(1))), 2)
    reader.close()
    assert not told or left == "a part"


def test_a_step_that_is_deleted_while_it_is_read_is_named(tmp_path, monkeypatch):
    save(tmp_path, 1, 2)
    reader = CheckpointReader(tmp_path)
    real = reader._arrays

    def overtaken(step: int, *arguments):
        shutil.rmtree(tmp_path / "checkpoints" / "1")
        return real(step, *arguments)

    monkeypatch.setattr(reader, "_arrays", overtaken)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 1; its steps are \[2\]"):
        reader.restore(wanted_on(mesh_of(1)), step=1)
    reader.close()


def test_arrays_that_do_not_fit_are_all_listed(copy):
    wanted = wanted_on(mesh_of(1))
    wanted["parameters/other"] = wanted.pop("parameters/net/kernel")
    bias = wanted["optimizer/model/adam/mu/net/bias"]
    wanted["optimizer/model/adam/mu/net/bias"] = jax.ShapeDtypeStruct((9,), jnp.bfloat16, sharding=bias.sharding)
    manager = Checkpoints(copy, CheckpointConfig())
    with pytest.raises(ConfigError) as caught:
        manager.restore(wanted)
    manager.close()
    for part in ("parameters/other", "not in this run: parameters/net/kernel", "(8,) float32, this run (9,) bfloat16"):
        assert part in str(caught.value)
    assert sorted(p.name for p in (copy / "checkpoints").iterdir()) == ["1", "2"], "it is not corrupt, it stays"


def test_a_part_can_be_read_alone(copy):
    manager = CheckpointReader(copy)
    wanted = {"ema/0.99/net/kernel": wanted_on(mesh_of(1))["ema/0.99/net/kernel"]}
    found = manager.restore(wanted, step=1, partial=True)
    with pytest.raises(CheckpointError, match="no checkpoint of step 7; its steps are"):
        manager.restore(wanted, step=7, partial=True)
    manager.close()
    assert found.step == 1 and list(found.arrays) == list(wanted)


def test_keep_rules(tmp_path):
    config = CheckpointConfig(every=1, keep_last=2, keep_every=4, best_metric="loss")
    manager = Checkpoints(tmp_path, config)
    for step, loss in enumerate([5.0, 4.0, 1.0, 3.0, float("nan"), 2.0, 6.0, 7.0, 8.0], start=1):
        manager.record_evaluation(step, {"loss": loss})
        manager.save(step, arrays_at(step), {}, {})
    manager.close()
    assert CheckpointReader(tmp_path).steps() == [3, 4, 8, 9]


def test_saving_a_step_twice_does_nothing(copy):
    manager = Checkpoints(copy, CheckpointConfig(keep_last=10))
    assert manager.save(2, arrays_at(9), {}, {}) == 0.0
    manager.close()
    assert_is(restore(copy), 2)


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", folder]).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("policy", ["continue", "stop"])
def test_a_full_disk_leaves_the_older_checkpoints(small_disk, policy):
    logged = []
    config = CheckpointConfig(keep_last=2, on_failed_save=policy)
    save(small_disk, 1, config=config, log=logged.append)
    manager = Checkpoints(small_disk, config, log=logged.append)
    big = {"x": jax.random.normal(jax.random.key(0), (2**21,))}
    manager.save(2, big, {}, {})
    if policy == "stop":
        with pytest.raises(CheckpointError, match="step 2.*no space left on device.*Intact checkpoints: 1.*stops here"):
            manager.wait()
    else:
        deadline = time.monotonic() + 20
        while not logged and time.monotonic() < deadline:
            manager.poll()
            time.sleep(0.01)
        assert (
            "step 2" in logged[0] and "no space left on device" in logged[0] and "Intact checkpoints: 1." in logged[0]
        )
        manager.save(3, arrays_at(3), {"step": 3}, {"name": "run"})
        assert manager.wait() and manager.steps() == [1, 3]
    manager.close()
    assert not list((small_disk / "checkpoints").glob("*tmp*")), "the failed save freed its space"
    assert_is(restore(small_disk), 3 if policy == "continue" else 1)


def test_a_writer_that_fails_is_reported_without_a_small_disk(copy, monkeypatch):
    logged = []
    manager = Checkpoints(copy, CheckpointConfig(keep_last=10), log=logged.append)

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manager._manager, "save", full)
    manager.save(3, arrays_at(3), {}, {})
    assert "no space left on device" in logged[0] and "1, 2" in logged[0]
    monkeypatch.undo()
    manager.save(4, arrays_at(4), {"step": 4}, {"name": "run"})
    manager.close()
    assert_is(restore(copy), 4)


def test_documents_are_plain_json(two):
    text = (two / "checkpoints" / "2" / "digests" / "metadata").read_text()
    arrays = json.loads(text)["arrays"]
    assert set(arrays) == set(arrays_at(2)) and all(len(entry["digest"]) == 16 for entry in arrays.values())
