"""Say in a few lines what a report shows: whether the masks hold, and how much faster they come."""

from collections.abc import Sequence

from medseg_trt.bench.accuracy_schema import Verdict
from medseg_trt.bench.missing import Missing
from medseg_trt.bench.schema import Row, Summary
from medseg_trt.bench.timing_schema import Latency, Speedup, Tier
from medseg_trt.metrics.intervals import CONFIDENCE

SHOWN = 0.00005  # what four decimals can show


def summary(rows: Sequence[Row], tier: Tier, labelled: bool) -> Summary:
    """Return the verdict on all rows, the reference first among them."""
    reference, *variants = rows
    ran = [row for row in variants if row.executed]
    good = [row for row in ran if _holds(row) and row.failure is None]
    holds = bool(ran) and len(good) == len(ran)
    timed = [(row.latency["model"], row) for row in good]
    fastest = min(
        ((found.median_ms, row) for found, row in timed if isinstance(found, Latency)),
        key=lambda pair: pair[0],
        default=None,
    )
    lines = [_line(row, reference) for row in variants]
    if not labelled:
        lines.append("The images have no masks: the figures say how far the networks agree, not how good they are.")
    if tier.name != "certify":
        lines.append(_tier_words(tier))
    return Summary(
        holds=holds,
        headline=_headline(fastest[1] if fastest else None, reference, ran, good),
        lines=tuple(lines),
        fastest=fastest[1].name if fastest else None,
    )


def _headline(fastest: Row | None, reference: Row, ran: Sequence[Row], good: Sequence[Row]) -> str:
    if not ran:
        return "Nothing but the reference could be run here."
    failed = [row.name for row in ran if row not in good]
    bad = f" {', '.join(failed)}: not to be used." if failed else ""
    if fastest is None and good:
        return f"Masks hold, but nothing was timed: {', '.join(row.name for row in good)}.{bad}"
    if fastest is None:
        return f"No network draws the reference's masks.{bad}"
    speed = fastest.speedup["model"]
    unstable = _unstable([reference, *ran])
    if not isinstance(speed, Speedup):
        return f"The masks of {fastest.name} hold; against {reference.name}, {speed.reason}.{unstable}{bad}"
    how = "as fast as" if speed.low <= 1 <= speed.high else f"{speed.ratio:.2f} times as fast as"
    return f"{fastest.name} is {how} {reference.name} ({_interval(speed)}), and its masks hold.{unstable}{bad}"


def _interval(speed: Speedup) -> str:
    return f"{100 * speed.confidence:.0f} % interval {speed.low:.2f} … {speed.high:.2f}"


def _unstable(rows: Sequence[Row]) -> str:
    """Name the rows whose times vary too much for their kind of device."""
    timed = [(row.name, row.latency["model"]) for row in rows]
    found = [
        f"{name} ({100 * each.variation:.0f} %)"
        for name, each in timed
        if isinstance(each, Latency) and not each.stable
    ]
    return f" Unstable, so that another measurement may differ; times vary: {', '.join(found)}." if found else ""


def _line(row: Row, reference: Row) -> str:
    if not row.executed:
        return f"{row.name}: {row.statement}."
    if row.failure is not None:
        return f"{row.name}: failed. {row.failure}"
    judged, speed = row.verdict, row.speedup["model"]
    if isinstance(judged, Missing):
        return f"{row.name}: no verdict. {judged.reason}"
    if not judged.holds:
        return f"{row.name}: its masks do not hold, so it is not timed. {judged.words}."
    lower = f"at most {judged.drop_high:.4f} lower" if judged.drop_high >= SHOWN else "not lower"
    masks = f"Dice {judged.reference:.4f} → {judged.candidate:.4f}, {lower} ({100 * CONFIDENCE:.0f} % interval)"
    if not isinstance(speed, Speedup):
        return f"{row.name}: {speed.reason}; masks hold, {masks}."
    return f"{row.name}: {speed.ratio:.2f} times as fast as {reference.name} ({_interval(speed)}); masks hold, {masks}."


def _holds(row: Row) -> bool:
    return isinstance(row.verdict, Verdict) and row.verdict.holds


def _tier_words(tier: Tier) -> str:
    return (
        f"Measured as {tier.name}: {tier.duration_s:g} s a row and scope, at least {tier.min_runs} runs. "
        "For figures to publish: --tier certify."
    )
