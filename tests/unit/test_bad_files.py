"""Files and command lines that cannot be read: one message with the file, the line and the rule; nothing is written."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from jvgen import config, exit_codes
from jvgen.config import ConfigError
from jvgen.control.play import read_actions
from jvgen.geometry.camera_file import read_cameras
from jvgen.interop.from_torch import WeightError
from jvgen.runs.noise import read_noise
from jvgen.runs.prompts import read_prompts
from jvgen.storage import UnreadableFile
from jvgen.training.checkpoint import identity

ROOT = Path(__file__).parents[2]
DEMO = str(ROOT / "configs" / "demo_image_vae.py")
DEEP = "[" * 100_000
LATIN = "prompt\ncaf\xe9\n".encode("latin-1")

# Config files: content -> words of the message.
CONFIG_FILES: dict[str, tuple[bytes | str, tuple[str, ...]]] = {
    "syntax": ("def experiment(:\n    pass\n", ("line 1", "SyntaxError")),
    "syntax later": ("x = 1\n\ny = = 2\n", ("line 3", "SyntaxError")),
    "unclosed": ("def experiment():\n    return dict(a=1\n", ("line 2", "was never closed")),
    "tabs": ("def experiment():\n\tx = 1\n        y = 2\n", ("TabError", "line 3")),
    "name": ("a = 1\nb = missing\n", ("line 2", "NameError", "missing")),
    "import": ("import no_such_package\n", ("line 1", "ModuleNotFoundError", "no_such_package")),
    "import of a name": ("\nfrom jvgen.config import Configg\n", ("line 2", "ImportError", "Configg")),
    "import of a moved module": ("from jvgen.trainer import x\n", ("line 1", "jvgen.trainer")),
    "division": ("x = 1 / 0\n", ("line 1", "ZeroDivisionError")),
    "attribute": ("import math\nmath.piii\n", ("line 2", "AttributeError", "piii")),
    "assertion": ("assert False, 'never'\n", ("line 1", "AssertionError", "never")),
    "exit": ("import sys\nsys.exit(3)\n", ("line 2", "SystemExit")),
    "recursion": ("def f():\n    f()\nf()\n", ("RecursionError", "line 2")),
    "not UTF-8": (b"x = '\xe9'\n", ("SyntaxError", "utf-8")),
    "zero bytes": (b"x = 1\0\n", ("null bytes",)),
    "pickle": (b"\x80\x04\x95\x10\0\0\0", ("Error",)),
    "empty": ("", ("function experiment()",)),
    "no function": ("experiment = 3\n", ("function experiment()",)),
    "in the function": ("def experiment():\n    return wrong\n", ("line 2", "NameError", "wrong")),
    "key": ("def experiment():\n    return {}['a']\n", ("line 2", "KeyError", "'a'")),
    "returns None": ("def experiment():\n    pass\n", ("NoneType", "Experiment")),
    "returns a class": (
        "from jvgen.training.experiment import Experiment\ndef experiment():\n    return Experiment\n",
        ("type", "not an Experiment"),
    ),
    "misspelled field": (
        "from jvgen.training.config import TrainingConfig\n\ndef experiment():\n    return TrainingConfig(step=1)\n",
        ("line 4", "TypeError", "'step'"),
    ),
    "missing field": (
        "from jvgen.training.experiment import Experiment\n\ndef experiment():\n    return Experiment(name='x')\n",
        ("line 4", "TypeError", "task"),
    ),
    "missing argument": ("def experiment(size):\n    return size\n", ("experiment()", "missing", "size")),
    "refuses": (
        "from jvgen.config import ConfigError\ndef experiment():\n    raise ConfigError('no GPU')\n",
        ("line 3", "no GPU"),
    ),
    "value error": ("def experiment():\n    raise ValueError('odd')\n", ("line 2", "ValueError: odd")),
}
# A valid config that a config file changes: the expression -> words of the message.
CHANGES: dict[str, tuple[str, ...]] = {
    "e.replace(seed=float('nan'))": ("seed = nan", "expected int"),
    "e.replace(seed=-1)": ("seed = -1", "at least 0"),
    "e.replace(seed=2**63)": ("seed = 9223372036854775808", "at most 2147483647"),
    "e.replace(name=3)": ("name = 3", "expected str"),
    "e.replace(task='image_vae')": ("task = 'image_vae'", "expected TaskConfig"),
    "e.replace(data=None)": ("data = None", "expected DataConfig"),
    "e.replace(ema=e.ema.replace(decays=[0.9]))": ("ema.decays = [0.9]", "tuple"),
    "e.replace(ema=e.ema.replace(decays=(0.9, 0.9)))": ("ema", "given twice"),
    "e.replace(ema=e.ema.replace(decays=('0.9',)))": ("ema.decays", "expected a tuple of float"),
    "e.replace(training=e.training.replace(steps=True))": ("training.steps = True", "expected int"),
    "e.replace(training=e.training.replace(steps=1e3))": ("training.steps = 1000.0", "expected int"),
    "e.replace(optimizer=e.optimizer.replace(learning_rate='1e-4'))": ("optimizer.learning_rate", "expected float"),
    "e.replace(optimizers={'model': 3})": ("optimizers", "expected dict"),
    "e.replace(data=e.data.replace(buckets=()))": ("data", "buckets = ()", "at least one"),
    "e.replace(data=e.data.replace(sources=()))": ("data", "sources = ()", "at least one"),
    "e.replace(data=e.data.replace(kind_weights={'imag': 1.0}))": ("kind_weights", "'imag'", "image"),
    "e.replace(data=e.data.replace(kind_weights={'image': -1.0}))": ("data.kind_weights.image = -1.0", "at least 0"),
    "e.replace(task=e.task.replace(network=e.task.network.replace(channels=1)))": ("channels = 1", "RGB", "3"),
}
# `--set` of the demo's image VAE -> words of the message.
SETTINGS: dict[str, tuple[str, ...]] = {
    "data.buckets.0.height=999999999": ("data.buckets.0.height = 999999999", "at most 16384"),
    "data.sources.0.frame_stride=1000000000000": ("data.sources.0.frame_stride", "at most 100000"),
    "data.threads=100000000": ("data.threads = 100000000", "at most 1024"),
    "data.buckets.0.strides=1,0": ("data.buckets.0.strides.1 = 0", "at least 1"),
    "task.network.sample_size=-4": ("task.network.sample_size = -4", "at least 1"),
    "task.network.block_channels=8,abc": ("task.network.block_channels", "'abc'", "int"),
    "task.network.channels=1": ("network.channels = 1", "RGB"),
    "optimizer.muon_iterations=100000000": ("optimizer.muon_iterations", "at most 100"),
    "optimizer.multipliers.encoder=-1": ("optimizer.multipliers.encoder = -1.0", "at least 0"),
    "optimizer.learning_rate=1e30": ("optimizer.learning_rate = 1e+30", "at most 1000"),
    "training.steps=1e22": ("training.steps = '1e22'", "int"),
    "training.profile_steps=5,5": ("profile_steps = (5, 5)", "10,12"),
    "training.profile_steps=5": ("training.profile_steps", "2 values"),
    "checkpoint.keep_every=7": ("keep_every = 7", "multiple of every"),
    "seed=4294967296": ("seed = 4294967296", "at most 2147483647"),
    "seed=": ("seed = ''", "int"),
    "=3": ("has no field ''",),
    "training..steps=3": ("has no field ''",),
    "data.buckets.-1.height=3": ("'-1' is not an index",),
    "data.buckets.²=3": ("'²' is not an index",),
    "ema.warmup=yes": ("ema.warmup = 'yes'", "bool"),
    "mesh.data=0": ("data = 0", "at least 1", "-1"),
    "mesh.data=-2": ("mesh.data = -2", "at least -1"),
}
SCENES: dict[str, tuple[str, ...]] = {
    "height=999999999": ("height = 999999999", "at most 16384"),
    "frames=1e6": ("frames = '1e6'", "int"),
    "objects=1": ("objects = '1'", "2 values"),
    "objects=3,1": ("objects = (3, 1)", "exchange"),
    "objects=1,9": ("objects.1 = 9", "at most 4"),
    "kinds.static=nan": ("kinds.static = nan", "finite"),
    "kinds.still=1": ("kinds", "static"),
    "supersampling=1000": ("supersampling = 1000", "at most 16"),
    "quality=99": ("quality = 99", "at most 51"),
    "colors=mauve": ("colors", "mauve", "red"),
    "background=none": ("background = 'none'", "plain"),
}
JSON_FILES: dict[str, tuple[bytes | str, tuple[str, ...]]] = {
    "empty": ("", ("not JSON", "empty file")),
    "cut": ('{"experiment": {"class": "Expe', ("not JSON", "line 1")),
    "deep": (DEEP, ("not JSON", "nested too deeply")),
    "deep configs": ('{"class":"Experiment","task":' * 990 + "1" + "}" * 990, ("Error", "nested", "lacks", "expected")),
    "latin-1": (LATIN, ("not UTF-8", "line 2", "0xe9")),
    "list": ("[1, 2]", ("tuple", "not an Experiment")),
    "number": ("3", ("int", "not an Experiment")),
    "page": ("<!doctype html><html>", ("not JSON", "web page")),
    "no class": ('{"experiment": {"a": 1}}', ("dict", "not an Experiment")),
    "class that is a number": ('{"class": 7}', ("class = 7", "config class")),
    "unknown class": ('{"class": "SecretConfig"}', ("SecretConfig", "not a Config class")),
    "class of a module": ('{"class": "os:system"}', ("os:system", "no Config class")),
    "mapping that is a list": ('{"mapping": [1]}', ("dict", "not an Experiment")),
}
DIRECTORY = object()


def prompts(path: Path) -> None:
    read_prompts(path)


def cameras(path: Path) -> None:
    read_cameras(path)


def actions(path: Path) -> None:
    read_actions(path, 2)


def noise(path: Path) -> None:
    read_noise(path, (1, 2, 2, 4), 1)


ROW = "0 0.5 0.9 0.5 0.5 0 0 1 0 0 0 0 1 0 0 0 0 1 0"
ARCHIVE = b"PK\x05\x06" + bytes(18)  # a zip file without members, which NumPy takes for its own
ARRAY = b"\x93NUMPY\x01\0"
READERS: dict[str, tuple[Callable[[Path], None], str, bytes | str | object, tuple[str, ...]]] = {
    "prompts latin-1": (prompts, "p.txt", LATIN, ("p.txt", "not UTF-8", "line 2", "0xe9")),
    "prompts empty": (prompts, "p.txt", "\n\n", ("p.txt", "no prompts")),
    "prompts missing": (prompts, "p.txt", None, ("p.txt", "no such file")),
    "prompts a folder": (prompts, "p.txt", DIRECTORY, ("p.txt", "no such file")),
    "prompts of UTF-16": (prompts, "p.txt", "a fox\n".encode("utf-16"), ("not UTF-8", "line 1")),
    "prompts JSON cut": (prompts, "p.json", '["a", ', ("p.json", "not JSON", "line 1")),
    "prompts JSON deep": (prompts, "p.json", DEEP, ("p.json", "nested too deeply")),
    "prompts JSON object": (prompts, "p.json", '{"prompt": "a"}', ("p.json", "expected a list")),
    "prompts JSON number": (prompts, "p.json", "[3]", ("p.json", "entry 0")),
    "prompts JSON text": (prompts, "p.json", '"a"', ("p.json", "expected a list")),
    "cameras latin-1": (cameras, "c.txt", b"url\xe9\n", ("c.txt", "not UTF-8", "line 1")),
    "cameras missing": (cameras, "c.txt", None, ("c.txt", "does not exist")),
    "cameras empty": (cameras, "c.txt", "", ("c.txt", "no cameras")),
    "cameras URL only": (cameras, "c.txt", "https://x\n", ("c.txt", "no cameras")),
    "cameras short line": (cameras, "c.txt", f"url\n{ROW}\n0 1 2\n", ("c.txt", "line 3", "19")),
    "cameras word": (cameras, "c.txt", f"url\n{ROW.replace('0.9', 'wide')}\n", ("c.txt", "line 2")),
    "cameras nan": (cameras, "c.txt", f"url\n{ROW.replace('0.9', 'nan')}\n", ("c.txt", "not finite")),
    "cameras mirrored": (cameras, "c.txt", f"url\n{ROW[:-4]} -1 0\n", ("c.txt", "mirror image")),
    "cameras no focal length": (cameras, "c.txt", f"url\n{ROW.replace('0.9', '0')}\n", ("c.txt", "focal length")),
    "actions latin-1": (actions, "a.csv", b"1,\xe9\n", ("a.csv", "line 1", "0xe9")),
    "actions word": (actions, "a.csv", "1,2\n3,x\n", ("a.csv", "actions", "'x'")),
    "actions ragged": (actions, "a.csv", "1,2\n3\n", ("a.csv", "actions")),
    "actions wide": (actions, "a.csv", "1,2,3\n", ("a.csv", "(1, 3)", "2 numbers")),
    "actions empty": (actions, "a.csv", "", ("a.csv", "shape")),
    "actions text file": (actions, "a.txt", "1,2\n", ("a.txt", ".npy or .csv")),
    "actions array of text": (actions, "a.npy", "1,2\n", ("a.npy", "actions", "text")),
    "actions empty array": (actions, "a.npy", b"", ("a.npy", "empty file")),
    "actions cut array": (actions, "a.npy", ARRAY, ("a.npy", "actions")),
    "noise text": (noise, "n.npy", "noise", ("n.npy", "numpy.save", "text")),
    "noise empty": (noise, "n.npy", b"", ("n.npy", "empty file")),
    "noise cut": (noise, "n.npy", ARRAY, ("n.npy", "numpy.save")),
    "noise missing": (noise, "n.npy", None, ("n.npy", "no such file")),
    "noise pickle": (noise, "n.npy", b"\x80\x04N.", ("n.npy", "pickle")),
    "noise zip": (noise, "n.npy", b"PK\x03\x04" + bytes(40), ("n.npy",)),
    "noise archive": (noise, "n.npy", ARCHIVE, ("n.npy", ".npz", "one array saved by numpy.save")),
}
TABLES: dict[str, tuple[str, bytes | str, tuple[str, ...]]] = {
    "captions latin-1": ("c.csv", b"file,caption\nx.mp4,caf\xe9\n", ("c.csv", "not UTF-8", "line 2", "0xe9")),
    "captions without columns": ("c.csv", "name,text\n", ("c.csv", "['name', 'text']", "file and caption")),
    "captions empty": ("c.csv", "", ("c.csv", "file and caption")),
    "captions too long": ("c.csv", "file,caption\nx.mp4," + "a" * ((16 << 20) + 1) + "\n", ("c.csv", "field larger")),
    "captions without a name": ("c.csv", "file,caption\n,a fox\n", ("c.csv", "line 2", "file and a caption")),
    "captions of other files": ("c.csv", "file,caption\ny.mp4,a fox\n", ("c.csv", "lists none", "y.mp4")),
    "captions JSON cut": ("c.jsonl", '{"file": "x.mp4", "caption": "a"}\n{"file"\n', ("c.jsonl", "line 2", "not JSON")),
    "captions JSON deep": ("c.jsonl", DEEP + "\n", ("c.jsonl", "line 1", "not JSON")),
    "captions JSON list": ("c.jsonl", "[1]\n", ("c.jsonl", "line 1", "file and a caption")),
    "captions of another kind": ("c.xlsx", "file,caption\n", ("c.xlsx", ".csv, .tsv or .jsonl")),
}
COMMANDS: dict[str, tuple[str, ...]] = {
    f"compile {DEMO} --topology v5e:0x0": ("v5e:0x0", "comes as"),
    f"compile {DEMO} --topology v5e": ("'v5e'", "GENERATION:SHAPE"),
    f"compile {DEMO} --topology v5e:-1x2": ("v5e:-1x2", "GENERATION:SHAPE"),
    f"compile {DEMO} --topology v5e:999999999999x1": ("GENERATION:SHAPE",),
    f"compile {DEMO} --topology v5e:2x2x2x2": ("v5e:2x2x2x2", "comes as"),
    f"compile {DEMO} --topology v5e:2x2 --bucket 1x1x1": ("1x1x1",),
    f"compile {DEMO} --topology v5e:2x2 --json folder": ("--json folder", "is a folder"),
    "config show nowhere.py": ("nowhere.py", "does not exist"),
    "config show folder": ("folder",),
    f"config show {DEMO}:7": ("takes no arguments", "'7'"),
    "evaluate --vae folder --data folder --out file": ("--out file", "name a folder"),
    "evaluate run --out folder": ("--out folder", "name a file"),
    "evaluate": ("give RUN", "--vae"),
    "evaluate run --frames 9 --worst 2": ("--frames, --worst", "--vae and no RUN"),
    "evaluate run --steps 8 --batch-size 4": ("--steps, --batch-size", "only valid with --samples N"),
    "evaluate --vae folder --data folder --samples 4 --ema raw": ("--ema, --samples", "only valid with RUN"),
    "analyze run --out file": ("--out file", "name a folder"),
    "sample folder --prompt x --out clips": ("folder", "checkpoints"),
    "sample pipeline --prompt x --out clips": ("pipeline", "checkpoints", "`jvgen sample --weights`"),
    "export folder --to x": ("folder", "checkpoints"),
    "data show folder": ("folder", "contains no data set"),
    "data build videos nowhere --out x": ("nowhere",),
    "data build webvid nowhere.csv --videos folder --out x": ("nowhere.csv", "no such file"),
    "import file": ("file",),
    "import folder": ("folder has no config.json", "name a folder that `save_pretrained` or `jvgen export` wrote"),
    "verify folder": ("folder", "config.json"),
    "encode folder --vae folder --out x": ("folder: a folder; name the files in it",),
    "encode file --vae folder --out x": ("folder",),
}


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """The working folder, with an empty folder and a text file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("text\n")
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    return tmp_path


