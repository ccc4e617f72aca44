"""Draw the plots of a report as SVG with the page's CSS variables as colours, for light, dark and print.

Matplotlib draws in placeholder colours, which are then replaced by the variables; text is kept as text.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from itertools import cycle
from math import fsum
from typing import Any

import numpy as np
from numpy import ndarray

from medseg_trt.bench.accuracy_schema import Accuracy, Verdict
from medseg_trt.bench.profile_schema import Profile, Roofline
from medseg_trt.bench.schema import Report, Row
from medseg_trt.bench.timing_schema import Latency
from medseg_trt.errors import require

INK, MUTED, GRID = "#010101", "#020202", "#030303"
SERIES = [f"#0404{index:02x}" for index in range(8)]  # of the rows; the reference is the first
PIECES = [f"#0505{index:02x}" for index in range(6)]  # of stacked bars
VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    **{color: f"var(--series-{index})" for index, color in enumerate(SERIES)},
    **{color: f"var(--piece-{index})" for index, color in enumerate(PIECES)},
}
WIDTH_INCHES = 8.0
MARKERS = "osD^vP*X"
CURVE_POINTS = 160
LETTER_POINTS, LINE_POINTS = 6.0, 12.0  # of a label
SETTINGS: Mapping[str, Any] = {
    "text.parse_math": False,  # a dollar sign in a name is text
    "svg.fonttype": "none",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.titlesize": 11,
    "legend.frameon": False,
}


def figures(report: Report) -> dict[str, str]:
    """Return the plots whose figures the report has, as SVG elements by name."""
    drawers: Mapping[str, tuple[Callable[[Report, Any], bool], Callable[[Report], float]]] = {
        "latency": (_latency, lambda report: 0.9 + 0.62 * len(report.rows)),
        "accuracy-latency": (_accuracy_latency, lambda _: 3.9),
        "roofline": (_roofline, lambda _: 3.9),
        "parts": (_parts, lambda report: 1.0 + 0.42 * len(report.rows)),
        "stages": (_stages, lambda report: 1.0 + 0.42 * len(report.rows)),
    }
    matplotlib = require("matplotlib", "report")
    from matplotlib.figure import Figure

    plots: dict[str, str] = {}
    for name, (draw, height) in drawers.items():
        with matplotlib.rc_context({**SETTINGS, "svg.hashsalt": name}):
            figure = Figure(figsize=(WIDTH_INCHES, height(report)), layout="constrained")
            if draw(report, figure.add_subplot()):
                plots[name] = _svg(figure, name)
    return plots


def series(report: Report) -> dict[str, int]:
    """Return the index of every row's colour; the reference has the first."""
    return {row.name: index % len(SERIES) for index, row in enumerate(report.rows)}


def _svg(figure: Any, name: str) -> str:
    text = StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    drawn = text.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(
        r"<style.*?</style>|<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL
    )  # the page has its own style
    drawn = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px var(--font)", drawn)
    for color, variable in VARIABLES.items():
        drawn = drawn.replace(color, variable)
    drawn = re.sub(r'\bid="', f'id="{name}-', drawn)
    drawn = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", drawn)
    return re.sub(r"<svg [^>]*?viewBox", '<svg aria-hidden="true" focusable="false" viewBox', drawn, count=1)


def _latency(report: Report, axes: Any) -> bool:
    """Draw the distribution of the times of the network alone, with percentiles."""
    rows = [(row, latency) for row in report.rows if isinstance(latency := row.latency["model"], Latency)]
    for level, (row, latency) in enumerate(reversed(rows)):
        color = SERIES[series(report)[row.name]]
        positions, heights = _hill(np.log10(latency.samples_ms))
        axes.fill_between(10**positions, level, level + 0.72 * heights, color=color, alpha=0.35, linewidth=0)
        axes.plot(10**positions, level + 0.72 * heights, color=color, linewidth=1.2)
        axes.plot([latency.median_ms] * 2, [level, level + 0.72], color=color, linewidth=2)
        for at, height in ((latency.p90_ms, 0.34), (latency.p99_ms, 0.22)):
            axes.plot([at] * 2, [level, level + height], color=color, linewidth=1.6)
    axes.set_yticks(range(len(rows)), [row.name for row, _ in reversed(rows)])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    _milliseconds(axes, "x")
    axes.set_xlabel("milliseconds per batch, logarithmic; tall line: median, short lines: p90 and p99")
    axes.grid(axis="x", linewidth=0.6)
    axes.set_ylim(-0.12, len(rows) - 0.1)
    return bool(rows)


