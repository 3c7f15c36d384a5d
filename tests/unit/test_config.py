"""Configuration: overrides, their errors, dumps and the JSON round trip."""

import dataclasses
import enum
import importlib
import json
import os
import pkgutil
import sys
from typing import ClassVar

import pytest

import jvgen
from jvgen.config import Config, ConfigError, dump, load, override, validate_tree, variants
from jvgen.saved_config import HOMES, from_json, stable_name, to_json


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner(Config):
    learning_rate: float = 1e-3
    steps: int = 10
    name: str | None = None
    color: Color = Color.RED

    def validate(self):
        if self.steps < 1:
            raise ValueError(f"steps = {self.steps}: must be at least 1.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer(Config):
    inner: Inner = Inner()
    parts: tuple[Inner, ...] = (Inner(), Inner(steps=3))
    sizes: tuple[int, ...] = (1, 2)
    weights: dict[str, float] = dataclasses.field(default_factory=dict)
    on: bool = False


@pytest.mark.parametrize(
    ("assignment", "read", "expected"),
    [
        ("inner.learning_rate=3e-4", lambda c: c.inner.learning_rate, 3e-4),
        ("inner.steps=1_000", lambda c: c.inner.steps, 1000),
        ("inner.name=fox", lambda c: c.inner.name, "fox"),
        ("inner.name=none", lambda c: c.inner.name, None),
        ("inner.color=blue", lambda c: c.inner.color, Color.BLUE),
        ("parts.1.steps=7", lambda c: c.parts[1].steps, 7),
        ("sizes=4,5,6", lambda c: c.sizes, (4, 5, 6)),
        ("sizes.1=9", lambda c: c.sizes, (1, 9)),
        ("weights.image=0.5", lambda c: c.weights, {"image": 0.5}),
        ("on=true", lambda c: c.on, True),
    ],
)
def test_override_parses_by_the_type_of_the_field(assignment, read, expected):
    assert read(override(Outer(), [assignment])) == expected


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("inner.learning_rat=1", ["inner.learning_rat", "Did you mean learning_rate"]),
        ("iner.steps=1", ["Did you mean inner"]),
        ("inner.steps=1.5", ["inner.steps", "'1.5'", "int"]),
        ("inner.steps=many", ["int"]),
        ("inner.color=green", ["one of", "red", "blue"]),
        ("inner=3", ["group of fields", "learning_rate"]),
        ("parts.5.steps=1", ["5", "0..1"]),
        ("inner.steps.more=1", ["cannot go below"]),
        ("on=1", ["bool"]),
        ("inner.steps", ["PATH=VALUE"]),
    ],
)
def test_override_mistakes_name_the_field_and_the_rule(assignment, words):
    with pytest.raises(ConfigError) as error:
        override(Outer(), [assignment])
    assert all(word in str(error.value) for word in words), str(error.value)


def test_override_leaves_the_original_alone():
    original = Outer()
    override(original, ["inner.steps=5"])
    assert original.inner.steps == 10


def test_validate_checks_types_and_rules_with_the_dotted_path():
    validate_tree(Outer())
    with pytest.raises(ConfigError, match=r"inner\.steps = 'x': expected int"):
        validate_tree(Outer(inner=Inner(steps="x")))
    with pytest.raises(ConfigError, match=r"parts\.0: steps = 0: must be at least 1"):
        validate_tree(Outer(parts=(Inner(steps=0),)))


def test_dump_has_one_line_a_leaf_and_changes_with_every_leaf():
    text = dump(Outer())
    assert "inner.learning_rate = 0.001\n" in text and "parts.1.steps = 3\n" in text and "sizes = (1, 2)\n" in text
    assert dump(override(Outer(), ["parts.0.color=blue"])) != text


def test_json_round_trip_keeps_types():
    config = override(Outer(), ["inner.color=blue", "weights.image=2", "inner.name=none"])
    again = from_json(to_json(config))
    assert again == config
    assert isinstance(again.sizes, tuple) and isinstance(again.inner.color, Color)


def test_json_refuses_classes_that_are_not_configurations():
    with pytest.raises(ConfigError, match="import it first"):
        from_json('{"class": "antigravity:Flight"}')
    with pytest.raises(ConfigError, match="not a Config class of this version"):
        from_json('{"class": "jvgen.config:ConfigError"}')
    with pytest.raises(ConfigError, match="no field speed"):
        from_json(to_json(Inner())[:-2] + ', "speed": 1}')