def write(path: Path, content: bytes | str | object) -> Path:
    if content is DIRECTORY:
        path.mkdir()
    elif content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def tree(folder: Path) -> dict[str, bytes | None]:
    found = (path for path in folder.rglob("*") if path.parent.name != "__pycache__" and path.name != "__pycache__")
    return {str(path): path.read_bytes() if path.is_file() else None for path in found}


def assert_refused(done, words: tuple[str, ...], folder: Path, before: dict) -> None:
    assert done.status == 2, (done.status, done.err)
    assert not [word for word in words if word not in done.err], (words, done.err)
    assert "Traceback" not in done.err and tree(folder) == before, done.err


@pytest.mark.parametrize("name", CONFIG_FILES)
def test_a_config_file_that_raises_is_named_with_its_line(name, place, jvgen):
    content, words = CONFIG_FILES[name]
    write(place / "mine.py", content)
    before = tree(place)
    assert_refused(jvgen("config", "show", "mine.py"), ("mine.py", *words), place, before)


@pytest.mark.parametrize("change", CHANGES)
def test_a_config_file_with_a_wrong_value_is_refused(change, place, jvgen):
    (place / "mine.py").write_text(
        f"from jvgen.config import load\n\ndef experiment():\n    e = load({DEMO!r})\n    return {change}\n"
    )
    before = tree(place)
    assert_refused(jvgen("config", "show", "mine.py"), CHANGES[change], place, before)


