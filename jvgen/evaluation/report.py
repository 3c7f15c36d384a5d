"""A report as one HTML file: text, tables, charts, pictures and clips embedded; no scripts, nothing loaded."""

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jvgen.evaluation.contact_sheet import contact_sheet, gif_bytes, png_bytes
from jvgen.evaluation.line_chart import Series, line_chart

_STYLE = """
:root { color-scheme: light; --ink: #1d2430; --soft: #5b6470; --line: #dfe3e8; --paper: #fff; --tint: #f5f7f9;
  --accent: #2563a8 }
* { box-sizing: border-box }
body { margin: 0; background: var(--tint); color: var(--ink); line-height: 1.55;
  font: 16px/1.55 -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif }
main { max-width: 1080px; margin: 0 auto; padding: 40px 48px 64px; background: var(--paper); min-height: 100vh;
  border-left: 1px solid var(--line); border-right: 1px solid var(--line) }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em }
h2 { font-size: 21px; margin: 44px 0 12px; padding-top: 18px; border-top: 1px solid var(--line) }
h3 { font-size: 16px; margin: 26px 0 8px }
p { margin: 0 0 12px; max-width: 76ch }
.subtitle { max-width: none }
.subtitle, figcaption, .empty { color: var(--soft) }
nav { margin: 14px 0 0; font-size: 14px; display: flex; flex-wrap: wrap; gap: 4px 18px }
a { color: var(--accent); text-decoration: none }
a:hover { text-decoration: underline }
figure { margin: 18px 0 22px }
figcaption { font-size: 14px; margin-top: 6px; max-width: 76ch }
.scroll { overflow-x: auto; margin: 12px 0 18px }
table { border-collapse: collapse; font-size: 14.5px; font-variant-numeric: tabular-nums }
th, td { padding: 7px 18px 7px 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top }
th { color: var(--soft); font-weight: 600; font-size: 13px; border-bottom: 2px solid var(--line); white-space: nowrap }
td.number, th.number { text-align: right; white-space: nowrap }
pre { background: var(--tint); border: 1px solid var(--line); border-radius: 6px; padding: 12px 14px; overflow-x: auto;
  font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; margin: 12px 0 18px }
code { font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 0.9em }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); gap: 8px 28px }
.charts figure { margin: 8px 0 12px; min-width: 0 }
.charts.single { max-width: 720px }
svg { display: block; width: 100%; height: auto; overflow: visible }
svg text { font: 15px -apple-system, "Segoe UI", Roboto, "Liberation Sans", Arial, sans-serif; fill: #5b6470 }
svg text.label { fill: #1d2430 }
svg .grid { stroke: #e8ebef; stroke-width: 1 }
svg .axis { stroke: #9aa3ad; stroke-width: 1 }
.legend { display: flex; flex-wrap: wrap; gap: 2px 18px; font-size: 13px; color: var(--soft); padding-left: 10% }
.legend i { display: inline-block; width: 14px; height: 3px; border-radius: 2px; margin-right: 6px;
  vertical-align: middle }
.clips { display: flex; flex-wrap: wrap; gap: 22px 28px; margin: 14px 0 20px }
.clip-row .frames { display: flex; gap: 10px }
.clip-row figure { margin: 0 }
.clip-row figure figcaption { font-size: 12.5px; margin-top: 3px; text-align: center }
.clip-row .caption { font-size: 14px; margin: 0 0 6px; max-width: none }
img { image-rendering: pixelated; display: block; max-width: 100%; height: auto; border-radius: 3px }
dl { display: grid; grid-template-columns: minmax(150px, max-content) 1fr; gap: 8px 22px; font-size: 14.5px;
  margin: 12px 0 18px }
dt { font-weight: 600 }
dd { margin: 0; max-width: 70ch }
@media (max-width: 700px) {
  main { padding: 24px 16px 40px; border: 0 }
  h1 { font-size: 24px }
  svg text { font-size: 20px }
  .legend { padding-left: 0 }
  .clip-row .frames { flex-wrap: wrap }
  dl { grid-template-columns: 1fr; gap: 2px } dd { margin-bottom: 10px }
}
"""


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
        self._headings: list[str] = []
        self._parts: list[str] = []

    def section(self, heading: str) -> "Report":
        """Start a section; it appears in the list of contents."""
        self._headings.append(heading)
        return self._add(f'<h2 id="section-{len(self._headings)}">{html.escape(heading)}</h2>')

    def subsection(self, heading: str) -> "Report":
        """Start a part of a section."""
        return self._add(f"<h3>{html.escape(heading)}</h3>")

    def text(self, *paragraphs: str) -> "Report":
        """Paragraphs of plain text."""
        return self._add("".join(f"<p>{_inline(paragraph)}</p>" for paragraph in paragraphs))

    def table(self, rows: Sequence[Sequence[Any]], header: Sequence[str], caption: str = "") -> "Report":
        """A table. Columns of numbers (and None, shown as a dash) are set to the right; floats get 4 digits."""
        for row in rows:
            if len(row) != len(header):
                raise ValueError(f"table row {tuple(row)}: {len(row)} cells, but the header has {len(header)}.")
        numeric = [bool(rows) and all(_is_number(row[k]) for row in rows) for k in range(len(header))]
        marks = [' class="number"' if number else "" for number in numeric]
        head = "".join(f"<th{mark}>{_inline(name)}</th>" for mark, name in zip(marks, header, strict=True))
        body = "".join(
            "<tr>" + "".join(f"<td{mark}>{_cell(cell)}</td>" for mark, cell in zip(marks, row, strict=True)) + "</tr>"
            for row in rows
        )
        caption = f"<figcaption>{_inline(caption)}</figcaption>" if caption else ""
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        return self._add(f'<figure><div class="scroll">{table}</div>{caption}</figure>')

    def chart(
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
        """A line chart of metrics, as rows of `metrics.jsonl` have them. Charts that follow one another share a row.

        Args:
          rows: one mapping a step; a row that lacks a metric is left out of its line.
          names: metrics to draw, or a mapping from metric to its name in the legend.
          x: the key along the x axis.
          x_label, y_label: what the axes are; the default names are those of `x` and of a single metric.
          caption: below the chart.
          logarithmic: of the y axis.
          smoothing: see `jvgen.evaluation.line_chart.line_chart`.
        """
        titles = dict(names) if isinstance(names, Mapping) else {name: name for name in names}
        series = []
        for name, title in titles.items():
            points = [(row[x], row[name]) for row in rows if _is_value(row.get(x)) and _is_value(row.get(name))]
            series.append(Series(title, [point[0] for point in points], [point[1] for point in points]))
        y_label = y_label or (next(iter(titles.values())) if len(titles) == 1 else "value")
        drawn = line_chart(series, x_label=x_label or x, y_label=y_label, logarithmic=logarithmic, smoothing=smoothing)
        caption = f"<figcaption>{_inline(caption)}</figcaption>" if caption else ""
        figure = f"<figure>{drawn}{caption}</figure>"
        if self._parts and self._parts[-1].startswith('<div class="charts'):
            row = self._parts[-1].replace("charts single", "charts").removesuffix("</div>")
            self._parts[-1] = f"{row}{figure}</div>"
            return self
        return self._add(f'<div class="charts single">{figure}</div>')

    def clips(
        self,
        groups: Mapping[str, Sequence[np.ndarray]],
        captions: Sequence[str] = (),
        *,
        frames_per_second: float = 8.0,
        scale: int = 2,
        caption: str = "",
    ) -> "Report":
        """Moving clips side by side, one row an example.

        Args:
          groups: by name ("real", "reconstructed", "sampled"), the same number of uint8 `F H W 3` clips each.
          captions: one an example, shown above it.
          frames_per_second: of the GIFs.
          scale: pixels of the page for one pixel of a clip.
          caption: below all of them.
        """
        counts = {name: len(clips) for name, clips in groups.items()}
        if len(set(counts.values())) != 1 or (captions and {len(captions)} != set(counts.values())):
            raise ValueError(f"clips {counts} and {len(captions)} captions: the same number of each is needed.")
        rows = []
        for index in range(next(iter(counts.values()))):
            shown = "".join(
                f"<figure>{_gif(clips[index], frames_per_second, scale, name)}"
                f"<figcaption>{html.escape(name)}</figcaption></figure>"
                for name, clips in groups.items()
            )
            above = f'<p class="caption">{html.escape(captions[index])}</p>' if captions else ""
            rows.append(f'<div class="clip-row">{above}<div class="frames">{shown}</div></div>')
        below = f"<figcaption>{_inline(caption)}</figcaption>" if caption else ""
        return self._add(f'<div class="clips">{"".join(rows)}</div>{below}')

    def contact_sheet(
        self, clips: Sequence[np.ndarray], caption: str = "", *, frames: int | None = 8, scale: int = 2
    ) -> "Report":
        """Frames of uint8 `F H W 3` clips, one row a clip."""
        return self.image(contact_sheet(clips, frames=frames), caption, scale=scale)

    def image(self, image: np.ndarray, caption: str = "", *, scale: int = 1) -> "Report":
        """A uint8 `H W 3` picture."""
        size = f'width="{image.shape[1] * scale}"'
        below = f"<figcaption>{_inline(caption)}</figcaption>" if caption else ""
        source, meaning = _base64(png_bytes(image)), html.escape(caption, quote=True)
        picture = f'<img src="data:image/png;base64,{source}" alt="{meaning}" {size}>'
        return self._add(f"<figure>{picture}{below}</figure>")

    def code(self, *commands: str) -> "Report":
        """Commands or other text to be read as it is."""
        return self._add(f"<pre>{html.escape(chr(10).join(commands))}</pre>")

    def definitions(self, meanings: Mapping[str, str]) -> "Report":
        """What each measure means."""
        pairs = "".join(f"<dt>{_inline(name)}</dt><dd>{_inline(meaning)}</dd>" for name, meaning in meanings.items())
        return self._add(f"<dl>{pairs}</dl>")

    def render(self) -> str:
        """The page as text."""
        title = html.escape(self.title)
        subtitle = f'<p class="subtitle">{_inline(self.subtitle)}</p>' if self.subtitle else ""
        links = "".join(
            f'<a href="#section-{number}">{html.escape(heading)}</a>'
            for number, heading in enumerate(self._headings, start=1)
        )
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{title}</title><style>{_STYLE}</style></head>\n<body><main><header><h1>{title}</h1>{subtitle}"
            f"{f'<nav>{links}</nav>' if len(self._headings) > 1 else ''}</header>\n"
            + "\n".join(self._parts)
            + "\n</main></body></html>\n"
        )

    def write(self, path: str | Path) -> Path:
        """Write the page, making its folder where it is missing; returns the path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.render(), encoding="utf-8")
        return path

    def _add(self, part: str) -> "Report":
        self._parts.append(part)
        return self


def _inline(text: str) -> str:
    """Escaped text in which `code` between backticks is set as code."""
    pieces = html.escape(str(text), quote=False).split("`")
    if len(pieces) % 2 == 0:
        return "`".join(pieces)
    return "".join(f"<code>{piece}</code>" if index % 2 else piece for index, piece in enumerate(pieces))


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
    return _inline(value)


def _gif(clip: np.ndarray, frames_per_second: float, scale: int, name: str) -> str:
    height, width = clip.shape[1:3]
    data = _base64(gif_bytes(clip, frames_per_second=frames_per_second))
    size = f'width="{width * scale}" height="{height * scale}"'
    return f'<img src="data:image/gif;base64,{data}" alt="{html.escape(name, quote=True)}" {size}>'


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
