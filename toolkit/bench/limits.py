"""Limits that a measurement must keep, from the command line: ``speed=1.2x,dice=-0.005``.

A limit holds where the unfavourable end of the interval keeps it. What is not sure does not pass, and neither does what
was not measured.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite

from medseg_trt.bench.accuracy_schema import Verdict
from medseg_trt.bench.missing import Missing
from medseg_trt.bench.schema import Report, Row
from medseg_trt.bench.timing_schema import Speedup
from medseg_trt.errors import AccuracyGateError, SpeedGateError, UsageError
from medseg_trt.metrics.intervals import Interval

EXAMPLE = "write for example speed=1.2x,dice=-0.005: at least 1.2 times as fast, Dice at most 0.005 lower"


@dataclass(frozen=True, kw_only=True, slots=True)
class Gate:
    """What is asked for; None: nothing."""

    speed: float | None = None  # times as fast, at least
    dice: float | None = None  # change of the mean, at least; negative: so much may be lost


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """One limit, put to one network."""

    name: str
    what: str  # "speed" or "dice"
    limit: float
    found: Interval | Missing

    @property
    def holds(self) -> bool:
        """Whether the limit surely holds."""
        return isinstance(self.found, Interval) and self.found.at_least(self.limit) == "holds"

    def __str__(self) -> str:
        limit = f"{self.limit:g}x" if self.what == "speed" else f"{self.limit:+g}"
        if isinstance(self.found, Missing):
            return f"{self.name}: {self.what} cannot be judged against {limit}: {self.found.reason}"
        form: Callable[[float], str] = "{:.3f}x".format if self.what == "speed" else "{:+.4f}".format
        found, answer = self.found, self.found.at_least(self.limit)
        words = {"holds": "holds", "fails": "does not hold", "undecided": "is not sure to hold"}[answer]
        return (
            f"{self.name}: {self.what} {form(found.estimate)} ({form(found.low)} … {form(found.high)}), {limit} {words}"
        )


def parse_gate(text: str) -> Gate:
    """Read the limits.

    Raises:
        UsageError: it is not ``speed=…``, ``dice=…`` or both with a comma; the message has an example.
    """
    limits: dict[str, float] = {}
    for part in text.replace(" ", "").lower().split(","):
        name, _, number = part.partition("=")
        try:
            value = float(number.removesuffix("x") if name == "speed" else number)
        except ValueError:
            value = float("nan")
        known = {"speed": isfinite(value) and value > 0, "dice": -1 <= value <= 1}
        if name in limits or not known.get(name):
            raise UsageError(f"--gate {text!r}: {part!r} cannot be read; {EXAMPLE}")
        limits[name] = value
    return Gate(**limits)


def judge_report(report: Report, gate: Gate) -> list[Judged]:
    """Put the limits to the variants of one report, against its reference: Dice to all, speed to the fastest.

    The fastest is the one that the report names, or, where it names none, the first that ran.
    """
    ran = [row for row in report.rows[1:] if row.executed]
    judged = [
        Judged(name=row.name, what="dice", limit=gate.dice, found=_dice(row)) for row in ran if gate.dice is not None
    ]
    if gate.speed is not None:
        fastest = [row for row in ran if row.name == report.summary.fastest] or ran
        name = fastest[0].name if fastest else "bench"
        speed = _speed(fastest[0]) if fastest else Missing(reason="nothing but the reference ran here")
        judged.append(Judged(name=name, what="speed", limit=gate.speed, found=speed))
    return judged


def require(judged: Sequence[Judged]) -> None:
    """Raise where a limit does not surely hold.

    Raises:
        AccuracyGateError: Dice fell, or may have.
        SpeedGateError: the masks hold, but not the speed.
    """
    failed = [each for each in judged if not each.holds]
    lost = [each for each in failed if each.what == "dice"]
    if lost:
        raise AccuracyGateError("; ".join(map(str, lost)))
    if failed:
        raise SpeedGateError("; ".join(map(str, failed)))


def _speed(row: Row) -> Interval | Missing:
    found = row.speedup["model"]
    if not isinstance(found, Speedup):
        return found
    return Interval(
        estimate=found.ratio, low=found.low, high=found.high, units=found.rounds, confidence=found.confidence
    )


def _dice(row: Row) -> Interval | Missing:
    found = row.verdict
    if not isinstance(found, Verdict):
        return found
    return Interval(estimate=0.0 - found.drop, low=0.0 - found.drop_high, high=0.0 - found.drop_low, units=found.pairs)
