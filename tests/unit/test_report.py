"""A report stands alone, escapes what it is given, and its charts put every value where the ticks say."""

import html.parser
import re

import numpy as np
import pytest

from jvgen.evaluation.line_chart import Series, line_chart, log_ticks, nice_ticks, smooth, thin, tick_text
from jvgen.evaluation.report import Report

VOID = {"meta", "img", "br", "link"}


class Balance(html.parser.HTMLParser):
    """Checks that every element that is opened is closed, in order."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, (tag, self.open[-3:])
        self.open.pop()


def example():
    random = np.random.default_rng(0)
    clips = list(random.integers(0, 256, (2, 4, 8, 10, 3), dtype=np.uint8))
    rows = [{"step": k, "loss": 1 / (k + 1), "rate": 3e-4} for k in range(50)] + [{"step": 50, "psnr": 20.0}]
    report = Report("A <run> & more", "made with `make demo`")
    report.section("Loss").chart(
        rows, {"loss": "training loss"}, smoothing=0.9, logarithmic=True, caption="Down & down."
    )
    report.chart(rows, ["rate"]).chart(rows, ["missing"], y_label="missing")
    report.section("Clips").clips({"real": clips, "sampled": clips}, ["a <red> ball", "a cone"]).contact_sheet(
        clips, "all"
    )
    report.section("Words").text("Plain < text with `code`.").code("make demo", "a < b").definitions({"PSNR": "in dB"})
    return report.table([["a", 1, 0.97, None], ["b", 12345, 1.0, 2.5e-5]], ["name", "n", "share", "rate"])


def test_the_page_is_whole_and_loads_nothing():
    page = example().render()
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    tags = {tag for tag, _ in parser.seen}
    assert not tags & {"script", "link", "iframe", "object"} and {"svg", "img", "table", "pre", "dl"} <= tags
    for tag, attributes in parser.seen:
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("data:", "#")), (tag, attributes[name][:50])
    assert "url(" not in page and "@import" not in page
    assert page.count("data:image/gif;base64,") == 4 and page.count("data:image/png;base64,") == 1


def test_text_is_escaped_and_numbers_are_short():
    page = example().render()
    for expected in (
        "A &lt;run&gt; &amp; more",
        "a &lt;red&gt; ball",
        "Plain &lt; text with <code>code</code>",
        "a &lt; b",
    ):
        assert expected in page
    for cell in ("12,345", "0.97", "1.0", "2.500e-05", "–"):
        assert f'<td class="number">{cell}</td>' in page
    assert "missing: no values." in page


def test_write_makes_the_folder(tmp_path):
    path = example().write(tmp_path / "new" / "report.html")
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="header has 2"):
        Report("x").table([[1]], ["a", "b"])
    with pytest.raises(ValueError, match="the same number"):
        Report("x").clips({"real": [np.zeros((1, 2, 2, 3), np.uint8)], "sampled": []})
    with pytest.raises(ValueError, match="smoothing"):
        line_chart([Series("a", [0], [1])], x_label="x", y_label="y", smoothing=1.0)


def points(svg):
    return [tuple(map(float, pair.split(","))) for pair in re.search(r'points="([^"]+)"', svg)[1].split()]


@pytest.mark.parametrize("logarithmic", [False, True])
def test_a_value_on_a_tick_is_drawn_on_its_grid_line(logarithmic):
    svg = line_chart([Series("a", [0, 5, 10], [1.0, 10.0, 100.0])], x_label="x", y_label="y", logarithmic=logarithmic)
    lines = sorted((float(y) for y in re.findall(r'class="grid"[^>]* y1="([\d.]+)"', svg)), reverse=True)
    drawn = points(svg)
    assert drawn[0][1] > drawn[1][1] > drawn[2][1] and min(abs(drawn[2][1] - y) for y in lines) < 0.11
    middle = (drawn[0][1] + drawn[2][1]) / 2
    assert abs(drawn[1][1] - middle) < 0.2 if logarithmic else drawn[1][1] > middle + 50


def test_ticks_are_round_and_cover_the_values():
    assert nice_ticks(0, 1499, 7) == [0, 500, 1000, 1500]
    assert nice_ticks(3.0, 3.0, 5)[0] < 3.0 < nice_ticks(3.0, 3.0, 5)[-1]
    for low, high in ((0.013, 0.92), (-7, 12345), (1e-7, 2e-7)):
        ticks = nice_ticks(low, high, 6)
        assert ticks[0] <= low and ticks[-1] >= high and 3 <= len(ticks) <= 9
    np.testing.assert_allclose(log_ticks(0.06, 1.1), [0.05, 0.1, 0.2, 0.5, 1.0, 2.0])
    np.testing.assert_allclose(log_ticks(2e-6, 3.0), 10.0 ** np.arange(-6, 2))
    texts = [tick_text(v) for v in (0, 0.05, 1200, 15000, 2e6, 3e-4, 1e-5, -0.5)]
    assert texts == ["0", "0.05", "1200", "15k", "2M", "3e-4", "1e-5", "-0.5"]


def test_smoothing_starts_at_the_first_value_and_thinning_keeps_spikes():
    np.testing.assert_allclose(smooth(np.full(5, 3.0), 0.9), 3.0)
    assert smooth(np.asarray([4.0, 0.0]), 0.9)[0] == 4.0
    values = np.zeros(5000)
    values[3210] = 9.0
    x, y = thin(np.arange(5000), values)
    assert len(x) <= 610 and y.max() == 9.0 and x[0] == 0 and x[-1] == 4999


def test_values_that_are_not_finite_leave_a_chart_whole():
    svg = line_chart(
        [Series("a", [0, 1, 2, 3], [1.0, float("nan"), -2.0, 3.0])], x_label="x", y_label="y", logarithmic=True
    )
    assert len(points(svg)) == 2 and "nan" not in svg
