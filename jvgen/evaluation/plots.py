"""Line plots and grids of heat maps, drawn with matplotlib and saved as PNG and SVG.

matplotlib is imported by the first plot, so that importing jvgen stays fast, and pyplot never is: no display and no
figure left open. The same values give the same bytes.
"""

import dataclasses
import html
import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jvgen.storage import Path, as_path, write_bytes, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Legible on a white and on a dark page.
COLORS = ("#3b82c4", "#d2603a", "#3a9d66", "#9067c6", "#c08a1e", "#1c97a3", "#c04b8d", "#7b8591")
GRAY = "#7b8591"
STYLE: Mapping[str, Any] = {
    "font.size": 10.5,
    "axes.titlesize": 10.5,
    "axes.facecolor": "none",
    "axes.edgecolor": GRAY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.limits": (-4, 5),
    "xtick.color": GRAY,
    "xtick.labelcolor": "black",
    "ytick.color": GRAY,
    "ytick.labelcolor": "black",
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text, so that a page can set its color and font
    "svg.hashsalt": "jvgen",
}
NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}
MAX_POINTS = 600  # of one line: a plot is about this many pixels wide
DPI = 160  # of PNG files


@dataclasses.dataclass(frozen=True)
class Series:
    """One line of a plot. Values that are not finite (on a logarithmic axis: not positive) are left out.

    Attributes:
      name: in the legend.
      x, y: coordinates of the points, in order.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]


def line_plot(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    title: str = "",
    logarithmic: bool = False,
    smoothing: float = 0.0,
) -> "Figure":
    """A line for each series; a single series has no legend.

    Args:
      series: colors repeat after eight.
      x_label, y_label: of the axes, with units.
      title: above the plot.
      logarithmic: scale of the y axis.
      smoothing: weight of the past in a bias-corrected exponential moving average, in [0, 1); the raw values stay
        visible behind it. 0 draws the raw values only.

    Raises:
      ValueError: a smoothing outside [0, 1), or a series with more x than y values or the reverse.
    """
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing = {smoothing}: must lie in [0, 1), as 0.9.")
    points = [_finite(one, logarithmic) for one in series]
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(dict(STYLE)):
        figure = Figure(figsize=(5.0, 3.1), layout="constrained")
        axes = figure.add_subplot(xlabel=x_label, ylabel=y_label, title=title)
        axes.grid(color=GRAY, alpha=0.25, linewidth=0.7)
        for index, (one, (x, y)) in enumerate(zip(series, points, strict=True)):
            color = COLORS[index % len(COLORS)]
            if smoothing and len(x) > 2:
                axes.plot(*thinned(x, y), color=color, linewidth=0.8, alpha=0.3)
                y = smoothed(y, smoothing)
            axes.plot(*thinned(x, y), color=color, linewidth=1.6, label=one.name, marker="o" * (len(x) == 1))
        x_values, y_values = (np.concatenate([np.zeros(0), *(one[axis] for one in points)]) for axis in (0, 1))
        if not len(y_values):
            axes.text(0.5, 0.5, "no values", color=GRAY, ha="center", va="center", transform=axes.transAxes)
            axes.set(xticks=[], yticks=[])
            return figure
        _set_ticks(axes, x_values, y_values, logarithmic)
        if len(series) > 1:
            rows = -(-len(series) // 3)
            figure.legend(loc="outside lower center", ncols=-(-len(series) // rows))
    return figure


def heat_maps(
    maps: Sequence[np.ndarray],
    titles: Sequence[str],
    *,
    x_label: str,
    y_label: str,
    color_label: str,
    title: str = "",
    columns: int = 4,
    limits: tuple[float, float] | None = None,
) -> "Figure":
    """A grid of matrices on one color scale, row 0 at the top, with one color bar. Non-finite cells stay empty.

    Args:
      maps: 2-D arrays.
      titles: one above each map.
      x_label, y_label: what columns and rows of a map are.
      color_label: what the numbers are, with their unit.
      title: above the grid.
      columns: maps side by side.
      limits: of the color scale; by default the range of all maps.

    Raises:
      ValueError: no maps, or another number of titles.
    """
    if not maps or len(maps) != len(titles):
        raise ValueError(f"{len(maps)} maps and {len(titles)} titles: give one title for each of at least one map.")
    maps = [np.asarray(one, np.float64) for one in maps]
    finite = np.concatenate([one[np.isfinite(one)] for one in maps])
    low, high = limits or ((finite.min(), finite.max()) if len(finite) else (0.0, 1.0))
    columns = min(columns, len(maps))
    rows = -(-len(maps) // columns)
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context(dict(STYLE)):
        figure = Figure(figsize=(2.1 * columns + 1.3, 2.1 * rows + 0.7), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, sharex=_same(maps, 1), sharey=_same(maps, 0))
        for axes, one, name in zip(grid.flat, maps, titles, strict=False):
            image = axes.imshow(one, vmin=low, vmax=high, cmap="viridis", aspect="auto", interpolation="nearest")
            axes.set_title(name)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(MaxNLocator(5, integer=True))
        for axes in grid.flat[len(maps) :]:
            axes.set_axis_off()
        figure.supxlabel(x_label, fontsize=STYLE["font.size"])
        figure.supylabel(y_label, fontsize=STYLE["font.size"])
        figure.suptitle(title, fontsize=STYLE["font.size"] + 1.5)
        figure.colorbar(image, ax=grid, label=color_label, fraction=0.05)
    return figure


@dataclasses.dataclass(frozen=True)
class Histogram:
    """How often values occur: numbers in bins, or labels.

    Attributes:
      name: above its panel.
      edges: borders of the bins, one more than counts; empty for labels.
      labels: one per count; empty for numbers.
      counts: of each bin or label.
    """

    name: str
    edges: Sequence[float]
    labels: Sequence[str]
    counts: Sequence[int]


def histograms(panels: Sequence[Histogram], *, title: str = "", columns: int = 3) -> "Figure":
    """A panel for each histogram: bins as steps, labels as horizontal bars with their share.

    Raises:
      ValueError: no panels, or one with another number of edges or labels than its counts need.
    """
    if not panels:
        raise ValueError("no histograms: give at least one.")
    for one in panels:
        if len(one.edges) != len(one.counts) + 1 if one.edges else len(one.labels) != len(one.counts):
            raise ValueError(f"{one.name}: {len(one.counts)} counts, {len(one.edges)} edges, {len(one.labels)} labels.")
    import matplotlib
    from matplotlib.figure import Figure

    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context(dict(STYLE)):
        figure = Figure(figsize=(4.0 * columns, 2.6 * rows + 0.5), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        for number, (axes, one) in enumerate(zip(grid.flat, panels, strict=False)):
            axes.set_title(one.name)
            color, total = COLORS[number % len(COLORS)], max(sum(one.counts), 1)
            if not one.counts:
                axes.text(0.5, 0.5, "no values", color=GRAY, ha="center", va="center", transform=axes.transAxes)
                axes.set(xticks=[], yticks=[])
            elif one.edges:
                axes.stairs(one.counts, one.edges, fill=True, color=color)
                axes.set_ylim(bottom=0)
            else:
                places = np.arange(len(one.labels))
                axes.barh(places, one.counts, color=color)
                axes.set_yticks(places, [label if len(label) <= 24 else f"{label[:23]}…" for label in one.labels])
                axes.set_xlim(0, 1.18 * max(one.counts))
                axes.invert_yaxis()
                for place, count in enumerate(one.counts):
                    axes.text(count, place, f" {count / total:.1%}", va="center", color=GRAY, fontsize=8.5)
        for axes in grid.flat[len(panels) :]:
            axes.set_axis_off()
        figure.suptitle(title, fontsize=STYLE["font.size"] + 1.5)
    return figure


def save_plot(figure: "Figure", path: str | Path) -> tuple[Path, Path]:
    """Write a figure as `path` with the endings .png and .svg; returns both paths."""
    png, svg = (as_path(path).with_suffix(ending) for ending in (".png", ".svg"))
    write_bytes(png, png_of(figure))
    write_text(svg, _svg(figure, "white"))
    return png, svg


def png_of(figure: "Figure") -> bytes:
    """A figure as a PNG, for notebooks."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def inline_svg(figure: "Figure", label: str) -> str:
    """A figure as an `<svg>` element for a web page, on a transparent ground.

    Args:
      figure: see `line_plot` and `heat_maps`.
      label: what the plot shows, for screen readers.
    """
    text = re.sub(r"<!--.*?-->\s*", "", _svg(figure, "none"), flags=re.DOTALL)
    return text[text.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1)


