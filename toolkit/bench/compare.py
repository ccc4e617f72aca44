"""Compare two reports of ``bench``, row by row: what became faster or slower, and whether the masks stayed as good.

Two reports were not measured in turn, so what the machine did between them is in the ratio of their latencies. Where
both hold the same reference on the same machine, the rows' speeds against it are compared: a slow hour slows both.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from medseg_trt.bench.accuracy_schema import Accuracy
from medseg_trt.bench.limits import Gate, Judged
from medseg_trt.bench.missing import Missing
from medseg_trt.bench.schema import Report, Row
from medseg_trt.bench.timing_schema import SCOPES, Latency, Scope
from medseg_trt.errors import InputError, UsageError
from medseg_trt.export.gate import compare as compare_counts
from medseg_trt.metrics.intervals import Interval, speed_interval

HEADER = ("network", "ms", "→ ms", "times as fast", "interval", "Dice", "→ Dice", "change", "interval")


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeedChange:
    """How a row's latency changed in one scope."""

    before_ms: float  # medians
    after_ms: float
    latency: Interval  # how many times as fast, by the latencies alone
    against_reference: Interval | Missing  # the same by the speeds against the reference

    @property
    def judged(self) -> Interval:
        """What a limit is put to."""
        return self.against_reference if isinstance(self.against_reference, Interval) else self.latency


@dataclass(frozen=True, kw_only=True, slots=True)
class DiceChange:
    """How a row's masks changed, on the images that both reports have."""

    before: float  # means, as the gate of ``build`` counts them
    after: float
    change: Interval
    unit: str  # what was paired and resampled: cases, or slices where there are too few


@dataclass(frozen=True, kw_only=True, slots=True)
class RowChange:
    """One network in both reports."""

    name: str
    is_reference: bool
    speed: Mapping[Scope, SpeedChange | Missing]
    dice: DiceChange | Missing


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What changed from one report to another."""

    rows: tuple[RowChange, ...]
    notes: tuple[str, ...]  # what a reader has to know before he believes it


def compare_reports(before: Report, after: Report) -> Comparison:
    """Match the rows by role, back-end, precision and arithmetic, and compare them.

    Raises:
        UsageError: the networks know other classes.
        InputError: no row is in both.
    """
    if before.classes.names != after.classes.names:
        raise UsageError(
            f"the first report is of a network of the classes {', '.join(before.classes.names)}, the second of "
            f"{', '.join(after.classes.names)}; compare reports of the same classes"
        )
    old, new = ({_key(row): row for row in reversed(report.rows)} for report in (before, after))
    shared = [_key(row) for row in before.rows if _key(row) in new]
    if not shared:
        raise InputError(
            f"no network is in both reports: the first has {_names(before)}; the second {_names(after)}. "
            "Measure the same back-ends and precisions: medseg-trt bench --backends …"
        )
    rows = [_change(before, after, old[key], new[key]) for key in dict.fromkeys(shared)]
    return Comparison(rows=tuple(rows), notes=tuple(_notes(before, after, old, new)))


def judge(comparison: Comparison, gate: Gate) -> list[Judged]:
    """Put the limits to every network but the reference, and to that one where nothing else is in both reports."""
    judged: list[Judged] = []
    for row in [row for row in comparison.rows if not row.is_reference] or comparison.rows:
        speed = row.speed["model"]
        if gate.dice is not None:
            dice = row.dice if isinstance(row.dice, Missing) else row.dice.change
            judged.append(Judged(name=row.name, what="dice", limit=gate.dice, found=dice))
        if gate.speed is not None:
            found = speed if isinstance(speed, Missing) else speed.judged
            judged.append(Judged(name=row.name, what="speed", limit=gate.speed, found=found))
    return judged


def cells(comparison: Comparison) -> list[tuple[str, ...]]:
    """Return the terminal's table as text, under ``HEADER``: the network alone."""
    return [(row.name, *_speed_cells(row.speed["model"]), *_dice_cells(row.dice)) for row in comparison.rows]


def _change(before: Report, after: Report, old: Row, new: Row) -> RowChange:
    name = old.name if old.name == new.name else f"{old.name} → {new.name}"
    speed: dict[Scope, SpeedChange | Missing] = {}
    for scope in SCOPES:
        speed[scope] = _speed(before, after, old, new, scope)
    return RowChange(name=name, is_reference=old.role == "reference", speed=speed, dice=_dice(before, after, old, new))


def _speed(before: Report, after: Report, old: Row, new: Row, scope: Scope) -> SpeedChange | Missing:
    first, second = old.latency[scope], new.latency[scope]
    if isinstance(first, Missing):
        return first
    if isinstance(second, Missing):
        return second
    if before.batch != after.batch:
        return Missing(reason=f"the batches are {before.batch} and {after.batch} images; measure with the same --batch")
    return SpeedChange(
        before_ms=first.median_ms,
        after_ms=second.median_ms,
        latency=speed_interval(first.rounds_ms, second.rounds_ms, interleaved=False),
        against_reference=_against_reference(before, after, old, new, scope),
    )


