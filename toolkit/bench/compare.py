"""Compare two reports of ``bench`` row by row: speed and Dice.

Two reports are not interleaved, so the ratio of their latencies includes drift of the machine. If both contain the same
reference on the same machine, the speeds relative to the reference are compared, which cancels the drift.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from medseg_trt.bench.accuracy_schema import Accuracy
from medseg_trt.bench.limits import Gate, JudgedLimit
from medseg_trt.bench.missing import Missing
from medseg_trt.bench.schema import Report, Row
from medseg_trt.bench.timing_schema import SCOPES, Latency, Scope
from medseg_trt.errors import InputError, UsageError
from medseg_trt.export.gate import compare as compare_counts
from medseg_trt.metrics.intervals import Interval, speed_interval

OTHER_REFERENCES = "the references or the machines are not the same"
REFERENCE_ELSEWHERE = "the reference ran on another device"
HEADER = ("network", "ms", "→ ms", "times as fast", "interval", "Dice", "→ Dice", "change", "interval")


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeedChange:
    """The change of a row's latency in one scope."""

    before_ms: float  # medians
    after_ms: float
    latency: Interval | Missing  # ratio of the latencies; none between two devices
    against_reference: Interval | Missing  # ratio of the speeds relative to the reference
    withheld: str | None = None  # why the text states no factor

    @property
    def judged(self) -> Interval | Missing:
        """The interval that limits are checked against."""
        return self.against_reference if isinstance(self.against_reference, Interval) else self.latency


@dataclass(frozen=True, kw_only=True, slots=True)
class DiceChange:
    """The change of a row's Dice on the images of both reports."""

    before: float  # means as in the gate of ``build``
    after: float
    change: Interval
    unit: str  # that is resampled: cases, or slices if there are too few cases


@dataclass(frozen=True, kw_only=True, slots=True)
class RowChange:
    """One network in both reports."""

    name: str
    role: str  # as in the reports: reference, variant or peer
    speed: Mapping[Scope, SpeedChange | Missing]
    dice: DiceChange | Missing


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """The differences of two reports."""

    rows: tuple[RowChange, ...]
    notes: tuple[str, ...]  # differences of the conditions of the two measurements


def compare_reports(before: Report, after: Report) -> Comparison:
    """Match the rows by role, back-end, precision and arithmetic, and compare them.

    Raises:
        UsageError: the networks have different classes.
        InputError: no row is in both reports.
    """
    if before.classes.names != after.classes.names:
        raise UsageError(
            f"the first report is of a network of the classes {', '.join(before.classes.names)}, the second of "
            f"{', '.join(after.classes.names)}; compare reports of the same classes"
        )
    old, new = (_by_key(report) for report in (before, after))
    old, new = _with_changed_roles(old, new), _with_changed_roles(new, old)
    shared = [key for key in old if key in new]
    if not shared:
        raise InputError(
            f"no network is in both reports: the first has {_names(before)}; the second {_names(after)}. "
            "Measure the same back-ends and precisions: medseg-trt bench --backends …"
        )
    rows = [_change(before, after, old[key], new[key]) for key in shared]
    return Comparison(rows=tuple(rows), notes=tuple(_notes(before, after, old, new)))


def judge(comparison: Comparison, gate: Gate) -> list[JudgedLimit]:
    """Check the limits for every network except the reference, or for the reference if there is no other."""
    judged: list[JudgedLimit] = []
    judged_rows = [row for row in comparison.rows if row.role == "variant"]
    for row in judged_rows or [row for row in comparison.rows if row.role == "reference"]:
        speed = row.speed["model"]
        if gate.dice is not None:
            dice = row.dice if isinstance(row.dice, Missing) else row.dice.change
            judged.append(JudgedLimit(name=row.name, quantity="dice", limit=gate.dice, interval=dice))
        if gate.speed is not None:
            interval = speed if isinstance(speed, Missing) else speed.judged
            judged.append(JudgedLimit(name=row.name, quantity="speed", limit=gate.speed, interval=interval))
    return judged


