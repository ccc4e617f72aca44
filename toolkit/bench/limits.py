"""Check the limits of ``--gate``, such as ``speed=1.2x,dice=-0.005``.

A limit holds if the unfavourable end of the interval holds it. Undecided limits fail, and so do unmeasured quantities.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

from medseg_trt.bench.accuracy_schema import Verdict
from medseg_trt.bench.missing import Missing
from medseg_trt.bench.schema import Report, Row
from medseg_trt.bench.timing_schema import Speedup
from medseg_trt.errors import AccuracyGateError, SpeedGateError, UsageError
from medseg_trt.metrics.intervals import Interval

OUTCOMES = {"holds": "holds", "fails": "does not hold", "undecided": "may not hold"}
EXAMPLE = "write for example speed=1.2x,dice=-0.005: at least 1.2 times as fast, Dice at most 0.005 lower"


@dataclass(frozen=True, kw_only=True, slots=True)
class Gate:
    """Limits; None: no limit."""

    speed: float | None = None  # at least so many times as fast
    dice: float | None = None  # least change of the mean; negative: largest loss


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgedLimit:
    """A limit, checked for one network."""

    name: str
    quantity: str  # "speed" or "dice"
    limit: float
    interval: Interval | Missing

    @property
    def holds(self) -> bool:
        """Whether the whole interval holds the limit."""
        return isinstance(self.interval, Interval) and self.interval.at_least(self.limit) == "holds"

    def __str__(self) -> str:
        limit = f"{self.limit:g}x" if self.quantity == "speed" else f"{self.limit:+g}"
        if isinstance(self.interval, Missing):
            return f"{self.name}: {self.quantity} cannot be judged against {limit}: {self.interval.reason}"
        form: Callable[[float], str] = "{:.3f}x".format if self.quantity == "speed" else "{:+.4f}".format
        estimate, low, high = map(form, (self.interval.estimate, self.interval.low, self.interval.high))
        outcome = OUTCOMES[self.interval.at_least(self.limit)]
        return f"{self.name}: {self.quantity} {estimate} ({low} … {high}), {limit} {outcome}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that JSON can hold."""
        return {
            "name": self.name,
            "what": self.quantity,
            "limit": self.limit,
            "found": asdict(self.interval),
            "holds": self.holds,
        }


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


def judge_report(report: Report, gate: Gate) -> list[JudgedLimit]:
    """Check the Dice of all variants, and the speed of the fastest one, or of the first if the report names none."""
    executed = [row for row in report.rows[1:] if row.executed and row.role != "peer"]
    judged = [
        JudgedLimit(name=row.name, quantity="dice", limit=gate.dice, interval=_dice(row))
        for row in executed
        if gate.dice is not None
    ]
    if gate.speed is not None:
        fastest = [row for row in executed if row.name == report.summary.fastest] or executed
        name = fastest[0].name if fastest else "bench"
        speed = _speed(fastest[0]) if fastest else Missing(reason="only the reference ran here")
        judged.append(JudgedLimit(name=name, quantity="speed", limit=gate.speed, interval=speed))
    return judged


def require(judged: Sequence[JudgedLimit]) -> None:
    """Raise an error unless every limit holds.

    Raises:
        AccuracyGateError: a limit of Dice does not hold, or may not.
        SpeedGateError: all limits of Dice hold, but not those of speed.
    """
    failed = [limit for limit in judged if not limit.holds]
    lost = [limit for limit in failed if limit.quantity == "dice"]
    if lost:
        raise AccuracyGateError("; ".join(map(str, lost)))
    if failed:
        raise SpeedGateError("; ".join(map(str, failed)))


def _speed(row: Row) -> Interval | Missing:
    speedup = row.speedup["model"]
    if not isinstance(speedup, Speedup):
        return speedup
    return Interval(
        estimate=speedup.ratio, low=speedup.low, high=speedup.high, units=speedup.rounds, confidence=speedup.confidence
    )


def _dice(row: Row) -> Interval | Missing:
    verdict = row.verdict
    if not isinstance(verdict, Verdict):
        return verdict
    return Interval(
        estimate=0.0 - verdict.drop, low=0.0 - verdict.drop_high, high=0.0 - verdict.drop_low, units=verdict.pairs
    )
