"""The plot of growth: what the formula says, and that a picture is drawn of points of which some are missing."""

import pytest

from tests.benchmarks import growth


def test_formula_grows_as_arithmetic_says():
    by_chips = [growth.formula(point) for point in growth.LINES["chips"]]
    # A clip on two chips throughout: the same work per device, a smaller share of the state.
    assert len({row["formula_TFLOP"] for row in by_chips}) == 1
    assert [row["formula_GiB"] for row in by_chips] == sorted((row["formula_GiB"] for row in by_chips), reverse=True)
    assert len({row["formula_sent_GiB"] for row in by_chips}) == 1
    short, long = (growth.formula(point) for point in growth.LINES["frames"][:2])
    rows = 17_920, 34_304  # 226 of text and 13 or 25 latent frames of 30 x 45, in multiples of 512
    ratio = rows[1] / rows[0]
    assert ratio < long["formula_TFLOP"] / short["formula_TFLOP"] < ratio**2
    assert [growth.pod_named(point.topology).chips for point in growth.LINES["chips"]] == [16, 64, 256, 1024]


def test_a_plot_of_what_is_there(tmp_path):
    rows = [
        {"line": "chips", "point": "v5p:2x2x4 a", "GiB": 9.0, "sent_GiB": 3.0, "seconds": 2.0}
        | growth.formula(growth.LINES["chips"][0]),
        {"line": "chips", "point": "v5p:4x4x4 a", "problem": "not yet"} | growth.formula(growth.LINES["chips"][1]),
    ]
    growth._relative(rows)
    assert rows[0]["growth"] == 1 == rows[1]["formula_growth"] and "growth" not in rows[1]
    growth.draw(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("line", growth.LINES)
def test_points_are_batches_that_fit_the_mesh(line):
    for point in growth.LINES[line]:
        assert point.batch % (growth.pod_named(point.topology).devices // 4) == 0
