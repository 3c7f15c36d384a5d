"""Weight tables: both directions are bitwise inverse, reading is lazy, and every misfit is listed at once."""

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jvgen.models.weight_map import (
    CONV2D,
    CONV3D,
    IDENTITY,
    LINEAR,
    Entry,
    Part,
    WeightError,
    WeightMap,
    fused,
    joined,
    pointwise,
)
from jvgen.nested import flatten, unflatten

RANKS = {IDENTITY: 1, LINEAR: 2, CONV2D: 4, CONV3D: 5, pointwise(2): 2}
DTYPES = [np.float32, np.float16, np.int32, ml_dtypes.bfloat16]


def random_bits(seed: int, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Any bit pattern, NaNs with payloads among them."""
    raw = np.random.default_rng(seed).bytes(int(np.prod(shape)) * np.dtype(dtype).itemsize)
    return np.frombuffer(raw, dtype).reshape(shape).copy()


def same_bits(left: np.ndarray, right: np.ndarray) -> bool:
    return left.shape == right.shape and left.dtype == right.dtype and left.tobytes() == right.tobytes()


ROW = st.fixed_dictionaries(
    {
        "transform": st.sampled_from(list(RANKS)),
        "shape": st.lists(st.integers(1, 4), min_size=5, max_size=5),
        "layers": st.sampled_from([None, 1, 3]),
        "dtype": st.sampled_from(DTYPES),
        "kind": st.sampled_from(["plain", "fused", "joined"]),
        "count": st.integers(2, 3),
        "axis": st.integers(0, 99),
    }
)


def build(rows: list[dict], shuffle: int) -> tuple[WeightMap, dict]:
    """A table with one parameter, or one group of them, a row, in shuffled order; and random parameters for it."""
    entries, flat = [], {}
    for index, row in enumerate(rows):
        transform, dtype, count = row["transform"], row["dtype"], row["count"]
        rank = RANKS[transform]
        axis = row["axis"] % (2 * rank) - rank
        lead = () if row["layers"] is None else (row["layers"],)
        shape = row["shape"][:rank]
        name = f"a{index}.{{layer}}.x" if lead else f"a{index}.x"
        paths = [f"p{index}/x"]
        if row["kind"] == "plain":
            entries.append(Entry(paths[0], name, transform))
        elif row["kind"] == "fused":
            paths = [f"p{index}/{i}/x" for i in range(count)]
            entries += fused(name, {f"c{i}": path for i, path in enumerate(paths)}, transform, axis=axis)
        else:
            entries += joined(paths[0], {f"c{i}": f"{name}{i}" for i in range(count)}, transform, axis=axis)
            shape[axis] *= count
        for path in paths:
            flat[path] = random_bits(len(flat), (*lead, *shape), dtype)
    order = np.random.default_rng(shuffle).permutation(len(entries))
    return WeightMap(tuple(entries[i] for i in order)), unflatten(flat)


@settings(max_examples=150, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=5), st.integers(0, 1000))
def test_round_trips_are_bitwise_in_both_directions(rows, shuffle):
    table, parameters = build(rows, shuffle)
    theirs = dict(table.to_torch(parameters))
    assert {name: array.shape for name, array in theirs.items()} == table.torch_shapes(parameters)
    assert all(array.flags.c_contiguous for array in theirs.values())
    back = table.from_torch(theirs, parameters, finite=False)
    ours, again = flatten(parameters), flatten(back)
    assert list(ours) == list(again)
    assert all(same_bits(ours[path], again[path]) for path in ours)
    assert not any(np.shares_memory(again[path], array) for path in again for array in theirs.values())

    other = {name: random_bits(7, array.shape, array.dtype) for name, array in theirs.items()}
    once_more = dict(table.to_torch(table.from_torch(other, parameters, finite=False)))
    assert all(same_bits(other[name], once_more[name]) for name in other)


def test_layouts_equal_those_of_torch():
    kernel = np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5)
    parameters = {"conv": {"kernel": kernel}, "linear": {"kernel": kernel[0, 0]}, "point": kernel[0, 1]}
    table = WeightMap(
        (
            Entry("conv/kernel", "conv.weight", CONV2D),
            Entry("linear/kernel", "linear.weight", LINEAR),
            Entry("point", "point.weight", pointwise(2)),
        )
    )
    theirs = dict(table.to_torch(parameters))
    assert theirs["conv.weight"][4, 3, 1, 2] == kernel[1, 2, 3, 4]
    assert theirs["linear.weight"][4, 3] == kernel[0, 0, 3, 4]
    assert theirs["point.weight"].shape == (5, 4, 1, 1) and theirs["point.weight"][4, 3, 0, 0] == kernel[0, 1, 3, 4]


def test_named_chunks_in_another_order_and_of_unequal_sizes():
    chunks, sizes = ("shift", "scale", "gate"), (1, 2, 3)
    table = WeightMap(
        (
            Entry("a", "all.{layer}", theirs_part=Part(("gate", "shift"), chunks, sizes=sizes)),
            Entry("b", "all.{layer}", theirs_part=Part(("scale",), chunks, sizes=sizes)),
        )
    )
    theirs = {"all.0": np.array([0, 10, 11, 20, 21, 22]), "all.1": np.array([100, 110, 111, 120, 121, 122])}
    shapes = {"a": np.zeros((2, 4), np.int64), "b": np.zeros((2, 2), np.int64)}
    ours = table.from_torch(theirs, shapes)
    np.testing.assert_array_equal(ours["a"], [[20, 21, 22, 0], [120, 121, 122, 100]])
    np.testing.assert_array_equal(ours["b"], [[10, 11], [110, 111]])
    for name, array in table.to_torch(ours):
        np.testing.assert_array_equal(array, theirs[name])


def test_all_misfits_are_listed_at_once():
    table = WeightMap(
        (Entry("w", "layer.{layer}.weight", LINEAR), Entry("b", "bias"), Entry("c", "scale")), ignored=(r"buffer\..*",)
    )
    shapes = {
        "w": jax.ShapeDtypeStruct((3, 2, 5), np.float32),
        "b": jax.ShapeDtypeStruct((5,), np.float32),
        "c": jax.ShapeDtypeStruct((5,), np.float32),
    }
    theirs = {
        "layer.0.weight": np.zeros((5, 2)),
        "layer.2.weight": np.zeros((2, 5)),
        "bias": np.zeros((4,)),
        "layer.3.weight": np.zeros((5, 2)),
        "surprise": np.zeros(()),
        "buffer.position": np.zeros(()),
    }
    with pytest.raises(WeightError) as caught:
        table.from_torch(theirs, shapes)
    text = str(caught.value)
    assert "2 missing:\n  layer.1.weight (5, 2)\n  scale (5,)" in text
    assert "2 not expected:\n  layer.3.weight\n  surprise" in text
    assert "2 wrongly shaped:\n  layer.2.weight: is (2, 5), expected (5, 2)\n  bias: is (4,), expected (5,)" in text
    assert "buffer" not in text and isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("values", "into", "problem"),
    [
        (np.array([1, 2, 127], np.int8), np.float32, "(?s)1 without floating-point numbers.*dequantized.*w: int8"),
        (np.array([1, 0, 1], np.bool_), np.float32, "w: bool"),
        (np.array([1, 2, 3], np.complex64), np.float32, "w: complex64"),
        (np.array([1, np.nan, 3], np.float32), np.float32, "1 tensors hold NaN or infinity:\n  w in float32"),
        (np.array([1, -np.inf, 3], ml_dtypes.bfloat16), np.float32, "w in float32"),
        (np.array([1, 7e4, 3], np.float32), np.float16, "w in float16.*\n.*wider dtype"),
        (np.array([1, 2, 3], ml_dtypes.float8_e4m3fn), np.float32, None),
        (np.array([1, 2, 3], ml_dtypes.bfloat16), ml_dtypes.bfloat16, None),
        (np.array([1, 2, 3], np.float64), np.float32, None),
    ],
)
def test_values_that_are_no_weights(values, into, problem):
    table, shapes = WeightMap((Entry("w", "w"),)), {"w": np.zeros(3, into)}
    if problem is None:
        np.testing.assert_array_equal(table.from_torch({"w": values}, shapes)["w"], values.astype(into))
        return
    with pytest.raises(WeightError, match=problem):
        table.from_torch({"w": values}, shapes)


def test_a_network_of_many_more_layers_is_refused_before_its_rows_are_made():
    table, shapes = WeightMap((Entry("w", "w.{layer}"),)), {"w": jax.ShapeDtypeStruct((10**9, 2), np.float32)}
    with pytest.raises(WeightError, match="the network has 1000000000 tensors, the weights 1"):
        table.from_torch({"w.0": np.zeros(2, np.float32)}, shapes)


class Recorder(dict):
    """A reader that counts what is read, and knows shapes without reading."""

    def __init__(self, arrays):
        super().__init__(arrays)
        self.reads = []

    def shape(self, name):
        return super().__getitem__(name).shape

    def dtype(self, name):
        return super().__getitem__(name).dtype

    def __getitem__(self, name):
        self.reads.append(name)
        return super().__getitem__(name)


def test_reading_is_lazy_and_nothing_is_read_when_something_is_wrong():
    table = WeightMap((Entry("w", "w.{layer}"), Entry("b", "b", aliases=("old_b",))))
    shapes = {"w": np.zeros((2, 3), np.float32), "b": np.zeros((1,), np.float32)}
    good = Recorder({"w.0": np.ones(3), "w.1": np.full(3, 2.0), "old_b": np.ones(1)})
    ours = table.from_torch(good, shapes)
    assert good.reads == ["w.0", "w.1", "old_b"]
    assert ours["w"].dtype == np.float32 and ours["w"][1, 0] == 2 and ours["b"][0] == 1
    bad = Recorder({"w.0": np.ones(3), "b": np.ones(1)})
    with pytest.raises(WeightError, match="w.1"):
        table.from_torch(bad, shapes)
    assert bad.reads == []


def test_parameters_of_another_network_are_refused():
    table = WeightMap((Entry("w", "w"),))
    with pytest.raises(WeightError, match="(?s)no parameter w.*no row of the table is for v"):
        list(table.to_torch({"v": np.zeros(1)}))


def test_to_torch_accepts_jax_arrays_and_is_lazy():
    table = WeightMap((Entry("w", "w.{layer}", LINEAR),))
    stream = table.to_torch({"w": jax.numpy.arange(12.0).reshape(2, 2, 3)})
    name, first = next(stream)
    assert name == "w.0" and first.shape == (3, 2) and first[2, 1] == 5


def test_parameters_are_placed_as_soon_as_complete():
    """Each once, in the dtype asked for, before tensors of the next stack are read."""
    shapes = {
        "blocks": {"kernel": jax.ShapeDtypeStruct((3, 2, 4), np.float16)},
        "query": jax.ShapeDtypeStruct((2, 2), np.float32),
        "key": jax.ShapeDtypeStruct((2, 2), np.float32),
    }
    table = WeightMap(
        (
            Entry("blocks/kernel", "layers.{layer}.weight", LINEAR),
            *fused("qk.weight", {"q": "query", "k": "key"}, LINEAR),
        )
    )
    events = []

    class Reader(dict):
        def __getitem__(self, name):
            events.append(name)
            return super().__getitem__(name)

        def shape(self, name):
            return super().__getitem__(name).shape

        def dtype(self, name):
            return super().__getitem__(name).dtype

    tensors = {f"layers.{i}.weight": np.full((4, 2), i, np.float32) for i in range(3)}
    reader = Reader(tensors | {"qk.weight": np.arange(8, dtype=np.float32).reshape(4, 2)})

    def place(path, array):
        events.append((path, array.dtype.name))
        return array.sum()

    table.check(reader, shapes)
    assert events == []
    placed = table.from_torch(reader, shapes, place)
    assert placed == {"blocks": {"kernel": 24.0}, "query": 6.0, "key": 22.0}
    layers = [f"layers.{i}.weight" for i in range(3)]
    assert events[:4] == [*layers, ("blocks/kernel", "float16")]
    assert events[4:] == ["qk.weight", ("query", "float32"), "qk.weight", ("key", "float32")]
    del reader["layers.1.weight"]
    with pytest.raises(WeightError, match="1 missing"):
        table.check(reader, shapes)
