"""The few SVG elements of the pictures: boxes, text and arrows."""

from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape, quoteattr

FONT = "font-family='Helvetica, Arial, sans-serif'"
LINE_COLOR = "#7b8794"


def text_width(text: str, size: float = 13) -> float:
    """Estimate the width of a text in pixels: 0.6 em for each character of a sans-serif font, bold included."""
    return 0.6 * size * len(text)


class Svg:
    """A picture on white that is written element by element."""

    def __init__(self, *, width: int, height: int, title: str) -> None:
        self._elements = [
            f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height}' "
            f"viewBox='0 0 {width} {height}' role='img'>",
            f"<title>{escape(title)}</title>",
            "<defs><marker id='tip' viewBox='0 0 10 10' refX='9' refY='5' markerWidth='8' markerHeight='8' "
            f"orient='auto'><path d='M0 1 L9 5 L0 9 z' fill='{LINE_COLOR}'/></marker></defs>",
            f"<rect width='{width}' height='{height}' fill='white'/>",
        ]

    def box(
        self, left: float, top: float, width: float, height: float, color: str, data: Mapping[str, str] | None = None
    ) -> None:
        """Draw a rounded box; ``data`` become attributes."""
        self._elements.append(
            f"<rect x='{left:.0f}' y='{top:.0f}' width='{width:.0f}' height='{height:.0f}' rx='6' fill='{color}' "
            f"stroke='#9aa5b1'{_attributes(data)}/>"
        )

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        anchor: str = "middle",
        size: int = 13,
        bold: bool = False,
        color: str = "#1f2933",
    ) -> None:
        """Write one line; ``y`` is its baseline."""
        weight = " font-weight='bold'" if bold else ""
        self._elements.append(
            f"<text x='{x:.0f}' y='{y:.0f}' {FONT} font-size='{size}' text-anchor='{anchor}' "
            f"fill='{color}'{weight}>{escape(text)}</text>"
        )

    def arrow(
        self, points: Sequence[tuple[float, float]], data: Mapping[str, str] | None = None, *, dashed: bool = False
    ) -> None:
        """Draw an arrow through points, with vertical tangents at each of them."""
        (x, y), *rest = points
        path = f"M{x:.0f} {y:.0f}"
        for next_x, next_y in rest:
            middle = (y + next_y) / 2
            path += f" C{x:.0f} {middle:.0f} {next_x:.0f} {middle:.0f} {next_x:.0f} {next_y:.0f}"
            x, y = next_x, next_y
        dashes = " stroke-dasharray='5 4'" if dashed else ""
        self._elements.append(
            f"<path d='{path}' fill='none' stroke='{LINE_COLOR}' stroke-width='1.3' marker-end='url(#tip)'"
            f"{dashes}{_attributes(data)}/>"
        )

    def source(self) -> str:
        """Return the file's content."""
        return "\n".join([*self._elements, "</svg>", ""])


def _attributes(data: Mapping[str, str] | None) -> str:
    return "".join(f" {name}={quoteattr(value)}" for name, value in (data or {}).items())
