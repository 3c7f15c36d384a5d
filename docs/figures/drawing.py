"""A small writer of SVG: boxes, text and arrows in a few named colors, the same drawing for light and dark pages.

Drawings are 480 units wide, so that text of 13 units and more can be read on a phone.
"""

import dataclasses
from xml.sax.saxutils import escape

WIDTH = 480
# Name -> color on light pages, on dark pages.
COLORS = {
    "ink": ("#1f2328", "#e6e6e6"),
    "faint": ("#5d6670", "#9aa4af"),
    "line": ("#8c959f", "#768390"),
    "paper": ("#ffffff", "#1c2026"),
    "blue": ("#cfe3fa", "#17406b"),
    "green": ("#cdeed3", "#1c4f2b"),
    "orange": ("#fbdfc3", "#6b3f14"),
    "purple": ("#e3d7fb", "#43307a"),
    "gray": ("#e6e9ed", "#343b44"),
    "strong": ("#0b6bcb", "#6cb6ff"),
    "warm": ("#bc4c00", "#f0883e"),
}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"


@dataclasses.dataclass
class Drawing:
    """Shapes of one figure, in units from the upper left corner.

    Attributes:
      height: of the drawing.
      alt: what it shows, for readers who do not see it.
      dark: whether it is for dark pages.
    """

    height: int
    alt: str
    dark: bool = False

    def __post_init__(self) -> None:
        self._shapes: list[str] = []

    def color(self, name: str) -> str:
        """The color with a name, on the pages that this drawing is for."""
        return COLORS[name][self.dark] if name in COLORS else name

    def box(
        self, x: float, y: float, width: float, height: float, text: str = "", fill: str = "gray", **options
    ) -> None:
        """A box with lines of text in its middle; the first is strong if there are several.

        Args:
          x, y, width, height: of the box.
          text: lines, separated by line breaks.
          fill: name of its color; "none" for an outline.
          options: `size` of the text, `line` for the color of the outline, `dash` for a dashed one, `radius`.
        """
        size, line = options.get("size", 14), self.color(options.get("line", "line"))
        dash = ' stroke-dasharray="4 3"' if options.get("dash") else ""
        self._shapes.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{options.get("radius", 4):g}" '
            f'fill="{self.color(fill)}" stroke="{line}"{dash}/>'
        )
        lines = text.split("\n") if text else []
        top = y + height / 2 - (len(lines) - 1) * size * 0.65 + size * 0.35
        for number, words in enumerate(lines):
            first = number == 0
            self.text(
                x + width / 2, top + number * size * 1.3, words, size=size if first else size - 1, anchor="middle",
                strong=first and len(lines) > 1, color="ink" if first else "faint",
            )  # fmt: skip

    def text(self, x: float, y: float, words: str, **options) -> None:
        """A line of text; `options`: size, anchor (start, middle, end), color, strong."""
        weight = ' font-weight="600"' if options.get("strong") else ""
        self._shapes.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{options.get("size", 14):g}" '
            f'text-anchor="{options.get("anchor", "start")}" fill="{self.color(options.get("color", "ink"))}"{weight}>'
            f"{escape(words)}</text>"
        )

    def arrow(self, *points: tuple[float, float], color: str = "line", dash: bool = False, head: bool = True) -> None:
        """A line through points, with a head at the last one."""
        path = " L".join(f"{x:g} {y:g}" for x, y in points)
        dashed = ' stroke-dasharray="4 3"' if dash else ""
        end = f' marker-end="url(#{color})"' if head else ""
        self._shapes.append(
            f'<path d="M{path}" fill="none" stroke="{self.color(color)}" stroke-width="1.6"{dashed}{end}/>'
        )

    def circle(self, x: float, y: float, radius: float, fill: str, text: str = "") -> None:
        """A circle with a line of text in it."""
        self._shapes.append(
            f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" fill="{self.color(fill)}" stroke="{self.color("line")}"/>'
        )
        if text:
            self.text(x, y + 5, text, anchor="middle", size=13)

    def svg(self) -> str:
        """The file."""
        heads = "".join(
            f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            f'<path d="M0 0 L8 4 L0 8 z" fill="{self.color(name)}"/></marker>'
            for name in ("line", "strong", "warm")
        )
        shapes = "\n".join(self._shapes)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" role="img" '
            f'font-family="{FONT}">\n<title>{escape(self.alt)}</title>\n<defs>{heads}</defs>\n{shapes}\n</svg>\n'
        )