@pytest.mark.parametrize("assignment", SETTINGS)
def test_a_wrong_setting_is_refused(assignment, place, jvgen):
    before = tree(place)
    assert_refused(jvgen("config", "show", DEMO, "--set", assignment), SETTINGS[assignment], place, before)


@pytest.mark.parametrize("assignment", SCENES)
def test_a_wrong_setting_of_scenes_is_refused(assignment, place, jvgen):
    before = tree(place)
    words = ("data", "build", "scenes", "--train", 1, "--validation", 0, "--out", "new", "--set", assignment)
    assert_refused(jvgen(*words), SCENES[assignment], place, before)


@pytest.mark.parametrize("name", JSON_FILES)
def test_a_saved_config_that_is_none_is_refused(name, place, jvgen):
    content, words = JSON_FILES[name]
    write(place / "config.json", content)
    before = tree(place)
    if name == "deep configs":
        done = jvgen("config", "show", "config.json")
        assert done.status == 2 and "config.json" in done.err and any(word in done.err for word in words), done.err
        return
    assert_refused(jvgen("config", "show", "config.json"), ("config.json", *words), place, before)


@pytest.mark.parametrize("name", READERS)
def test_a_file_that_cannot_be_read_is_named(name, place):
    read, file, content, words = READERS[name]
    path = write(place / file, content)
    with pytest.raises(ValueError) as error:
        read(path)
    assert not [word for word in words if word not in str(error.value)], str(error.value)
    assert exit_codes.of_error(error.value) == exit_codes.USER_ERROR