def all_config_classes() -> set[type]:
    for module in pkgutil.walk_packages(jvgen.__path__, "jvgen."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    found, stack = set(), [Config]
    while stack:
        for cls in stack.pop().__subclasses__():
            stack.append(cls)
            found |= {cls} if cls.__module__.split(".")[0] == "jvgen" else set()
    return found


def test_every_config_class_has_a_stable_name():
    assert {cls.__qualname__: cls.__module__ for cls in all_config_classes()} == HOMES
    assert not [cls for cls in all_config_classes() if stable_name(cls) != cls.__qualname__]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Renamed(Config):
    start_step: int = 0
    added_later: str = "default"
    renamed_fields: ClassVar[dict[str, str]] = {"begins": "start_step"}
    dropped_fields: ClassVar[frozenset[str]] = frozenset({"rounded"})


def test_a_saved_config_with_old_and_missing_fields_is_read():
    saved = {"class": stable_name(Renamed), "begins": 7, "rounded": True}
    assert from_json(json.dumps(saved)) == Renamed(start_step=7)


@pytest.mark.parametrize("name", ["jvgen.gone.module:VanishedConfig", "VanishedConfig"])
def test_a_missing_class_is_named(name):
    with pytest.raises(ConfigError, match=name):
        from_json(json.dumps({"class": name}))


def test_a_missing_required_field_is_named():
    with pytest.raises(ConfigError, match="BucketConfig lacks a field.*batch_size"):
        from_json('{"class": "BucketConfig", "frames": 1}')


def test_load_names_near_files(tmp_path):
    (tmp_path / "small.py").write_text("def experiment():\n    return 7\n")
    assert load(tmp_path / "small.py") == 7
    with pytest.raises(ConfigError, match="Did you mean .*small.py"):
        load(tmp_path / "smal.py")
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(ConfigError, match="experiment()"):
        load(tmp_path / "empty.py")


def test_an_edit_of_equal_size_in_the_same_second_is_read_and_no_file_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    file = tmp_path / "small.py"
    for value in (7, 8):
        file.write_text(f"def experiment():\n    return {value}\n")
        os.utime(file, (1_800_000_000, 1_800_000_000))
        assert load(file) == value
    assert list(tmp_path.iterdir()) == [file]


WITH_VARIANTS = """
from typing import Literal


def experiment(size: Literal["2b", "5b"] = "2b", steps: int = 10):
    return size, steps
"""


def test_arguments_after_the_file_name_are_passed_to_experiment(tmp_path):
    file = tmp_path / "model.py"
    file.write_text(WITH_VARIANTS)
    assert load(file) == ("2b", 10)
    assert load(f"{file}:5b") == ("5b", 10)
    assert load(f"{file}:5b,steps=20") == load(f"{file}:5b,20") == ("5b", 20)
    assert variants(file) == [f"{file}:2b", f"{file}:5b"]
    (tmp_path / "plain.py").write_text("def experiment():\n    return 7\n")
    assert variants(tmp_path / "plain.py") == [str(tmp_path / "plain.py")]


def test_a_config_file_imports_modules_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "module_beside_a_config.py").write_text("NUMBER = 7\n")
    (tmp_path / "json.py").write_text("raise AssertionError('a module beside a config hides no other')\n")
    words = "import json\nfrom module_beside_a_config import NUMBER\n\n\ndef experiment():\n    return NUMBER\n"
    (tmp_path / "own.py").write_text(words)
    assert load(tmp_path / "own.py") == 7
    assert load(tmp_path / "own.py") == 7 and sys.path.count(str(tmp_path)) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("7b", ["size = '7b'", "one of '2b', '5b'"]),
        ("5b,steps=many", ["steps = 'many'", "int"]),
        ("5b,10,20", ["takes size, steps", "'20'"]),
        ("width=3", ["takes size, steps", "'width=3'"]),
        ("5b,size=2b", ["'size=2b'"]),
    ],
)
def test_wrong_arguments_of_a_config_file_are_named(tmp_path, arguments, words):
    (tmp_path / "model.py").write_text(WITH_VARIANTS)
    with pytest.raises(ConfigError) as error:
        load(f"{tmp_path / 'model.py'}:{arguments}")
    assert all(word in str(error.value) for word in words), str(error.value)
