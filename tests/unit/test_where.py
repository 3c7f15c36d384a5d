"""Filters on columns: what they take, what they refuse, and what they do to a plan and its digest."""

import itertools

import numpy as np
import pytest

from jvgen.data.store.index import Index
from jvgen.data.store.records import Record
from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig
from jvgen.data.stream.plan import Plan
from jvgen.data.stream.source_filter import source_filter
from jvgen.data.stream.where import FilterError, names, parse, rows_that_fit

SCORES = [1.0, 5.0, None, 7.5, 9.0, -2.0]
LICENSES = ["cc0", "cc-by", "", "cc-by", "all-rights", "cc0"]


def index_of(seed: int = 0, scores=SCORES, licenses=LICENSES) -> Index:
    kinds = ("image", "static", "dynamic")
    records = [
        Record(id=f"{seed}-{n}", kind=kinds[n % 3], clips=(b"x",), height=8, width=8 * (n + 1), frames=1 + n, views=1,
               frames_per_second=8.0 * (n % 3 > 0), columns={"aesthetic": score, "license": license, "empty": None})
        for n, (score, license) in enumerate(zip(scores, licenses, strict=True))
    ]  # fmt: skip
    return Index.of((record, n) for n, record in enumerate(records))


@pytest.mark.parametrize(
    ("where", "rows"),
    [
        ("aesthetic > 5", [3, 4]),
        ("aesthetic >= 5", [1, 3, 4]),
        ("5 < aesthetic", [3, 4]),
        ("not aesthetic > 5", [0, 1, 5]),
        ("aesthetic != 5", [0, 3, 4, 5]),
        ("aesthetic == 5", [1]),
        ("1 <= aesthetic < 9", [0, 1, 3]),
        ("aesthetic == -2", [5]),
        ("aesthetic is None", [2]),
        ("aesthetic is not None", [0, 1, 3, 4, 5]),
        ("not (aesthetic is None)", [0, 1, 3, 4, 5]),
        ("aesthetic in (1, 9)", [0, 4]),
        ("aesthetic not in [1, 9]", [1, 3, 5]),
        ("license == 'cc-by'", [1, 3]),
        ("'cc-by' == license", [1, 3]),
        ("license != 'cc-by'", [0, 4, 5]),
        ("license in ('cc-by', 'cc0')", [0, 1, 3, 5]),
        ("license not in ('cc-by', 'cc0')", [4]),
        ("license is None", [2]),
        ("license == ''", [2]),
        ("license in ('nothing',)", []),
        ("aesthetic > 5 and license in ('cc-by', 'cc0')", [3]),
        ("aesthetic > 8 or license == 'cc0'", [0, 4, 5]),
        # As in SQL, something unknown and something false is false.
        ("not (aesthetic > 5 and license == 'cc0')", [0, 1, 3, 4, 5]),
        ("not (aesthetic > 5 and height > 100)", [0, 1, 2, 3, 4, 5]),
        ("width / height >= 4", [3, 4, 5]),
        ("frames / frames_per_second * 2 - 1 > 0", [4, 5]),
        ("frames / frames_per_second > 0", [1, 2, 4, 5]),
        ("kind == 'dynamic'", [2, 5]),
        ("kind in ('image', 'static') and not has_action", [0, 1, 3, 4]),
        ("has_camera", []),
        ("empty is None", [0, 1, 2, 3, 4, 5]),
        ("empty > 0", []),
        ("True", None),
    ],
)
def test_what_a_filter_takes(where, rows):
    if rows is None:
        with pytest.raises(FilterError, match="not a condition"):
            parse(where)
        return
    assert np.flatnonzero(rows_that_fit(where, index_of())).tolist() == rows


def test_rows_in_chunks(monkeypatch):
    import jvgen.data.stream.where as module

    monkeypatch.setattr(module, "_CHUNK", 4)
    assert np.flatnonzero(rows_that_fit("aesthetic > 0", index_of())).tolist() == [0, 1, 3, 4]


def test_random_filters_are_those_of_python():
    """Without missing values a filter is a Python expression."""
    rng = np.random.default_rng(0)
    scores, licenses = rng.integers(0, 5, 40).astype(float).tolist(), rng.choice(["a", "b", "c"], 40).tolist()
    index = index_of(scores=scores, licenses=licenses)
    atoms = [
        "aesthetic > 2",
        "aesthetic * 2 == frames / 4",
        "license in ('a', 'c')",
        "not license == 'b'",
        "width < 90",
    ]
    for one, other, last in itertools.product(atoms, repeat=3):
        text = f"({one} or {other}) and not ({last} and {one})"
        rows = [
            {"aesthetic": s, "license": t, "frames": n + 1, "width": 8 * (n + 1)}
            for n, (s, t) in enumerate(zip(scores, licenses, strict=True))
        ]
        expected = [bool(eval(text, {}, row)) for row in rows]
        assert rows_that_fit(text, index).tolist() == expected, text


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("aesthetics > 5", r"no column 'aesthetics'. Did you mean aesthetic\? .*aesthetic, empty, license"),
        ("heigth > 5", r"no column 'heigth'. Did you mean height"),
        ("aesthetic > '5'", "the column has numbers; write the value without quotes|texts are compared with"),
        ("aesthetic == '5'", "the column has numbers; write the value without quotes"),
        ("license == 5", "the column has texts; write the value in quotes"),
        ("license > 'a'", "texts are compared with ==, != and in"),
        ("license", "license has texts and is no condition"),
        ("license in 'cc0'", "write `column in"),
        ("license in ('cc0', 5)", "a list of numbers, or of texts"),
        ("aesthetic > None", "write `column is None`"),
        ("aesthetic is 5", "write `column is None`"),
        ("aesthetic > (1, 2)", "lists are for `in`"),
        ("license + 1 > 2", "'license' is not a number"),
        ("'a' == 'a'", "compare a column with a value"),
        ("(1, 2) == (1, 2)", "lists are for `in`"),
    ],
)
def test_filters_that_do_not_fit_the_columns(where, message):
    with pytest.raises(FilterError, match=message):
        rows_that_fit(where, index_of())
    with pytest.raises(ValueError, match="set .train.: where = "):
        source_filter(SourceConfig(path="set", where=where), index_of(), ())


