"""Configuration: overrides, their errors, dumps and the JSON round trip."""

import dataclasses
import enum

import pytest

from jvgen.config import Config, ConfigError, dump, from_json, load, override, to_json, validate_tree


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
    with pytest.raises(ConfigError, match="import its module"):
        from_json('{"class": "antigravity:Flight"}')
    with pytest.raises(ConfigError, match="not a Config class"):
        from_json('{"class": "jvgen.config:ConfigError"}')
    with pytest.raises(ConfigError, match="no field speed"):
        from_json(to_json(Inner())[:-2] + ', "speed": 1}')


def test_load_names_near_files(tmp_path):
    (tmp_path / "small.py").write_text("def experiment():\n    return 7\n")
    assert load(tmp_path / "small.py") == 7
    with pytest.raises(ConfigError, match="Did you mean .*small.py"):
        load(tmp_path / "smal.py")
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(ConfigError, match="experiment()"):
        load(tmp_path / "empty.py")
