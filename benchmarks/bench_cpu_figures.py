"""Compute errors and ratios of rounds from the samples of the CPU benchmark."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from medseg_trt.metrics.intervals import sign_test_bound

MIN_SQNR_DB = 20.0  # of a variant that counts as ours


def sqnr_db(logits: np.ndarray, reference: np.ndarray) -> float:
    """Return the ratio of the reference's power to that of the error, in decibels; infinite where nothing differs."""
    noise = float(np.square(logits - reference, dtype=np.float64).sum())
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


def compare_speeds(
    rounds: Mapping[str, Sequence[Sequence[float]]], groups: Mapping[str, str], sqnr: Mapping[str, float]
) -> dict[str, Any]:
    """Return how many times as fast as its rivals the fastest of our variants is, and the errors of their logits.

    Variants of ours with an SQNR below ``MIN_SQNR_DB`` are left out if there are others.

    Args:
        rounds: milliseconds by variant, round and run.
        groups: ``peer`` or ``ours`` by variant; others do not take part.
        sqnr: of the logits on real images, by variant, in decibels.
    """
    medians = {name: float(np.median(np.concatenate(samples))) for name, samples in rounds.items()}

    def fastest(group: str, lowest_db: float) -> str:
        names = [name for name in medians if groups[name] == group and not name.endswith("-transunet")]
        accurate = [name for name in names if sqnr[name] >= lowest_db]
        return min(accurate or names, key=medians.__getitem__)

    ours, peer = fastest("ours", MIN_SQNR_DB), fastest("peer", -np.inf)
    rivals = {
        "pytorch-eager-fp32": "pytorch-eager-fp32",
        "fastest peer": peer,
        "pytorch-eager-fp32-transunet": "pytorch-eager-fp32-transunet",
    }
    comparison: dict[str, Any] = {"ours": ours, "fastest_peer": peer}
    for name, rival in rivals.items():
        ratio, bound, ratios = ratios_of_rounds(rounds, rival, ours)
        comparison[name] = {"against": rival, "ratio": ratio, "lower_bound": bound, "rounds": ratios}
    int8_peers = [name for name in medians if groups[name] == "peer" and "int8" in name]
    if int8_peers:
        rival = min(int8_peers, key=medians.__getitem__)
        comparison["sqnr_db"] = {"ours": sqnr[ours], rival: sqnr[rival]}
    return comparison