@pytest.mark.parametrize("name", TABLES)
def test_captions_that_cannot_be_read_are_named(name, place, jvgen):
    file, content, words = TABLES[name]
    write(place / file, content)
    (place / "folder" / "x.mp4").write_bytes(b"no video")
    before = tree(place)
    done = jvgen("data", "build", "videos", "folder", "--captions", file, "--out", "new", "--workers", 1)
    assert_refused(done, words, place, before)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_cannot_be_done_says_why(command, place, jvgen):
    before = tree(place)
    assert_refused(jvgen(*command.split()), COMMANDS[command], place, before)


@pytest.mark.parametrize(("path", "words"), [("a\0b", "a path has no zero bytes"), ("", "a path is not empty")])
def test_a_path_that_is_none(path, words, jvgen, place):
    before = tree(place)
    assert_refused(jvgen("train", DEMO, "--workdir", path), (words,), place, before)


REAL = {
    "config show mine.py": ("mine.py, line 1", "SyntaxError"),
    f"config show {DEMO} --set optimizer.frozen=(": ("optimizer.frozen.0 = '('", "position 0"),
    f"train {DEMO} --workdir new --set training.steps=1e22": ("training.steps = '1e22'", "JVGEN_TRACEBACK"),
    f"train {DEMO} --workdir new --stop-after -1": ("--stop-after: '-1'",),
}


