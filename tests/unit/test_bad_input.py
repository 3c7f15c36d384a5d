"""Invalid input gets one clear message before a device is used, and existing files are not changed."""

import dataclasses
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jvgen import config
from jvgen.data.builders.latents import LatentsConfig, build_latents
from jvgen.data.builders.scenes import build_scenes
from jvgen.data.scenes.scenes import SceneConfig
from jvgen.data.stream.loader import Loader
from jvgen.data.video_files import encode_video
from jvgen.interop.digest import content_digest
from jvgen.interop.safetensors_file import SafetensorsFile, TensorSpec, write
from jvgen.training.checkpoint.manager import Checkpoints
from jvgen.training.program import Program

pytestmark = pytest.mark.usefixtures("quick_compilations", "nothing_is_compiled")
ROOT = Path(__file__).parents[2]
COMPILE = ("compile", ROOT / "configs/cogvideox_2b.py", "--topology")


@dataclasses.dataclass(frozen=True)
class World:
    """Valid inputs, and corrupt ones beside them.

    Attributes:
      root: everything is below it.
      vae, video: arguments of a valid `jvgen train CONFIG --set ...`.
      scenes, latents: data sets.
      weights, other_weights: exported VAEs, the same network twice; the latents are those of the first.
      run: run directory of the image VAE at step 0.
    """

    root: Path
    vae: list[str]
    video: list[str]
    scenes: Path
    latents: Path
    weights: Path
    other_weights: Path
    run: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory, jvgen, scenes, vae_words, video_words, vae_folder, quick_compilations) -> World:
    root = tmp_path_factory.mktemp("world")
    weights, latents, run = vae_folder(0), root / "latents", root / "run"
    shape = (2, 8, 8, 8)
    build_latents(
        scenes, latents, lambda frames: np.zeros((len(frames), *shape[1:]), np.float32),
        LatentsConfig(sizes=((16, 16),)), encoder_digest=content_digest(weights), workers=1,
    )  # fmt: skip
    assert jvgen("import", weights, "--config", *vae_words, "--to", run).status == 0
    shutil.copytree(scenes, root / "scenes2")
    (root / "empty").mkdir()
    (root / "file").write_text("not a folder")
    (root / "no_experiment.py").write_text("experiment = 3\n")
    (root / "other_thing.py").write_text("def experiment():\n    return {'name': 'x'}\n")
    (root / "latin.txt").write_bytes("a fox\ncaf\xe9\n".encode("latin-1"))
    (root / "notes.txt").write_text("def experiment(): ...")
    _videos(root)
    _weights(root, weights)
    return World(root, vae_words, video_words(latents, weights), scenes, latents, weights, vae_folder(1), run)


