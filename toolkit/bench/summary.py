"""Summarise a report in a few lines: whether the masks hold, and how much faster the networks are."""

from collections.abc import Sequence

from medseg_trt.bench.accuracy_schema import Verdict
from medseg_trt.bench.missing import Missing
from medseg_trt.bench.schema import Row, Summary
from medseg_trt.bench.timing_schema import Latency, Speedup, Tier
from medseg_trt.metrics.intervals import CONFIDENCE

SHOWN = 0.00005  # the smallest value that four decimals show


def summary(rows: Sequence[Row], tier: Tier, labelled: bool) -> Summary:
    """Summarise all rows, of which the reference is the first."""
    reference, *others = rows
    peers, variants = ([row for row in others if (row.role == "peer") is wanted] for wanted in (True, False))
    executed = [row for row in variants if row.executed]
    good = [row for row in executed if _holds(row) and row.failure is None]
    holds = bool(executed) and len(good) == len(executed)
    beside = [row for row in good if row.device == reference.device]  # no other row has a ratio
    timed = [(row.latency["model"], row) for row in beside or good]
    fastest = min(
        ((latency.median_ms, row) for latency, row in timed if isinstance(latency, Latency)),
        key=lambda pair: pair[0],
        default=None,
    )
    lines = [_line(row, reference) for row in (*variants, *peers)]
    if not labelled:
        lines.append(
            "The images have no masks: the figures show how far the networks agree, not how accurate they are."
        )
    if tier.name != "certify":
        lines.append(_tier_words(tier))
    return Summary(
        holds=holds,
        headline=_headline(fastest[1] if fastest else None, reference, executed, good, peers),
        lines=tuple(lines),
        fastest=fastest[1].name if fastest else None,
    )


def _headline(
    fastest: Row | None, reference: Row, executed: Sequence[Row], good: Sequence[Row], peers: Sequence[Row]
) -> str:
    if not executed:
        return "Only the reference could be run here."
    failed = [row.name for row in executed if row not in good]
    bad = f" {', '.join(failed)}: not to be used." if failed else ""
    if fastest is None and good:
        return f"Masks hold, but nothing was timed: {', '.join(row.name for row in good)}.{bad}"
    if fastest is None:
        return f"No network reproduces the reference's masks.{bad}"
    speed = fastest.speedup["model"]
    unstable = _unstable([reference, *executed])
    if not isinstance(speed, Speedup):
        return f"The masks of {fastest.name} hold; against {reference.name}, {speed.reason}.{unstable}{bad}"
    how = "as fast as" if speed.low <= 1 <= speed.high else f"{speed.ratio:.2f} times as fast as"
    return (
        f"On {reference.device}, {fastest.name} is {how} {reference.name} ({_interval(speed)}), and its masks hold."
        f"{_fastest_peer(fastest, peers)}{unstable}{bad}"
    )


def _fastest_peer(fastest: Row, peers: Sequence[Row]) -> str:
    """Return a sentence about the fastest way of PyTorch on the same device whose masks hold."""
    timed = [
        (latency.median_ms, row.name)
        for row in peers
        if row.device == fastest.device and _holds(row) and isinstance(latency := row.latency["model"], Latency)
    ]
    own = fastest.latency["model"]
    if not timed or not isinstance(own, Latency):
        return ""
    peer_ms, name = min(timed)
    return f" The fastest peer, {name}, takes {peer_ms:.2f} ms, {fastest.name} {own.median_ms:.2f} ms."


def _interval(speed: Speedup) -> str:
    return f"{100 * speed.confidence:.0f} % interval {speed.low:.2f} … {speed.high:.2f}"


def _unstable(rows: Sequence[Row]) -> str:
    """Return a sentence about the rows with unstable times."""
    timed = [(row.name, row.latency["model"]) for row in rows]
    unstable = [
        f"{name} ({100 * latency.variation:.0f} %)"
        for name, latency in timed
        if isinstance(latency, Latency) and not latency.stable
    ]
    return f" Unstable times, so another measurement may differ: {', '.join(unstable)}." if unstable else ""


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
        f"Measured as {tier.name}: {tier.duration_s:g} s per row and scope, at least {tier.min_runs} runs. "
        "For figures to publish: --tier certify."
    )