def _hill(values: ndarray) -> tuple[ndarray, ndarray]:
    """Return a smooth density of values, 1 at its top, over the middle 99 % of them (Silverman's bandwidth)."""
    low, high = np.quantile(values, [0.005, 0.995])
    spread = min(values.std(), float(np.subtract(*np.quantile(values, [0.75, 0.25]))) / 1.34 or values.std())
    width = max(0.9 * spread * len(values) ** -0.2, 1e-3)
    positions = np.linspace(low - 2 * width, high + 2 * width, CURVE_POINTS)
    kept = values if len(values) <= 4000 else np.sort(values)[:: len(values) // 4000]
    heights = np.exp(-0.5 * ((positions[:, None] - kept) / width) ** 2).sum(axis=1)
    return positions, heights / heights.max()


def _accuracy_latency(report: Report, axes: Any) -> bool:
    """Draw Dice against time."""
    drawn: list[tuple[float, float, Row]] = []
    for row in report.rows:
        latency, accuracy = row.latency["model"], row.accuracy
        if not isinstance(latency, Latency) or not isinstance(accuracy, Accuracy) or accuracy.mean_dice is None:
            continue
        color = SERIES[series(report)[row.name]]
        level = accuracy.mean_dice
        if isinstance(row.verdict, Verdict):
            level = row.verdict.candidate
            ends = (row.verdict.reference - row.verdict.drop_high, row.verdict.reference - row.verdict.drop_low)
            axes.plot([latency.median_ms] * 2, ends, color=color, linewidth=1.6)
        axes.plot([latency.median_ms, latency.p90_ms], [level] * 2, color=color, linewidth=1.6)
        axes.plot(latency.median_ms, level, MARKERS[series(report)[row.name]], color=color, markersize=8)
        drawn.append((latency.median_ms, level, row))
    verdicts = [row.verdict for row in report.rows if isinstance(row.verdict, Verdict)]
    if not drawn or not verdicts:
        return False
    floor = verdicts[0].reference - verdicts[0].limit
    axes.axhline(floor, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    _milliseconds(axes, "x")
    axes.margins(x=0.22, y=0.18)
    axes.annotate(
        "lowest allowed Dice",
        (1, floor),
        (-2, 3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        va="bottom",
        color=MUTED,
        fontsize=9,
    )
    _label(axes, drawn)
    axes.set_xlabel("milliseconds per batch, the network alone; line to p90")
    axes.set_ylabel("mean Dice; line: interval")
    axes.grid(linewidth=0.6)
    return True


def _label(axes: Any, drawn: Sequence[tuple[float, float, Row]]) -> None:
    """Write the rows' names to the right of their points, or lower if they would overlap."""
    axes.figure.draw_without_rendering()  # fixes the positions of the points
    occupied: list[tuple[float, float, float]] = []
    for x, y, row in sorted(drawn, key=lambda point: -point[1]):
        left, at = axes.transData.transform((x, y)) * 72 / axes.figure.dpi
        width, bottom = LETTER_POINTS * len(row.name), float(at)
        while any(
            left < end and begin < left + width and abs(bottom - other) < LINE_POINTS for begin, end, other in occupied
        ):
            bottom -= 1
        occupied.append((left, left + width, bottom))
        axes.annotate(row.name, (x, y), (5, bottom - at + 6), textcoords="offset points", va="bottom", fontsize=9.5)


def _roofline(report: Report, axes: Any) -> bool:
    """Draw the rows below the machine's roofline."""
    points = [(row, row.roofline) for row in report.rows if isinstance(row.roofline, Roofline)]
    if not points or not isinstance(report.peaks, tuple):
        return False
    lowest = min(roofline.intensity for _, roofline in points) / 4
    ridges = [peak.gmacs_per_s / peak.gbytes_per_s for peak in report.peaks]
    highest = 4 * max(*ridges, *(roofline.intensity for _, roofline in points))
    intensities = np.geomspace(lowest, highest, 100)
    for style, peak in zip(cycle(("-", (0, (5, 2)), (0, (1, 1.5)), "-.")), report.peaks, strict=False):
        axes.plot(
            intensities,
            np.minimum(peak.gmacs_per_s, intensities * peak.gbytes_per_s),
            color=INK,
            linewidth=1.3,
            linestyle=style,
        )
        axes.annotate(
            f"{peak.arithmetic} roof" + ("" if peak.device == "CPU" else f", {peak.device}"),
            (highest, peak.gmacs_per_s),
            (0, 3),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize=9,
        )
    for row, roofline in points:
        axes.plot(
            roofline.intensity,
            roofline.reached_gmacs_per_s,
            MARKERS[series(report)[row.name]],
            color=SERIES[series(report)[row.name]],
            markersize=8,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(_plain)
        axis.set_minor_formatter("")
    _label(axes, [(roofline.intensity, roofline.reached_gmacs_per_s, row) for row, roofline in points])
    axes.set_xlabel("multiply-accumulates per byte moved, logarithmic")
    axes.set_ylabel("billion multiply-accumulates per second")
    axes.grid(linewidth=0.6)
    return True


def _parts(report: Report, axes: Any) -> bool:
    """Draw the share of the time of every part of the network."""
    rows = [(row, row.profile) for row in report.rows if isinstance(row.profile, Profile)]
    names = ["resnet", "vit", "block", "decoder", "other"]
    shares = {
        row.name: [fsum(part.share for part in profile.parts if part.part == name) for name in names]
        for row, profile in rows
    }
    return _stacked(axes, shares, names, "share of the time of all steps")


def _stages(report: Report, axes: Any) -> bool:
    """Draw the stages from image file to mask file."""
    rows = {row.name: list(row.stages_ms.values()) for row in report.rows if row.stages_ms}
    names = next((list(row.stages_ms) for row in report.rows if row.stages_ms), [])
    return _stacked(axes, rows, names, "milliseconds from the image file to the mask file, medians")


def _stacked(axes: Any, rows: Mapping[str, Sequence[float]], names: Sequence[str], label: str) -> bool:
    for position, values in enumerate(reversed(list(rows.values()))):
        left = 0.0
        for index, value in enumerate(values):
            axes.barh(position, value, left=left, height=0.62, color=PIECES[index], linewidth=0)
            left += value
    axes.set_yticks(range(len(rows)), list(reversed(list(rows))))
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    for index, name in enumerate(names):
        axes.barh(0, 0, color=PIECES[index], label=name)
    if rows:
        axes.legend(
            ncols=len(names),
            loc="lower left",
            bbox_to_anchor=(0, 1),
            borderaxespad=0,
            handlelength=1,
            handleheight=1,
            columnspacing=1.4,
        )
    axes.set_xlabel(label)
    axes.grid(axis="x", linewidth=0.6)
    axes.set_axisbelow(True)
    return bool(rows)


def _milliseconds(axes: Any, which: str) -> None:
    """Make an axis logarithmic, with ticks at 1, 2 and 5 if they fit."""
    from matplotlib.ticker import LogLocator

    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    axis.set_major_formatter(_plain)
    axis.set_minor_formatter("")


def _plain(value: float, _position: int) -> str:
    return f"{value:g}"