def cells(comparison: Comparison) -> list[tuple[str, ...]]:
    """Return the terminal's table as text, under ``HEADER``: the network alone."""
    return [(row.name, *_speed_cells(row.speed["model"]), *_dice_cells(row.dice)) for row in comparison.rows]


def withheld_factors(comparison: Comparison) -> list[str]:
    """Say for every network whose factor the table does not state why."""
    changes = [(row.name, row.speed["model"]) for row in comparison.rows]
    return [
        f"{name}: no factor, because {change.withheld}"
        for name, change in changes
        if isinstance(change, SpeedChange) and change.withheld is not None
    ]


def _change(before: Report, after: Report, old: Row, new: Row) -> RowChange:
    name = old.name if old.name == new.name else f"{old.name} → {new.name}"
    speed: dict[Scope, SpeedChange | Missing] = {}
    for scope in SCOPES:
        speed[scope] = _speed(before, after, old, new, scope)
    return RowChange(name=name, role=old.role, speed=speed, dice=_dice(before, after, old, new))


def _speed(before: Report, after: Report, old: Row, new: Row, scope: Scope) -> SpeedChange | Missing:
    first, second = old.latency[scope], new.latency[scope]
    if isinstance(first, Missing):
        return first
    if isinstance(second, Missing):
        return second
    if before.batch != after.batch:
        return Missing(reason=f"the batches are {before.batch} and {after.batch} images; measure with the same --batch")
    devices = [_device(before, old), _device(after, new)]
    if devices[0] != devices[1]:
        refused = Missing(reason=f"it ran on {' and on '.join(devices)}; compare reports of one device")
        return SpeedChange(
            before_ms=first.median_ms,
            after_ms=second.median_ms,
            latency=refused,
            against_reference=refused,
            withheld=refused.reason,
        )
    against_reference = _against_reference(before, after, old, new, scope)
    withheld = None
    if isinstance(against_reference, Missing) and against_reference.reason == OTHER_REFERENCES:
        withheld = OTHER_REFERENCES
    elif not (first.stable and second.stable):
        withheld = "its times are unstable"
    return SpeedChange(
        before_ms=first.median_ms,
        after_ms=second.median_ms,
        latency=speed_interval(first.rounds_ms, second.rounds_ms, interleaved=False),
        against_reference=against_reference,
        withheld=withheld,
    )


def _device(report: Report, row: Row) -> str:
    """Name the device of a row so that another machine's processor is another device."""
    return f"{row.device} {report.machine.processor}" if row.device == "CPU" else row.device


def _against_reference(before: Report, after: Report, old: Row, new: Row, scope: Scope) -> Interval | Missing:
    first, second = before.rows[0], after.rows[0]
    if old is first or new is second:
        return Missing(reason="it is the reference")
    if first.description != second.description or _device(before, first) != _device(after, second):
        return Missing(reason=OTHER_REFERENCES)
    if first.device != old.device:
        return Missing(reason=REFERENCE_ELSEWHERE)
    ratios: list[list[list[float]]] = []
    for reference, row in ((first, old), (second, new)):
        slow, fast = reference.latency[scope], row.latency[scope]
        if not isinstance(slow, Latency) or not isinstance(fast, Latency):
            return Missing(reason="the reference was not timed")
        pairs = zip(slow.rounds_ms, fast.rounds_ms, strict=False)  # a failed network has fewer rounds
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
        return Missing(reason="the masks of the data folder differ in the two reports")
    cases = [case for case, _ in shared]
    gate = compare_counts(pair[0], pair[1], cases, limit=0.0)
    units = len(set(cases)) if gate.unit == "cases" else gate.images
    change = Interval(estimate=0.0 - gate.drop, low=0.0 - gate.high, high=0.0 - gate.low, units=units)  # never -0.0
    return DiceChange(before=gate.reference, after=gate.candidate, change=change, unit=gate.unit)


