"""Render a report as HTML and Markdown. Templates print figures by their path in the report only.

``{{ n("rows.0.latency.model.median_ms", ".2f") }}`` prints that figure. In HTML the element also has the path and the
full value as attributes. A missing figure is a dash, with the reason below the table.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from medseg_trt.bench.accuracy_record import SliceImages
from medseg_trt.bench.missing import Missing
from medseg_trt.bench.profile_schema import Profile
from medseg_trt.bench.report.figures import figures, series
from medseg_trt.bench.report.worst_pictures import LOST_AND_FOUND, tiles
from medseg_trt.bench.schema import Report
from medseg_trt.bench.timing_schema import OnGpu, Start
from medseg_trt.errors import require
from medseg_trt.progress import printable
from medseg_trt.spec import to_dict

PAGES = "medseg_trt.bench.report.pages"
TOP_STEPS = 12
ONE_CALLER = "callers cannot share a CUDA graph of PyTorch, which has one input and one output"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
MARKDOWN_SPECIAL = re.compile(r"[\\`\[\]|]")


def html_page(report: Report, worst_slices: Mapping[str, Sequence[SliceImages]], window: tuple[float, float]) -> str:
    """Return the HTML page: one file without external resources, for light, dark and print.

    Raises:
        MissingExtraError: jinja2 or matplotlib is not installed.
    """
    drawn = figures(report)
    worst = [
        (
            row,
            list(
                zip(
                    to_dict(row)["worst"],
                    (tiles(slice_images, report.classes, window) for slice_images in shown),
                    strict=True,
                )
            ),
        )
        for row in report.rows
        if row.role == "variant" and (shown := worst_slices.get(row.name, ()))
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
    """Prints figures of a report by their path, and collects the reasons of missing ones."""

    data: Mapping[str, Any]
    markup: bool
    reasons: list[str] = field(default_factory=list[str])

    def n(self, path: str, spec: str, scale: float | int = 1, unit: str = "") -> str:
        """Return the figure at a path, times ``scale``, formatted with ``spec``, and its unit."""
        value: Any = self.data
        for part in path.split("."):
            if isinstance(value, Mapping) and set(value) == {"reason"}:
                break
            value = value[int(part)] if isinstance(value, Sequence) else value[part]
        if isinstance(value, Mapping):
            return self.dash(value["reason"])
        if value is None:
            return self._written("–")
        text = formatted(value, spec, scale)
        if not self.markup:
            return self._written(text + unit)
        where = f'data-path="{path}" data-spec="{spec}" data-scale="{scale}"'
        return self._written(f'<data value="{value!r}" {where}>{text}</data>{unit}')

    def notes(self) -> str:
        """Return the reasons of the missing figures since the last call."""
        reasons, self.reasons = self.reasons, []
        if not reasons:
            return self._written("")
        if self.markup:
            items = "".join(f"<li>{_escaped(reason)}</li>" for reason in reasons)
            return self._written(f'<ol type="a" class="notes">{items}</ol>')
        lines = (f"({LETTERS[index % 26]}) {markdown_text(reason)}  " for index, reason in enumerate(reasons))
        return self._written("\n" + "\n".join(lines) + "\n")

    def dash(self, reason: str) -> str:
        """Return what stands for a figure that is missing for a reason."""
        if reason not in self.reasons:
            self.reasons.append(reason)
        letter = LETTERS[self.reasons.index(reason) % len(LETTERS)]
        return self._written(f"–<sup>{letter}</sup>" if self.markup else f"– ({letter})")

    def _written(self, text: str) -> str:
        return _safe({"": text})[""]


def formatted(value: float | int, spec: str, scale: float | int) -> str:
    """Return a figure as text with a typographic minus sign, and without a minus before zero."""
    scaled = value * scale if scale != 1 else value
    text = format(scaled, spec)
    if text.startswith("-") and not text.strip("-0."):
        text = text.replace("-", "+" if spec.startswith("+") else "", 1)
    return text if "e" in spec else text.replace("-", "−")


def markdown_text(text: str) -> str:
    """Return text that Markdown shows as it is: one line, without HTML, links, code or a new table cell."""
    shown = printable(text).replace("&", "&amp;").replace("<", "&lt;")
    return MARKDOWN_SPECIAL.sub(r"\\\g<0>", shown)


def _render(template: str, report: Report, **more: Any) -> str:
    jinja2 = require("jinja2", "report")
    markup = template.endswith(".html")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: files(PAGES).joinpath(name).read_text(encoding="utf-8")),
        autoescape=markup,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    if not markup:
        environment.finalize = _markdown_value
    environment.filters["code"] = lambda text: _safe({"": printable(text)})[""]
    data = to_dict(report)
    printer = Figures(data=data, markup=markup)
    context = {
        "report": data,
        "n": printer.n,
        "notes": printer.notes,
        "colors": series(report),
        "places": {row.name: index for index, row in enumerate(report.rows)},
        "warned": warned(report),
        "stages": next((list(row.stages_ms) for row in report.rows if row.stages_ms), []),
        "unit": next((row["accuracy"]["hd95_unit"] for row in data["rows"] if "hd95_unit" in row["accuracy"]), None),
        "scored": [row for row in data["rows"] if "means" in row["accuracy"]],
        "classes": [score["name"] for score in data["rows"][0]["accuracy"].get("means", ())],
        "profiled": [data["rows"][index] for index, row in enumerate(report.rows) if isinstance(row.profile, Profile)],
        "ways": _throughput_columns(report),
        "dash": printer.dash,
        "one_caller": ONE_CALLER,
        "on_gpu": [data["rows"][index] for index, row in enumerate(report.rows) if isinstance(row.on_gpu, OnGpu)],
        "change": _change,
        "cache": next((row.start.file_cache for row in report.rows if isinstance(row.start, Start)), ""),
    }
    return environment.get_template(template).render(**context, **more)


def warned(report: Report) -> list[str]:
    """Return all warnings of a report."""
    return [*report.warnings, *(f"{row.name}: {'; '.join(row.warnings)}" for row in report.rows if row.warnings)]


def _throughput_columns(report: Report) -> list[dict[str, Any]]:
    """Return the columns of the throughput table: those of the first row that has any."""
    for index, row in enumerate(report.rows):
        if not isinstance(row.throughput, Missing):
            return [
                {"path": f"rows.{index}.throughput.{number}", "callers": throughput.streams > 1}
                for number, throughput in enumerate(row.throughput)
            ]
    return []


def _change(row: Mapping[str, Any], metric: str, class_name: str) -> int | None:
    """Return the index of the difference of a metric for a class."""
    for index, difference in enumerate(row["differences"]):
        if (difference["metric"], difference["class_name"]) == (metric, class_name):
            return index
    return None


def _markdown_value(value: object) -> object:
    """Escape what a Markdown template prints, except for figures and code, which are marked as safe."""
    return value if hasattr(value, "__html__") else markdown_text(str(value))


def _safe(texts: Mapping[str, str]) -> dict[str, Any]:
    markupsafe = require("markupsafe", "report")
    return {name: markupsafe.Markup(text) for name, text in texts.items()}


def _escaped(text: str) -> str:
    return str(require("markupsafe", "report").escape(text))
