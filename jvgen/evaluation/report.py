"""A report as one HTML file with text, tables, plots, images and clips embedded: no scripts, nothing loaded.

The page is `templates/report.html.j2`; this module collects what it shows.
"""

import base64
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import markupsafe
import numpy as np

from jvgen.evaluation.contact_sheets import contact_sheet, gif_bytes, png_bytes
from jvgen.evaluation.plots import Series, inline_svg, line_plot
from jvgen.storage import Path, as_path, write_text


class Report:
    """Collects the parts of a report in order and writes them as one file.

    Every method returns the report, so that calls can be chained. Text is escaped; `` `code` `` becomes code.

    Args:
      title: heading of the page.
      subtitle: one line below it.
    """

    def __init__(self, title: str, subtitle: str = ""):
        self.title = title
        self.subtitle = subtitle
        self._parts: list[dict[str, Any]] = []

    def section(self, heading: str) -> "Report":
        """Start a section, which is listed in the contents."""
        return self._add("section", heading=heading)

    def subsection(self, heading: str) -> "Report":
        """Start a part of a section."""
        return self._add("subsection", heading=heading)

    def text(self, *paragraphs: str) -> "Report":
        """Paragraphs of plain text."""
        return self._add("text", paragraphs=paragraphs)

    def table(self, rows: Sequence[Sequence[Any]], header: Sequence[str], caption: str = "") -> "Report":
        """A table. Columns of numbers (and None, shown as a dash) are right-aligned; floats have 4 digits.

        Raises:
          ValueError: a row that is longer or shorter than the header.
        """
        for row in rows:
            if len(row) != len(header):
                raise ValueError(f"table row {tuple(row)}: {len(row)} cells, but the header has {len(header)}.")
        numeric = [bool(rows) and all(_is_number(row[k]) for row in rows) for k in range(len(header))]
        cells = [[_cell(value) for value in row] for row in rows]
        return self._add("table", header=header, rows=cells, numeric=numeric, caption=caption)

    def plot(
        self,
        rows: Sequence[Mapping[str, Any]],
        names: Sequence[str] | Mapping[str, str],
        *,
        x: str = "step",
        x_label: str | None = None,
        y_label: str = "",
        caption: str = "",
        logarithmic: bool = False,
        smoothing: float = 0.0,
    ) -> "Report":
        """A line plot of metrics, from rows of `metrics.jsonl`. Consecutive plots stand side by side.

        Args:
          rows: one mapping per step; a row without a metric is left out of its line.
          names: metrics to draw, or a mapping from metric to its name in the legend.
          x: the key along the x axis.
          x_label, y_label: of the axes; by default the names of `x` and of a single metric.
          caption: below the plot.
          logarithmic, smoothing: see `jvgen.evaluation.plots.line_plot`.
        """
        titles = dict(names) if isinstance(names, Mapping) else {name: name for name in names}
        series = []
        for name, title in titles.items():
            points = [(row[x], row[name]) for row in rows if _is_value(row.get(x)) and _is_value(row.get(name))]
            series.append(Series(title, [point[0] for point in points], [point[1] for point in points]))
        x_label, y_label = x_label or x, y_label or (next(iter(titles.values())) if len(titles) == 1 else "value")
        figure = line_plot(series, x_label=x_label, y_label=y_label, logarithmic=logarithmic, smoothing=smoothing)
        drawn = {
            "svg": markupsafe.Markup(inline_svg(figure, f"{y_label} against {x_label}: {', '.join(titles.values())}")),
            "caption": caption,
        }
        if self._parts and self._parts[-1]["kind"] == "plots":
            self._parts[-1]["plots"].append(drawn)
            return self
        return self._add("plots", plots=[drawn])

    def clips(
        self,
        groups: Mapping[str, Sequence[np.ndarray]],
        captions: Sequence[str] = (),
        *,
        frames_per_second: float = 8.0,
        scale: int = 4,
        caption: str = "",
    ) -> "Report":
        """Moving clips side by side, one row per example.

        Args:
          groups: by name ("real", "reconstructed", "sampled"), the same number of uint8 `F H W 3` clips each.
          captions: one per example, shown above it.
          frames_per_second: playback rate.
          scale: width on the page over width in pixels.
          caption: below all of them.

        Raises:
          ValueError: groups or captions that differ in number.
        """
        counts = {name: len(clips) for name, clips in groups.items()}
        if len(set(counts.values())) != 1 or (captions and {len(captions)} != set(counts.values())):
            raise ValueError(f"clips {counts} and {len(captions)} captions: the same number of each is needed.")
        rows = []
        for index in range(next(iter(counts.values()))):
            shown = [
                {"name": name, "width": clips[index].shape[2] * scale, "height": clips[index].shape[1] * scale,
                 "data": _base64(gif_bytes(clips[index], frames_per_second=frames_per_second))}
                for name, clips in groups.items()
            ]  # fmt: skip
            rows.append({"caption": captions[index] if captions else "", "clips": shown})
        return self._add("clips", rows=rows, caption=caption)

    def contact_sheet(
        self, clips: Sequence[np.ndarray], caption: str = "", *, frames: int | None = 8, scale: int = 2
    ) -> "Report":
        """Frames of uint8 `F H W 3` clips, one row per clip."""
        return self.image(contact_sheet(clips, frames=frames), caption, scale=scale)

    def image(self, image: np.ndarray, caption: str = "", *, scale: int = 1) -> "Report":
        """A uint8 `H W 3` image, `scale` times as wide on the page as in pixels."""
        return self._add("image", data=_base64(png_bytes(image)), width=image.shape[1] * scale, caption=caption)

    def code(self, *lines: str) -> "Report":
        """Commands or other text in a fixed-width font."""
        return self._add("code", lines=lines)

    def definitions(self, meanings: Mapping[str, str]) -> "Report":
        """Terms and their meanings."""
        return self._add("definitions", meanings=list(meanings.items()))

    def render(self) -> str:
        """The page as text."""
        return _template().render(title=self.title, subtitle=self.subtitle, parts=self._parts)

    def write(self, path: str | Path) -> Path:
        """Write the page, creating its folder where it is missing; returns the path."""
        path = as_path(path)
        write_text(path, self.render())
        return path

    def _add(self, kind: str, **values: Any) -> "Report":
        self._parts.append({"kind": kind, **values})
        return self


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("jvgen.evaluation"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["inline"] = _inline
    return environment.get_template("report.html.j2")


def _inline(text: str) -> markupsafe.Markup:
    """Escaped text in which `code` between backticks is set as code."""
    pieces = [markupsafe.escape(piece) for piece in str(text).split("`")]
    if len(pieces) % 2 == 0:
        return markupsafe.Markup("`").join(pieces)
    code = markupsafe.Markup("<code>{}</code>")
    return markupsafe.Markup("").join(code.format(piece) if k % 2 else piece for k, piece in enumerate(pieces))


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float, np.number)) and not isinstance(value, bool))


def _is_value(value: Any) -> bool:
    return value is not None and _is_number(value)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, (float, np.floating)):
        text = f"{float(value):,.4g}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{float(value):.3e}"
        return text if set(text) & set(".ein") else f"{text}.0"
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return f"{int(value):,}"
    return str(value)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
