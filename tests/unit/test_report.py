"""A report is one valid file that loads nothing and escapes its text; plots draw the values they are given."""

import html.parser
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from jvgen.evaluation.plots import Series, heat_maps, inline_svg, line_plot, save_plot, smoothed, thinned
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
    report.section("Loss").plot(
        rows, {"loss": "training loss"}, smoothing=0.9, logarithmic=True, caption="Down & down."
    )
    report.plot(rows, ["rate"]).plot(rows, ["missing"], y_label="missing")
    report.section("Clips").clips({"real": clips, "sampled": clips}, ["a <red> ball", "a cone"]).contact_sheet(
        clips, "all"
    )
    report.section("Words").text("Plain < text with `code`.").code("make demo", "a < b").definitions({"PSNR": "in dB"})
    return report.table([["a", 1, 0.97, None], ["b", 12345, 1.0, 2.5e-5]], ["name", "n", "share", "rate"])


def test_the_page_is_valid_and_loads_nothing():
    page = example().render()
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    tags = {tag for tag, _ in parser.seen}
    assert not tags & {"script", "link", "iframe", "object"} and {"svg", "img", "table", "pre", "dl"} <= tags
    for tag, attributes in parser.seen:
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("data:", "#")), (tag, attributes[name][:50])
    assert "@import" not in page and set(re.findall(r"url\((.)", page)) <= {"#"}
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
    assert page.count("<svg") == 3 and ">no values<" in page


def test_write_creates_the_folder(tmp_path):
    path = example().write(tmp_path / "new" / "report.html")
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="header has 2"):
        Report("x").table([[1]], ["a", "b"])
    with pytest.raises(ValueError, match="the same number"):
        Report("x").clips({"real": [np.zeros((1, 2, 2, 3), np.uint8)], "sampled": []})
    with pytest.raises(ValueError, match="smoothing"):
        line_plot([Series("a", [0], [1])], x_label="x", y_label="y", smoothing=1.0)
    with pytest.raises(ValueError, match="series 'a': 2 x values, 1 y values"):
        line_plot([Series("a", [0, 1], [1])], x_label="x", y_label="y")
    with pytest.raises(ValueError, match="1 maps and 0 titles"):
        heat_maps([np.eye(2)], [], x_label="x", y_label="y", color_label="c")


@pytest.mark.parametrize("logarithmic", [False, True])
def test_a_plot_draws_finite_values_with_labels_and_a_legend(logarithmic):
    nan = float("nan")
    series = [Series("first", [0, 1, 2, 3], [1.0, nan, -2.0, 3.0]), Series("second", [0, 30_000], [0.5, 2.0])]
    figure = line_plot(series, x_label="step", y_label="loss (nats)", title="Losses", logarithmic=logarithmic)
    axes = figure.axes[0]
    drawn = [line.get_xydata().tolist() for line in axes.lines]
    assert drawn[0] == ([[0, 1], [3, 3]] if logarithmic else [[0, 1], [2, -2], [3, 3]])
    assert drawn[1] == [[0, 0.5], [30_000, 2.0]]
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("step", "loss (nats)", "Losses")
    assert axes.get_yscale() == ("log" if logarithmic else "linear")
    svg = inline_svg(figure, "loss & more")
    for expected in (">10k<", ">first<", ">second<", ">loss (nats)<", 'aria-label="loss &amp; more"', 'role="img"'):
        assert expected in svg
    assert svg.startswith("<svg") and "<metadata" not in svg


def test_raw_values_stay_visible_behind_smoothed_ones():
    figure = line_plot([Series("a", range(9), range(9))], x_label="x", y_label="y", smoothing=0.5)
    raw, averaged = figure.axes[0].lines
    np.testing.assert_allclose(raw.get_ydata(), np.arange(9))
    np.testing.assert_allclose(averaged.get_ydata(), smoothed(np.arange(9.0), 0.5))
    assert not figure.legends


def test_heat_maps_share_one_color_scale(tmp_path):
    maps = [np.eye(4), np.array([[0.25, np.nan, 3.0]])]
    figure = heat_maps(maps, ["a", "b"], x_label="to", y_label="from", color_label="weight (%)")
    images = [axes.images[0] for axes in figure.axes if axes.images]
    assert [image.get_clim() for image in images] == [(0, 3), (0, 3)]
    assert figure.axes[-1].get_ylabel() == "weight (%)"
    png, svg = save_plot(figure, tmp_path / "maps")
    assert (png.name, svg.name) == ("maps.png", "maps.svg")
    pixels = np.asarray(Image.open(png).convert("RGB")).reshape(-1, 3)
    assert len(np.unique(pixels, axis=0)) > 20 and ">weight (%)<" in svg.read_text()


def test_equal_plots_have_equal_bytes(tmp_path):
    def plot():
        return line_plot([Series("a", [0, 1], [1, 2]), Series("b", [0, 1], [2, 3])], x_label="x", y_label="y")

    written = [save_plot(plot(), tmp_path / name) for name in ("one", "two")]
    for first, second in zip(*written, strict=True):
        assert first.read_bytes() == second.read_bytes()


def test_importing_the_report_does_not_import_matplotlib():
    code = "import jvgen.evaluation.report, sys; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_smoothing_starts_at_the_first_value_and_thinning_keeps_spikes():
    np.testing.assert_allclose(smoothed(np.full(5, 3.0), 0.9), 3.0)
    assert smoothed(np.asarray([4.0, 0.0]), 0.9)[0] == 4.0
    values = np.zeros(5000)
    values[3210] = 9.0
    x, y = thinned(np.arange(5000), values)
    assert len(x) <= 610 and y.max() == 9.0 and x[0] == 0 and x[-1] == 4999
