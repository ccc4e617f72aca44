"""Turn a report into pages. A page can print a figure only by its place in the report, so none can be invented.

``{{ n("rows.0.latency.model.median_ms", ".2f") }}`` in a template prints that figure; in HTML it also carries the place
and the whole value, and where there is no figure, a dash and the reason below the table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from medseg_trt.bench.accuracy import SliceImages
from medseg_trt.bench.missing import Missing
from medseg_trt.bench.profile_schema import Profile
from medseg_trt.bench.report.figures import figures, series
from medseg_trt.bench.report.worst_pictures import LOST_AND_FOUND, tiles
from medseg_trt.bench.schema import Report
from medseg_trt.bench.timing_schema import Start
from medseg_trt.errors import require
from medseg_trt.spec import to_dict

PAGES = "medseg_trt.bench.report.pages"
TOP_STEPS = 12
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def html_page(report: Report, pictures: Mapping[str, Sequence[SliceImages]], window: tuple[float, float]) -> str:
    """Return the page: one file, with everything in it, for light, dark and paper.

    Raises:
        MissingExtraError: jinja2 or matplotlib is not installed.
    """
    drawn = figures(report)
    worst = [
        (row, list(zip(to_dict(row)["worst"], (tiles(each, report.classes, window) for each in shown), strict=True)))
        for row in report.rows
        if row.role == "variant" and (shown := pictures.get(row.name, ()))
    ]
    legend = [*zip(report.classes.names[1:], report.classes.colors[1:], strict=True), *LOST_AND_FOUND]
    css = files(PAGES).joinpath("report.css").read_text(encoding="utf-8")
    return _render(
        "report.html",
        report,
        figures=_safe(drawn),
        css=_safe({"css": css})["css"],
        worst=worst,
        legend=legend,
        top=TOP_STEPS,
    )


def markdown_page(report: Report) -> str:
    """Return the report's main tables in Markdown.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    return _render("report.md", report)


@dataclass(kw_only=True)
class Figures:
    """Prints figures of a report by their place, and remembers why some are missing."""

    data: Mapping[str, Any]
    markup: bool
    reasons: list[str] = field(default_factory=list[str])

    def n(self, path: str, spec: str, scale: float | int = 1, unit: str = "") -> str:
        """Return the figure at a place, times ``scale``, as Python formats it with ``spec``, and its unit."""
        value: Any = self.data
        for part in path.split("."):
            if isinstance(value, Mapping) and set(value) == {"reason"}:
                break
            value = value[int(part)] if isinstance(value, Sequence) else value[part]
        if isinstance(value, Mapping):
            return self._dash(value["reason"])
        if value is None:
            return self._written("–")
        text = formatted(value, spec, scale)
        if not self.markup:
            return text + unit
        where = f'data-path="{path}" data-spec="{spec}" data-scale="{scale}"'
        return self._written(f'<data value="{value!r}" {where}>{text}</data>{unit}')

    def notes(self) -> str:
        """Return why figures are missing since the last time this was asked."""
        reasons, self.reasons = self.reasons, []
        if not reasons:
            return self._written("")
        if self.markup:
            items = "".join(f"<li>{_escaped(reason)}</li>" for reason in reasons)
            return self._written(f'<ol type="a" class="notes">{items}</ol>')
        return "\n" + "\n".join(f"({LETTERS[place % 26]}) {reason}  " for place, reason in enumerate(reasons)) + "\n"

    def _dash(self, reason: str) -> str:
        if reason not in self.reasons:
            self.reasons.append(reason)
        letter = LETTERS[self.reasons.index(reason) % len(LETTERS)]
        return self._written(f"–<sup>{letter}</sup>" if self.markup else f"– ({letter})")

    def _written(self, text: str) -> str:
        return _safe({"": text})[""] if self.markup else text


def formatted(value: float | int, spec: str, scale: float | int) -> str:
    """Return a figure as text; a true minus sign, and no minus before a zero."""
    scaled = value * scale if scale != 1 else value
    text = format(scaled, spec)
    if text.startswith("-") and not text.strip("-0."):
        text = text.replace("-", "+" if spec.startswith("+") else "", 1)
    return text if "e" in spec else text.replace("-", "−")


def _render(template: str, report: Report, **more: Any) -> str:
    jinja2 = require("jinja2", "report")
    markup = template.endswith(".html")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: files(PAGES).joinpath(name).read_text(encoding="utf-8")),
        autoescape=markup,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = lambda text: str(text).replace("|", "\\|")
    data = to_dict(report)
    printer = Figures(data=data, markup=markup)
    context = {
        "report": data,
        "n": printer.n,
        "notes": printer.notes,
        "colors": series(report),
        "places": {row.name: place for place, row in enumerate(report.rows)},
        "warned": warned(report),
        "stages": next((list(row.stages_ms) for row in report.rows if row.stages_ms), []),
        "unit": next((row["accuracy"]["hd95_unit"] for row in data["rows"] if "hd95_unit" in row["accuracy"]), None),
        "scored": [row for row in data["rows"] if "means" in row["accuracy"]],
        "classes": [each["name"] for each in data["rows"][0]["accuracy"].get("means", ())],
        "profiled": [data["rows"][place] for place, row in enumerate(report.rows) if isinstance(row.profile, Profile)],
        "ways": _ways(report),
        "change": _change,
        "cache": next((row.start.file_cache for row in report.rows if isinstance(row.start, Start)), ""),
    }
    return environment.get_template(template).render(**context, **more)


def warned(report: Report) -> list[str]:
    """Return all that a reader should know before he believes the figures."""
    return [*report.warnings, *(f"{row.name}: {'; '.join(row.warnings)}" for row in report.rows if row.warnings)]


def _ways(report: Report) -> list[dict[str, Any]]:
    """Say where the report tells how images were handed over: in the throughputs of any row."""
    for place, row in enumerate(report.rows):
        if not isinstance(row.throughput, Missing):
            return [
                {"path": f"rows.{place}.throughput.{number}", "callers": each.streams > 1}
                for number, each in enumerate(row.throughput)
            ]
    return []


def _change(row: Mapping[str, Any], metric: str, class_name: str) -> int | None:
    """Return the place of a class's difference."""
    for place, each in enumerate(row["differences"]):
        if (each["metric"], each["class_name"]) == (metric, class_name):
            return place
    return None


def _safe(texts: Mapping[str, str]) -> dict[str, Any]:
    markupsafe = require("markupsafe", "report")
    return {name: markupsafe.Markup(text) for name, text in texts.items()}


def _escaped(text: str) -> str:
    return str(require("markupsafe", "report").escape(text))
