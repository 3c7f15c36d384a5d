"""Line charts as SVG text: several series, raw and smoothed, with round ticks, linear or logarithmic."""

import dataclasses
import html
import math
from collections.abc import Sequence

import numpy as np

COLORS = ("#2563a8", "#c8553d", "#2f8f5b", "#8b5fbf", "#b7791f", "#0e7c86", "#a83279", "#5b6470")
_WIDTH, _HEIGHT = 640, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 72, 20, 14, 54
_POINTS = 600  # a chart is this many pixels wide at most; more points only make the file larger


@dataclasses.dataclass(frozen=True)
class Series:
    """One line. Points that are not finite (or not positive on a logarithmic axis) are left out.

    Attributes:
      name: in the legend.
      x, y: of the points, in order.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]


def line_chart(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    logarithmic: bool = False,
    smoothing: float = 0.0,
) -> str:
    """SVG of a line chart.

    Args:
      series: lines; colours repeat after eight.
      x_label, y_label: what the axes are, with units.
      logarithmic: of the y axis.
      smoothing: 0..1, weight of the past in an exponential mean that is corrected at its start; the raw values stay
        visible behind it. 0 draws the raw values only.
    """
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing = {smoothing}: must lie in [0, 1), as 0.9.")
    lines = [_clean(one, logarithmic) for one in series]
    x_values, y_values = (np.concatenate([line[k] for line in lines] or [np.zeros(0)]) for k in (0, 1))
    if not len(x_values):
        return f'<p class="empty">{html.escape(y_label)}: no values.</p>'
    x_ticks = nice_ticks(float(x_values.min()), float(x_values.max()), 7)
    y_ticks = log_ticks(float(y_values.min()), float(y_values.max())) if logarithmic else None
    y_ticks = y_ticks or nice_ticks(float(y_values.min()), float(y_values.max()), 6)
    scale_y = math.log10 if logarithmic else float
    x_low, x_high = float(x_values.min()), float(x_values.max())
    # A run of steps 0..1499 deserves its tick at 1500.
    x_high = next((t for t in x_ticks if x_high < t <= x_high + 0.02 * (x_high - x_low)), x_high)
    y_low, y_high = (scale_y(edge(edge(y_ticks), edge(y_values))) for edge in (min, max))
    x_span, y_span = (x_high - x_low) or 1.0, (y_high - y_low) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + (x - x_low) / x_span * (_WIDTH - _LEFT - _RIGHT)
        return across, _HEIGHT - _BOTTOM - (scale_y(y) - y_low) / y_span * (_HEIGHT - _TOP - _BOTTOM)

    parts = [_axes(place, [t for t in x_ticks if x_low <= t <= x_high], y_ticks, x_label, y_label)]
    for index, (x, y) in enumerate(lines):
        color = COLORS[index % len(COLORS)]
        if smoothing and len(x) > 2:
            parts.append(_path(place, *thin(x, y), color, 'stroke-width="1" opacity="0.3"'))
            every = max(1, math.ceil(len(x) / _POINTS))
            x, y = x[::every], smooth(y, smoothing)[::every]
        parts.append(_path(place, *thin(x, y), color, 'stroke-width="1.8"'))
    legend = (
        ""
        if len(series) == 1
        else "".join(
            f'<span><i style="background:{COLORS[index % len(COLORS)]}"></i>{html.escape(one.name)}</span>'
            for index, one in enumerate(series)
        )
    )
    label = html.escape(f"{y_label} against {x_label}", quote=True)
    chart = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    return chart + (f'<div class="legend">{legend}</div>' if legend else "")


def smooth(values: np.ndarray, weight: float) -> np.ndarray:
    """Exponential mean, corrected at its start so that it begins at the first value."""
    smoothed, mean = np.empty(len(values)), 0.0
    for index, value in enumerate(values):
        mean = weight * mean + (1 - weight) * value
        smoothed[index] = mean / (1 - weight ** (index + 1))
    return smoothed


def thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most about 600 points: the least and the greatest of each stretch, so that spikes stay visible."""
    if len(x) <= _POINTS:
        return x, y
    kept = {0, len(x) - 1}
    for stretch in np.array_split(np.arange(len(x)), _POINTS // 2):
        kept |= {int(stretch[np.argmin(y[stretch])]), int(stretch[np.argmax(y[stretch])])}
    order = sorted(kept)
    return x[order], y[order]


def nice_ticks(low: float, high: float, wanted: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten that cover [low, high], about `wanted` of them."""
    if high <= low:
        margin = abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / max(wanted - 1, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten over [low, high], with 2 and 5 between them where the span is short; empty if too few fit."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1,) if math.log10(high / low) > 2.5 else (1, 2, 5)
    stride = max(1, math.ceil((last - first) / 7))
    ticks = [f * 10.0**e for e in range(first, last + 1, stride) for f in factors]
    below = [t for t in ticks if t <= low * 1.000001][-1:]
    above = [t for t in ticks if t >= high * 0.999999][:1]
    inside = below + [t for t in ticks if low < t < high] + above
    return sorted(set(inside)) if len(set(inside)) >= 2 else []


def tick_text(value: float) -> str:
    """A short number: 0.05, 1200, 15k, 2M, 1e-5."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e15 or size < 1e-3:
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    for power, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= power:
            return f"{value / (1e3 if letter == 'k' else power):.6g}{letter}"
    return f"{value:.6g}"


def _clean(one: Series, logarithmic: bool) -> tuple[np.ndarray, np.ndarray]:
    if len(one.x) != len(one.y):
        raise ValueError(f"series {one.name!r}: {len(one.x)} x values, {len(one.y)} y values.")
    x, y = np.asarray(one.x, np.float64), np.asarray(one.y, np.float64)
    usable = np.isfinite(x) & np.isfinite(y) & ((y > 0) if logarithmic else True)
    return x[usable], y[usable]


def _path(place, x: np.ndarray, y: np.ndarray, color: str, style: str) -> str:
    points = [place(float(a), float(b)) for a, b in zip(x, y, strict=True)]
    if len(points) == 1:
        return f'<circle cx="{points[0][0]:.1f}" cy="{points[0][1]:.1f}" r="3" fill="{color}"/>'
    text = " ".join(f"{across:.1f},{down:.1f}" for across, down in points)
    return f'<polyline points="{text}" fill="none" stroke="{color}" stroke-linejoin="round" {style}/>'


def _axes(place, x_ticks: list[float], y_ticks: list[float], x_label: str, y_label: str) -> str:
    left, right, bottom = _LEFT, _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = []
    for tick in y_ticks:
        down = place(0.0, tick)[1]
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{down:.1f}" y2="{down:.1f}"/>')
        parts.append(f'<text x="{left - 8}" y="{down:.1f}" dy="0.35em" text-anchor="end">{tick_text(tick)}</text>')
    for tick in x_ticks:
        across = place(tick, y_ticks[0])[0]
        parts.append(f'<line class="axis" x1="{across:.1f}" x2="{across:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(f'<text x="{across:.1f}" y="{bottom + 21}" text-anchor="middle">{tick_text(tick)}</text>')
    parts.append(f'<line class="axis" x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(
        f'<text class="label" x="{(left + right) / 2}" y="{_HEIGHT - 8}" text-anchor="middle">'
        f"{html.escape(x_label)}</text>"
    )
    middle = (_TOP + bottom) / 2
    parts.append(
        f'<text class="label" x="16" y="{middle}" text-anchor="middle" transform="rotate(-90 16 {middle})">'
        f"{html.escape(y_label)}</text>"
    )
    return "".join(parts)