def _videos(root: Path) -> None:
    """A folder with a valid clip, an empty file and a corrupt one; another whose valid clip has no caption."""
    clip = encode_video(np.random.default_rng(0).integers(0, 255, (6, 16, 16, 3), dtype=np.uint8), 8)
    for name in ("videos", "uncaptioned"):
        (root / name).mkdir()
        (root / name / "valid.mp4").write_bytes(clip)
    (root / "videos" / "empty.mp4").write_bytes(b"")
    (root / "videos" / "corrupt.mp4").write_bytes(clip[: len(clip) // 3])
    (root / "videos" / "captions.csv").write_text(
        "file,caption\n" + "".join(f"{n}.mp4,x\n" for n in ("valid", "empty", "corrupt"))
    )


def _weights(root: Path, valid: Path) -> None:
    """Folders like the valid one: with three errors at once, with a pickle, truncated, and of another class."""
    file = "diffusion_pytorch_model.safetensors"
    tensors = dict(SafetensorsFile(valid / file))
    first, second, *_ = sorted(tensors)
    del tensors[first]
    tensors[second] = np.zeros((3, 3), np.float32)
    tensors["encoder.surplus.weight"] = np.zeros(4, np.float32)
    for name in ("misfit", "pickled", "truncated", "stranger"):
        (root / name).mkdir()
        shutil.copy(valid / "config.json", root / name)
    write(root / "misfit" / file, {n: TensorSpec(t.shape, t.dtype) for n, t in tensors.items()}, tensors.items())
    (root / "pickled" / "diffusion_pytorch_model.bin").write_bytes(
        pickle.dumps({"encoder.conv_in.weight": Evil()}, protocol=2)
    )
    (root / "truncated" / file).write_bytes((valid / file).read_bytes()[:-100])
    (root / "stranger" / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))


class Evil:
    """Unpickling it would write a file."""

    def __reduce__(self):
        return (Path.touch, (Path("unpickled"),))


@dataclasses.dataclass(frozen=True)
class Case:
    """Arguments of a command, and parts of its error message."""

    words: Callable[[World], list]
    expected: tuple[str, ...]


def train(*changes: str, which: str = "vae") -> Callable[[World], list]:
    """`jvgen train` of a valid config with some invalid `--set`."""

    def words(w: World) -> list:
        set_words = [word for change in changes for word in ("--set", change.format(w=w))]
        return ["train", *getattr(w, which), *set_words, "--workdir", w.root / "new_run"]

    return words


def resume(*changes: str) -> Callable[[World], list]:
    """The same in the run directory of an existing run."""
    return lambda w: [*train(*changes)(w)[:-1], w.run]


def video(*changes: str) -> Callable[[World], list]:
    return train(*changes, which="video")


CASES = {
    # Configs.
    "config misspelled": Case(
        lambda w: ["train", ROOT / "configs/demo_imag_vae.py", "--workdir", w.root / "x"],
        ("demo_imag_vae.py", "does not exist", "Did you mean", "demo_image_vae.py"),
    ),
    "run directory below a file": Case(
        lambda w: ["train", *w.vae, "--workdir", w.root / "file" / "run"], ("file/run", "file is a file; name a folder")
    ),
    "run directory is a data set": Case(
        lambda w: ["train", *w.vae, "--workdir", w.root / "scenes2"], ("scenes2: holds a data set; name another",)
    ),
    "config without experiment": Case(
        lambda w: ["config", "show", w.root / "no_experiment.py"], ("no_experiment.py", "function experiment()")
    ),
    "config of another type": Case(
        lambda w: ["config", "show", w.root / "other_thing.py"], ("other_thing.py", "dict", "Experiment")
    ),
    "config not python": Case(lambda w: ["config", "show", w.root / "notes.txt"], ("notes.txt", "Python file")),
    "field misspelled": Case(train("training.stepz=3"), ("training.stepz", "Did you mean steps")),
    "field of the wrong type": Case(train("training.steps=three"), ("training.steps = 'three'", "expected int")),
    "unknown choice": Case(train("optimizer.kind=sgd"), ("optimizer.kind = 'sgd'", "'adamw'", "'muon'")),
    "group of fields": Case(train("optimizer=adamw"), ("optimizer = 'adamw'", "group of fields", "optimizer.X")),
    "no value": Case(train("training.steps"), ("'training.steps'", "PATH=VALUE")),
    "index out of range": Case(train("data.buckets.4.frames=1"), ("data.buckets.4.frames", "not an index")),
    "steps below one": Case(train("training.steps=0"), ("training", "steps = 0", "at least 1")),
    # What does not divide.
    "mesh and devices": Case(train("mesh.tensor=3"), ("tensor=3", "multiple of 3 devices", "there are 8")),
    "mesh larger than devices": Case(train("mesh.fsdp=16"), ("needs 16 devices", "there are 8", "-1")),
    "batch and mesh": Case(
        train("data.buckets.0.batch_size=12"), ("batch_size = 12", "multiple of 8", "nearest are 8 and 16")
    ),
    "batch and accumulation": Case(
        train("training.accumulation=3"), ("batch_size = 8", "training.accumulation = 3", "change one")
    ),
    "heads and width": Case(video("task.text.encoder.heads=3"), ("heads = 3", "width = 16", "divisor")),
    "heads and mesh": Case(
        video("mesh.tensor=4", "data.buckets.0.batch_size=4"), ("mesh.tensor = 4", "does not divide 2", "heads")
    ),
    "frames and compression": Case(
        video("task.vae=none", "task.vae_weights=none", "task.temporal_compression=4"),
        ("frames = 4", "4n + 1", "take 1"),
    ),
    "resolution and VAE": Case(train("data.buckets.0.height=15"), ("height = 15", "multiple of 2", "take 14")),
    "resolution and patches": Case(video("data.buckets.0.width=10"), ("width = 10", "multiple of 4", "take 8")),
    # Data.
    "clip too short": Case(
        train("data.buckets.0.frames=9"), ("1x9x16x16", "too short (fewer than 9 frames)", "10 records")
    ),
    "clip too small": Case(train("data.buckets.0.height=64"), ("smaller than 64x16", "upscale = True")),
    "batch larger than the data": Case(train("data.buckets.0.batch_size=64"), ("batch_size 64", "only 10 records")),
    "data set misspelled": Case(train("data.sources.0.path={w.scenes}s"), ("scenes", "does not exist", "Did you mean")),
    "folder without a data set": Case(
        train("data.sources.0.path={w.root}/empty"), ("empty", "contains no data set", "jvgen data build")
    ),
    "file and no data set": Case(train("data.sources.0.path={w.root}/file"), ("is a file", "data set is a folder")),
    "unknown split": Case(
        train("data.sources.0.split=test"), ("no split 'test'", "train (10 records)", "validation (8 records)")
    ),
    "missing evaluation data": Case(
        lambda w: ["evaluate", w.run, "--data", w.root / "nowhere"], ("nowhere", "does not exist")
    ),
    "showing an empty folder": Case(lambda w: ["data", "show", w.root / "empty"], ("contains no data set",)),
    "corrupt and empty videos": Case(
        lambda w: ["data", "build", "videos", w.root / "videos", "--out", w.root / "new"],
        ("2 of 3 files", "nothing was written", "corrupt.mp4", "empty.mp4"),
    ),
    "no captions": Case(
        lambda w: ["data", "build", "videos", w.root / "uncaptioned", "--out", w.root / "new"],
        ("uncaptioned", "no captions", "captions.csv"),
    ),
    "captions file missing": Case(
        lambda w: [
            "data",
            "build",
            "videos",
            w.root / "videos",
            "--captions",
            w.root / "c.csv",
            "--out",
            w.root / "new",
        ],
        ("c.csv", "no such file"),
    ),
    "no videos": Case(
        lambda w: ["data", "build", "videos", w.root / "empty", "--out", w.root / "new"], ("contains no files", ".mp4")
    ),
    "existing data set": Case(
        lambda w: ["data", "build", "scenes", "--out", w.latents, "--train", 1, "--validation", 0],
        ("latents", "overwrite"),
    ),
    "scene field misspelled": Case(
        lambda w: ["data", "build", "scenes", "--out", w.root / "new", "--set", "frame=3"],
        ("frame", "Did you mean frames"),
    ),
    "latents without pixels": Case(
        train("data.sources.0.path={w.latents}", "data.buckets.0.frames=4"),
        ("latents [train] has cached latents but no pixels", "use the data set with the clips"),
    ),
    "pixels without latents": Case(
        video("data.sources.0.path={w.scenes}"), ("has no cached latents", "jvgen data build latents")
    ),
    # Latents and the VAE.
    "latents of another VAE": Case(
        video("task.vae_weights={w.other_weights}"), ("latents come from encoder", "Build them again")
    ),
    "missing VAE": Case(video("task.vae_weights={w.root}/nowhere"), ("nowhere", "no such file or folder")),
    "VAE not named": Case(video("task.vae_weights=none"), ("task.vae_weights = none", "jvgen export")),
    "VAE of another architecture": Case(
        video("task.vae.layers_per_block=2"), ("task.vae_weights", "layers_per_block: 1 in the weights, 2 in the run")
    ),
    "latents at a size that does not divide": Case(
        lambda w: [
            "data",
            "build",
            "latents",
            w.scenes,
            "--vae",
            w.weights,
            "--size",
            "15x16",
            "--out",
            w.root / "new",
        ],
        ("--size 15x16", "multiples of 2"),
    ),
    "latents by no VAE": Case(
        lambda w: [
            "data",
            "build",
            "latents",
            w.scenes,
            "--vae",
            w.root / "empty",
            "--size",
            "16x16",
            "--out",
            w.root / "new",
        ],
        ("no config.json",),
    ),
    # Runs and checkpoints.
    "no run": Case(
        lambda w: ["sample", w.root / "empty", "--prompt", "x", "--out", w.root / "new"],
        ("has no checkpoints folder",),
    ),
    "no such step": Case(
        lambda w: ["export", w.run, "--step", 99, "--to", w.root / "new"], ("no checkpoint of step 99", "[0]")
    ),
    "no such EMA": Case(lambda w: ["export", w.run, "--ema", 0.5, "--to", w.root / "new"], ("ema = 0.5", "raw")),
    "EMA decay that is no number": Case(
        lambda w: ["export", w.run, "--ema", "slow", "--to", w.root / "new"], ("'slow'", "0.9999, raw or best")
    ),
    "checkpoint of another model": Case(
        resume("task.network.layers_per_block=2"),
        ("another model or data set", "task.network.layers_per_block: checkpoint 1, now 2", "--allow-changes"),
    ),
    "checkpoint of another data set": Case(
        resume("data.sources.0.path={w.root}/scenes2"), ("data.sources.0.path", "checkpoint", "scenes2")
    ),
    "checkpoint of another seed": Case(resume("seed=5"), ("seed: checkpoint 0, now 5",)),
    "run directory is a file": Case(lambda w: [*train()(w)[:-1], w.root / "file"], ("file is a file", "name a folder")),
    "existing export": Case(
        lambda w: ["export", w.run, "--to", w.root / "videos"], ("videos exists and is not empty",)
    ),
    # Sampling.
    "run that makes no clips": Case(
        lambda w: ["sample", w.run, "--prompt", "x", "--out", w.root / "new"],
        ("ImageVAETaskConfig", "text-to-video run"),
    ),
    "no prompts": Case(lambda w: ["sample", w.run, "--out", w.root / "new"], ("--prompt TEXT", "--prompts FILE")),
    "prompts not UTF-8": Case(
        lambda w: ["sample", w.run, "--prompts", w.root / "latin.txt", "--out", w.root / "new"],
        ("latin.txt", "is not UTF-8 text", "line 2"),
    ),
    "timesteps that are no numbers": Case(
        lambda w: ["analyze", w.run, "--timesteps", "900,nan", "--out", w.root / "new"],
        ("--timesteps 900,nan", "0 to 999"),
    ),
    "timesteps out of range": Case(
        lambda w: ["analyze", w.run, "--timesteps", "-1", "--out", w.root / "new"], ("--timesteps -1", "0 to 999")
    ),
    "prompts file missing": Case(
        lambda w: ["sample", w.run, "--prompts", w.root / "p.txt", "--out", w.root / "new"], ("p.txt", "no such file")
    ),
    # Weights.
    "weights that do not fit": Case(
        lambda w: ["import", w.root / "misfit"], ("missing", "surplus", "(3, 3)", "AutoencoderKL")
    ),
    "weights that do not fit, into a run": Case(
        lambda w: ["import", w.root / "misfit", "--config", *w.vae, "--to", w.root / "new"],
        ("missing", "surplus", "(3, 3)"),
    ),
    "pickle": Case(lambda w: ["import", w.root / "pickled"], ("pickled", "run code")),
    "truncated weights": Case(
        lambda w: ["import", w.root / "truncated"], ("not a valid safetensors file", "truncated")
    ),
    "unknown class": Case(lambda w: ["import", w.root / "stranger"], ("UNet2DModel", "AutoencoderKL")),
    "no weights": Case(lambda w: ["import", w.root / "nowhere"], ("nowhere", "no such file or folder")),
    "weights for no network": Case(
        lambda w: ["import", w.weights, "--config", *w.video, "--to", w.root / "new"], ("ImageVAEConfig", "none")
    ),
    "unknown network": Case(
        lambda w: ["import", w.weights, "--config", *w.vae, "--network", "decoder", "--to", w.root / "new"],
        ("--network decoder", "vae"),
    ),
    "weights of another network": Case(
        lambda w: ["import", w.weights, "--config", *w.vae, "--set", "task.network.groups=2", "--to", w.root / "new"],
        ("is not the architecture of", "groups: 4 in the weights, 2 in the run"),
    ),
    "import without a config": Case(lambda w: ["import", w.weights, "--to", w.root / "new"], ("--config",)),
    "import over a run": Case(
        lambda w: ["import", w.weights, "--config", *w.vae, "--to", w.run], ("already holds checkpoints of steps 0",)
    ),
    # Pods.
    "unknown chip": Case(lambda w: [*COMPILE, "v9x:2x2"], ("v9x:2x2", "not a TPU generation", "v5p")),
    "unknown shape": Case(lambda w: [*COMPILE, "v5p:banana"], ("v5p:banana", "banana")),
    "report over a folder": Case(lambda w: [*COMPILE, "v5p:4x4x8", "--json", w.root], ("--json", "is a folder")),
    "report below a file": Case(
        lambda w: [*COMPILE, "v5p:4x4x8", "--json", ROOT / "Makefile/report"], ("--json", "Makefile")
    ),
}


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file, but those of the logs: a mistake is written down there."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name not in ("errors", "logs")]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def assert_user_error(done, expected: tuple[str, ...]) -> None:
    assert done.status == 2, (done.status, done.err)
    missing = [words for words in expected if words not in done.err]
    assert not missing, f"{missing} not in: {done.err}"
    assert "Traceback" not in done.err and done.err.count("JVGEN_TRACEBACK") == 1
    assert "could not be written" not in done.err, done.err


@pytest.mark.parametrize("name", CASES)
def test_invalid_input_gives_one_message_and_changes_no_file(name, world, jvgen, monkeypatch):
    def device_work(*arguments, **options):
        raise AssertionError("a device was used")

    for method in ("init", "lower", "evaluation", "external_inputs"):
        monkeypatch.setattr(Program, method, device_work)
    before = {folder: contents(folder) for folder in (world.root, world.scenes, world.weights, world.other_weights)}
    case = CASES[name]
    assert_user_error(jvgen(*case.words(world)), case.expected)
    assert {folder: contents(folder) for folder in before} == before
    assert not (world.root / "scenes2" / "errors").exists()
    assert not Path("unpickled").exists()


def test_invalid_command_lines_print_usage(jvgen):
    for words in (["trane"], ["sample", "run", "--size", "16", "--prompt", "x", "--out", "y"], ["train", "x.py"], []):
        done = jvgen(*words)
        assert done.status == 2 and "usage: jvgen" in done.err and "Traceback" not in done.err
    assert "expected HEIGHTxWIDTH" in jvgen("sample", "run", "--size", "16", "--out", "y").err


def test_data_set_that_was_replaced_after_a_checkpoint(world, jvgen, tmp_path, monkeypatch):
    """Same path, other records: the checkpoint remembers what they were."""
    place = tmp_path / "scenes"
    shutil.copytree(world.scenes, place)
    words = train(f"data.sources.0.path={place}", f"data.evaluation_sources.0.path={place}")(world)[1:-2]
    experiment = config.override(config.load(words[0]), words[2::2])
    # As training saves it: with the state of the data.
    state = Loader(experiment.data, seed=experiment.seed, preprocess=dict).state(0)
    save = Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", lambda self, step, arrays, data, run: save(self, step, arrays, state, run))
    assert jvgen("import", world.weights, "--config", *words, "--to", tmp_path / "run").status == 0
    monkeypatch.undo()
    shutil.rmtree(place)
    look = SceneConfig(height=16, width=16, frames=4, kinds={"dynamic": 1.0}, supersampling=1)
    build_scenes(place, look, train=10, validation=8, seed=3, workers=1)
    before = contents(tmp_path / "run")
    expected = ("data.sources", "hold other records", "Point sources at the same data sets")
    assert_user_error(jvgen("train", *words, "--workdir", tmp_path / "run"), expected)
    assert contents(tmp_path / "run") == before


def test_corrupt_checkpoint_does_not_restart_the_run(world, jvgen, tmp_path):
    shutil.copytree(world.run, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints" / "0").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    sizes = sorted(size for size, _ in contents(tmp_path / "run").values())
    words = [*train()(world)[:-1], tmp_path / "run"]
    done = jvgen("export", tmp_path / "run", "--to", tmp_path / "new")
    assert_user_error(done, ("checkpoints", "no readable checkpoint"))
    assert_user_error(jvgen(*words), ("none of the checkpoints [0] is valid", "was not restarted from step 0"))
    assert not (tmp_path / "new").exists() and not (tmp_path / "run" / "metrics.jsonl").exists()
    # Quarantined, not deleted.
    assert sorted(size for size, _ in contents(tmp_path / "run").values()) == sizes