def _against_reference(before: Report, after: Report, old: Row, new: Row, scope: Scope) -> Interval | Missing:
    first, second = before.rows[0], after.rows[0]
    if old is first or new is second:
        return Missing(reason="it is the reference")
    if first.description != second.description or before.machine.processor != after.machine.processor:
        return Missing(reason="the references or the machines are not the same")
    ratios: list[list[list[float]]] = []
    for reference, row in ((first, old), (second, new)):
        slow, fast = reference.latency[scope], row.latency[scope]
        if not isinstance(slow, Latency) or not isinstance(fast, Latency):
            return Missing(reason="the reference was not timed")
        pairs = zip(slow.rounds_ms, fast.rounds_ms, strict=False)  # a network that failed has fewer rounds
        ratios.append([[float(np.median(above) / np.median(below))] for above, below in pairs])
    return speed_interval(ratios[1], ratios[0], interleaved=False)


def _dice(before: Report, after: Report, old: Row, new: Row) -> DiceChange | Missing:
    if not before.images.labelled or not after.images.labelled:
        return Missing(reason="the images of a report have no masks; measure with --data of a folder with masks")
    if isinstance(old.accuracy, Missing):
        return old.accuracy
    if isinstance(new.accuracy, Missing):
        return new.accuracy
    first, second = _counts(before, old.accuracy), _counts(after, new.accuracy)
    shared = [key for key in first if key in second]
    if not shared:
        return Missing(reason="no image is in both reports; measure on the same --data and --split")
    pair = [np.array([counts[key] for key in shared], np.int64) for counts in (first, second)]
    if (pair[0][..., 2] != pair[1][..., 2]).any():
        return Missing(reason="the masks of the data folder are not the same in both reports")
    cases = [case for case, _ in shared]
    found = compare_counts(pair[0], pair[1], cases, limit=0.0)
    units = len(set(cases)) if found.unit == "cases" else found.images
    change = Interval(estimate=0.0 - found.drop, low=0.0 - found.high, high=0.0 - found.low, units=units)  # never -0.0
    return DiceChange(before=found.reference, after=found.candidate, change=change, unit=found.unit)


def _counts(report: Report, accuracy: Accuracy) -> dict[tuple[str, int], tuple[tuple[int, int, int], ...]]:
    """Return the pixel counts by the image's digest and the slice's number."""
    digests = {case.case: case.sha256 for case in report.images.cases}
    return {(digests[each.case], each.slice): each.counts for each in accuracy.slices if each.case in digests}


def _notes(
    before: Report, after: Report, old: Mapping[tuple[str, ...], Row], new: Mapping[tuple[str, ...], Row]
) -> list[str]:
    notes = [f"in the first report alone: {row.name}" for key, row in old.items() if key not in new]
    notes += [f"in the second report alone: {row.name}" for key, row in new.items() if key not in old]
    first, second = ({case.sha256 for case in report.images.cases} for report in (before, after))
    if first != second:
        notes.append(
            f"the images are not the same: {len(first & second)} of {len(first)} and {len(second)} are in both, "
            "and Dice is compared on these alone"
        )
    if before.machine.processor != after.machine.processor or before.machine.cores != after.machine.cores:
        notes.append(
            f"the machines are not the same: {before.machine.processor}, {before.machine.cores} cores, and "
            f"{after.machine.processor}, {after.machine.cores} cores"
        )
    changed = [
        f"{name} {before.versions.get(name, 'none')} → {after.versions.get(name, 'none')}"
        for name in dict.fromkeys([*before.versions, *after.versions])
        if before.versions.get(name) != after.versions.get(name)
    ]
    unstable = [
        f"unstable in the {name} report: {row.name}, times vary by {100 * found.variation:.0f} %"
        for name, report in (("first", before), ("second", after))
        for row in report.rows
        if isinstance(found := row.latency["model"], Latency) and not found.stable
    ]
    return notes + unstable + ([f"other versions: {', '.join(changed)}"] if changed else [])


def _key(row: Row) -> tuple[str, ...]:
    return row.role, row.backend, row.precision, row.compute


def _names(report: Report) -> str:
    return ", ".join(row.name for row in report.rows)


def _speed_cells(found: SpeedChange | Missing) -> Sequence[str]:
    if isinstance(found, Missing):
        return "–", "–", "–", "–"
    speed = found.judged
    star = "" if speed is found.latency else " *"
    return (
        f"{found.before_ms:.2f}",
        f"{found.after_ms:.2f}",
        f"{speed.estimate:.3f}{star}",
        f"{speed.low:.3f} … {speed.high:.3f}",
    )


def _dice_cells(found: DiceChange | Missing) -> Sequence[str]:
    if isinstance(found, Missing):
        return "–", "–", "–", "–"
    change = found.change
    return (
        f"{found.before:.4f}",
        f"{found.after:.4f}",
        f"{change.estimate:+.4f}",
        f"{change.low:+.4f} … {change.high:+.4f}",
    )