def _counts(report: Report, accuracy: Accuracy) -> dict[tuple[str, int], tuple[tuple[int, int, int], ...]]:
    """Return the pixel counts by digest of the image and index of the slice."""
    digests = {case.case: case.sha256 for case in report.images.cases}
    return {
        (digests[counted.case], counted.slice): counted.counts for counted in accuracy.slices if counted.case in digests
    }


def _notes(
    before: Report, after: Report, old: Mapping[tuple[str, ...], Row], new: Mapping[tuple[str, ...], Row]
) -> list[str]:
    notes = [f"in the first report alone: {row.name}" for key, row in old.items() if key not in new]
    notes += [f"in the second report alone: {row.name}" for key, row in new.items() if key not in old]
    first, second = ({case.sha256 for case in report.images.cases} for report in (before, after))
    if first != second:
        notes.append(
            f"the images differ: {len(first & second)} of {len(first)} and {len(second)} are in both reports, and Dice "
            "is compared on these"
        )
    if before.machine.processor != after.machine.processor or before.machine.cores != after.machine.cores:
        notes.append(
            f"the machines differ: {before.machine.processor}, {before.machine.cores} cores, and "
            f"{after.machine.processor}, {after.machine.cores} cores"
        )
    changed = [
        f"{name} {before.versions.get(name, 'none')} → {after.versions.get(name, 'none')}"
        for name in dict.fromkeys([*before.versions, *after.versions])
        if before.versions.get(name) != after.versions.get(name)
    ]
    unstable = [
        f"unstable in the {name} report: {row.name}, times vary by {100 * latency.variation:.0f} %"
        for name, report in (("first", before), ("second", after))
        for row in report.rows
        if isinstance(latency := row.latency["model"], Latency) and not latency.stable
    ]
    return notes + unstable + ([f"other versions: {', '.join(changed)}"] if changed else [])


def _by_key(report: Report) -> dict[tuple[str, ...], Row]:
    rows: dict[tuple[str, ...], Row] = {}
    for row in report.rows:
        rows.setdefault(_key(row), row)
    return rows


def _with_changed_roles(
    rows: Mapping[tuple[str, ...], Row], others: Mapping[tuple[str, ...], Row]
) -> dict[tuple[str, ...], Row]:
    """Key a row without its role where the other report has the same network in another role alone."""
    free = {key[1:] for key in others if key not in rows}
    return {(key if key in others or key[1:] not in free else ("", *key[1:])): row for key, row in rows.items()}


def _key(row: Row) -> tuple[str, ...]:
    form = (row.variant, row.device.split()[0]) if row.backend == "pytorch" else ()  # the others' follow from the rest
    return row.role, row.backend, row.precision, row.compute, *form


def _names(report: Report) -> str:
    return ", ".join(row.name for row in report.rows)


def _speed_cells(change: SpeedChange | Missing) -> Sequence[str]:
    if isinstance(change, Missing):
        return "–", "–", "–", "–"
    if change.withheld is not None:
        return f"{change.before_ms:.2f}", f"{change.after_ms:.2f}", "–", "–"
    ratio = change.judged
    assert isinstance(ratio, Interval)  # else it is withheld
    star = "" if ratio is change.latency else " *"
    return (
        f"{change.before_ms:.2f}",
        f"{change.after_ms:.2f}",
        f"{ratio.estimate:.3f}{star}",
        f"{ratio.low:.3f} … {ratio.high:.3f}",
    )


def _dice_cells(dice: DiceChange | Missing) -> Sequence[str]:
    if isinstance(dice, Missing):
        return "–", "–", "–", "–"
    change = dice.change
    return (
        f"{dice.before:.4f}",
        f"{dice.after:.4f}",
        f"{change.estimate:+.4f}",
        f"{change.low:+.4f} … {change.high:+.4f}",
    )