@pytest.mark.parametrize(
    "where",
    [
        "aesthetic >", "aesthetic = 5", "", "aesthetic > 5; import os", "__import__('os').system('true')",
        "aesthetic.real > 5", "[x for x in (1,)]", "(lambda: 1)() > 0", "aesthetic if 1 else 2",
        "aesthetic ** 9 ** 9 > 1", "f'{aesthetic}' == 'a'", "5", "'text'", "aesthetic + 1", "b'x' == license",
        "1j == aesthetic", "...", "(" * 500 + ")" * 500, "not " * 5000 + "empty", "x" * 20_000,
        "aesthetic > 5 and (license := 'a')", "aesthetic @ 2 > 1", "license[0] == 'c'", "a\0b > 1",
        f"aesthetic > {10**400}",
    ],
)  # fmt: skip
def test_what_is_not_a_filter(where):
    with pytest.raises(FilterError):
        parse(where)
    with pytest.raises(ValueError, match="where = "):
        SourceConfig(path="set", where=where).validate()


def test_names_of_a_filter():
    assert names("a > 5 and not (b in (1, 2) or a / c < 1)") == ["a", "b", "c"]


def plan(where=None, licenses=(), index=None, **changes) -> Plan:
    index = index_of() if index is None else index
    bucket = BucketConfig(frames=1, height=8, width=8, batch_size=2)
    config = DataConfig(
        sources=(SourceConfig(path="set", where=where, **changes),), buckets=(bucket,), licenses=licenses
    )
    return Plan(config, [index], seed=3)


def rows_of(plan: Plan) -> set[int]:
    return {int(row) for step in range(12) for row in plan.at(step).row}


def test_a_plan_reads_what_the_filter_takes():
    assert rows_of(plan("aesthetic > 5 or license == 'cc0'")) == {0, 3, 4, 5}
    assert rows_of(plan(licenses=("cc0", "cc-by"))) == {0, 1, 3, 5}
    both = plan("aesthetic > 0", licenses=("cc0", "cc-by", "mit"))
    assert rows_of(both) == {0, 1, 3} and both.licenses == {"cc0": 1, "cc-by": 2, "mit": 0}
    assert plan().licenses is None
    assert "2 left out by where" in str(both._filter_stats[0][0].rejected).replace(": ", " ").replace("'", "") or (
        both._filter_stats[0][0].rejected["left out by where = 'aesthetic > 0'"] == 2
    )


def test_the_digest_is_that_of_the_rows():
    """Written in another way a filter is the same; other values in the column make it another one."""
    unfiltered, one = plan().digest, plan("aesthetic > 5").digest
    assert one != unfiltered and one == plan("5 < aesthetic").digest == plan("not (aesthetic <= 5)").digest
    changed = index_of(scores=[9.0, *SCORES[1:]])
    assert plan(index=changed).manifest == plan().manifest and plan(index=changed).digest == unfiltered
    assert plan("aesthetic > 5", index=changed).digest != one
    assert plan(licenses=("cc0", "cc-by")).digest == plan("license in ('cc0', 'cc-by')").digest != unfiltered


def test_filters_that_leave_nothing():
    with pytest.raises(
        ValueError,
        match=r"where = 'aesthetic > 11' leaves none of its 6 records. They have aesthetic: -2..9, missing in 1",
    ):
        plan("aesthetic > 11")  # fmt: skip
    with pytest.raises(ValueError, match=r"leaves none .* license: 'cc-by' \(2\), 'cc0' \(2\), '' \(1\)"):
        plan("license == 'cc-zero'")
    with pytest.raises(ValueError, match=r"data.licenses = \('mit',\) leaves none of its 6 records.*'cc-by' \(2\)"):
        plan(licenses=("mit",))
    numbers = Index.of([(Record(id="a", kind="image", clips=(b"x",), height=8, width=8, columns={"lisence": "a"}), 1)])
    with pytest.raises(ValueError, match="needs a text column license; its columns are lisence. Is it lisence"):
        plan(licenses=("mit",), index=numbers)