def smoothed(values: np.ndarray, weight: float) -> np.ndarray:
    """Exponential moving average, bias-corrected so that it starts at the first value."""
    averages, average = np.empty(len(values)), 0.0
    for index, value in enumerate(values):
        average = weight * average + (1 - weight) * value
        averages[index] = average / (1 - weight ** (index + 1))
    return averages


def thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most about `MAX_POINTS` points: the least and the greatest of each interval, so that spikes stay visible."""
    if len(x) <= MAX_POINTS:
        return x, y
    kept = {0, len(x) - 1}
    for interval in np.array_split(np.arange(len(x)), MAX_POINTS // 2):
        kept |= {int(interval[np.argmin(y[interval])]), int(interval[np.argmax(y[interval])])}
    order = sorted(kept)
    return x[order], y[order]


def _finite(one: Series, logarithmic: bool) -> tuple[np.ndarray, np.ndarray]:
    if len(one.x) != len(one.y):
        raise ValueError(f"series {one.name!r}: {len(one.x)} x values, {len(one.y)} y values.")
    x, y = np.asarray(one.x, np.float64), np.asarray(one.y, np.float64)
    usable = np.isfinite(x) & np.isfinite(y) & ((y > 0) if logarithmic else True)
    return x[usable], y[usable]


def _set_ticks(axes: Any, x: np.ndarray, y: np.ndarray, logarithmic: bool) -> None:
    """Short numbers on both axes: 20k steps, and 0.5 rather than 5 x 10^-1."""
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=bool((x == x.round()).all())))
    if np.abs(x).max() >= 1e4:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if not logarithmic:
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    if y.max() / y.min() < 100:
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axes.yaxis.set_minor_formatter("{x:g}")


def _same(maps: Sequence[np.ndarray], axis: int) -> bool:
    return len({one.shape[axis] for one in maps}) == 1


def _svg(figure: "Figure", ground: str) -> str:
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context(dict(STYLE)):
        figure.savefig(buffer, format="svg", facecolor=ground, metadata=NO_METADATA)
    return buffer.getvalue()
