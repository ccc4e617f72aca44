"""What the CPU benchmark computes from its samples: errors, ratios of rounds, and the verdict."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from medseg_trt.metrics.intervals import sign_test_bound

LIMITS: Mapping[str, float] = {  # how many times faster the best of ours must be
    "pytorch-eager-fp32": 9.0,
    "fastest peer": 1.2,
    "pytorch-eager-fp32-transunet": 3.0,
}
LOWEST_BOUND = 1.1  # of the ratio to the fastest peer, at 95 %
FAST_INTEGERS = ("avx512_vnni", "avx_vnni", "amx_int8")  # flags of processors on which there is a verdict
MIN_SQNR_DB = 20.0


def sqnr_db(found: np.ndarray, reference: np.ndarray) -> float:
    """Return the ratio of the reference's power to that of the error, in decibels; infinite where nothing differs."""
    noise = float(np.square(found - reference, dtype=np.float64).sum())
    power = float(np.square(reference, dtype=np.float64).sum())
    return 10 * float(np.log10(power / noise)) if noise else float("inf")


def ratios_of_rounds(
    rounds: Mapping[str, Sequence[Sequence[float]]], slower: str, faster: str
) -> tuple[float, float, list[float]]:
    """Return the median, the lower bound, and all ratios of the medians of the same round.

    Args:
        rounds: milliseconds by variant, round and run.
        slower: the variant above the fraction bar.
        faster: the one below it.
    """
    ratios = [
        float(np.median(above) / np.median(below)) for above, below in zip(rounds[slower], rounds[faster], strict=True)
    ]
    return float(np.median(ratios)), sign_test_bound(ratios), ratios


def verdict(
    rounds: Mapping[str, Sequence[Sequence[float]]],
    groups: Mapping[str, str],
    sqnr: Mapping[str, float],
    processor_flags: Sequence[str],
) -> dict[str, Any]:
    """Say whether the best of ours is as much faster as it must be, and with as good logits as the best peer's.

    Args:
        rounds: milliseconds by variant, round and run.
        groups: ``peer`` or ``ours`` by variant; others do not take part.
        sqnr: of the logits on real images, by variant, in decibels.
        processor_flags: as the operating system gives them.
    """
    medians = {name: float(np.median(np.concatenate(taken))) for name, taken in rounds.items()}

    def fastest(group: str, lowest_db: float) -> str:
        names = [name for name in medians if groups[name] == group and not name.endswith("-transunet")]
        good = [name for name in names if sqnr[name] >= lowest_db]
        return min(good or names, key=medians.__getitem__)

    ours, peer = fastest("ours", MIN_SQNR_DB), fastest("peer", -np.inf)
    against = {
        "pytorch-eager-fp32": "pytorch-eager-fp32",
        "fastest peer": peer,
        "pytorch-eager-fp32-transunet": "pytorch-eager-fp32-transunet",
    }
    found: dict[str, Any] = {"ours": ours, "fastest_peer": peer}
    reasons = list[str]()
    for what, limit in LIMITS.items():
        ratio, bound, ratios = ratios_of_rounds(rounds, against[what], ours)
        found[what] = {"against": against[what], "ratio": ratio, "lower_bound": bound, "limit": limit, "rounds": ratios}
        if ratio < limit:
            reasons.append(f"{ratio:.2f}x {against[what]}, not {limit:g}x")
        if what == "fastest peer" and bound < LOWEST_BOUND:
            reasons.append(f"lower bound against {peer} {bound:.3f}, not {LOWEST_BOUND:g}")
    int8_peers = [name for name in medians if groups[name] == "peer" and "int8" in name]
    if int8_peers:
        rival = min(int8_peers, key=medians.__getitem__)
        found["sqnr_db"] = {"ours": sqnr[ours], rival: sqnr[rival]}
        if sqnr[ours] < MIN_SQNR_DB:
            reasons.append(f"SQNR {sqnr[ours]:.1f} dB, less than {MIN_SQNR_DB:g} dB")
        if sqnr[ours] < sqnr[rival]:
            reasons.append(f"SQNR {sqnr[ours]:.1f} dB, less than {sqnr[rival]:.1f} dB of {rival}")
    judged = any(flag in processor_flags for flag in FAST_INTEGERS)
    found["judged"] = judged
    found["reasons"] = reasons if judged else ["no verdict: this processor has neither VNNI nor AMX"]
    found["holds"] = judged and not reasons
    return found