@pytest.mark.parametrize("command", REAL)
def test_the_command_itself(command, place):
    (place / "mine.py").write_text("def experiment(:\n")
    before = tree(place)
    done = subprocess.run(
        [sys.executable, "-m", "jvgen.cli", *command.split()], cwd=place, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 2 and not [word for word in REAL[command] if word not in done.stderr], done.stderr
    assert "Traceback" not in done.stderr and tree(place) == before


# Which errors lose their traceback.


def of_jvgen() -> None:
    config.override(config.load(DEMO), ["seed=x"])


def raised_again() -> None:
    """By the library that ran the worker: the last frame is not jvgen's."""
    exec(compile("raise error", "/usr/lib/pool.py", "exec"), {"error": WeightError("misfit")})


ERRORS: dict[str, tuple[Callable[[], object], int]] = {
    "a config": (of_jvgen, 2),
    "a class of jvgen": (raised_again, 2),
    "a file": (lambda: Path("/nowhere/x").read_text(), 2),
    "UnreadableFile": (lambda: (_ for _ in ()).throw(UnreadableFile("x")), 2),
    "full disk": (lambda: os.write(os.open("/dev/full", os.O_WRONLY), b"x"), 74),
    "numpy": (lambda: np.zeros(3).reshape(2, 2), 1),
    "jax": (lambda: jax.numpy.zeros(3) + jax.numpy.zeros(2), 1),
    "a tracer": (lambda: jax.jit(lambda x: 1 if x > 0 else 2)(1.0), 1),
    "json": (lambda: json.loads("{"), 1),
    "a number": (lambda: int("x"), 1),
    "text": (lambda: b"\xff".decode(), 1),
    "a key": (lambda: {}["x"], 1),
    "an index": (lambda: [][0], 1),
    "a type": (lambda: len(3), 1),
    "an attribute": (lambda: None.x, 1),
    "an assertion": (lambda: (_ for _ in ()).throw(AssertionError), 1),
    "an OSError without a file": (lambda: (_ for _ in ()).throw(OSError("odd")), 1),
}


@pytest.mark.parametrize("name", ERRORS)
def test_only_named_errors_lose_their_traceback(name):
    function, code = ERRORS[name]
    with pytest.raises(Exception) as error:  # noqa: PT011
        function()
    assert exit_codes.of_error(error.value) == code


def test_what_changed_at_a_resume_is_told_field_by_field():
    before = config.override(config.load(DEMO), ["training.steps=280", "checkpoint.every=60"])
    now = config.override(before, [
        "training.steps=500", "optimizer.learning_rate=0.001", "optimizer.clip_norm=none", "checkpoint.every=60",
        "ema.decays=0.5", "data.threads=1", "mesh.fsdp=1",
    ])  # fmt: skip

    class Task:
        def frozen_digest(self):
            return None

    told = []
    documents = [identity.run_document(experiment, Task()) for experiment in (before, now)]
    identity.check_same_run(*documents, (), told.append)
    [text] = told
    for line in (
        "training.steps: checkpoint 280, now 500", "optimizer.learning_rate: checkpoint 0.005, now 0.001",
        "optimizer.clip_norm: checkpoint 1.0, now None", "checkpoint.every: checkpoint 60, now 60",
        "ema.decays: ", "data.threads: checkpoint 2, now 1", "mesh.fsdp: checkpoint -1, now 1",
    ):  # fmt: skip
        assert (line in text) != (line == "checkpoint.every: checkpoint 60, now 60"), (line, text)
    with contextlib.suppress(StopIteration):
        identity.check_same_run(documents[0], documents[0], (), lambda text: pytest.fail(text))
    with pytest.raises(ConfigError, match="seed: checkpoint 0, now 5"):
        changed = identity.run_document(before.replace(seed=5), Task())
        identity.check_same_run(documents[0], changed, (), told.append)
    with pytest.raises(ConfigError, match="frozen weights: checkpoint 1, now 2(.|\n)*Of a folder of .bin files, 0.1.0"):
        identity.check_same_run(*({**documents[0], "frozen": digest} for digest in "12"), (), told.append)
