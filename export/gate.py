"""Decide whether a network that was made cheaper still draws the same masks, and find out which layers it fails for.

The score is that of ``evaluate``: Dice of every class in every case, a picture or a whole volume, averaged; and a class
that a case lacks but a mask finds there counts 0 against 1. The gate is a test of non-inferiority: with the slices
paired, the upper end of the drop's interval must stay below the limit, so that few or scattered images make it harder
to pass, not easier.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray

from medseg_trt.metrics.intervals import CONFIDENCE, RESAMPLES, bounds, draw

MIN_CASES = 5  # with fewer patients there is nothing to resample but their slices

Counts = Int64[ndarray, "images classes 3"]  # pixels: right, in the mask, in the truth; without the background


@dataclass(frozen=True, kw_only=True, slots=True)
class GateVerdict:
    """How much worse a network's masks are than the reference's, on the same images."""

    metric: str  # "Dice", or "agreement with PyTorch in Dice" where nobody has drawn masks
    images: int
    unit: str  # what was resampled: "cases", or "slices" where there are too few cases
    reference: float  # mean score, 0 … 1
    candidate: float
    drop: float  # of the mean; negative where the candidate is better
    low: float  # the interval of the drop
    high: float
    limit: float

    __pydantic_config__ = {"extra": "forbid"}

    @property
    def holds(self) -> bool:
        """Whether the upper end of the drop's interval is within the limit."""
        return self.high <= self.limit

    def __str__(self) -> str:
        """Return one line with the interval."""
        return (
            f"{self.metric} {self.reference:.4f} → {self.candidate:.4f}, drop {self.drop:.4f} "
            f"({100 * CONFIDENCE:.0f} % interval {self.low:.4f} … {self.high:.4f}, {self.images} images, "
            f"by {self.unit}), limit {self.limit:g}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class FloatFallback:
    """What it took to make the gate hold."""

    verdict: GateVerdict
    kept_float: tuple[str, ...]  # groups of layers that went back to float, the first one first
    costs: tuple[float, ...]  # the drop's upper end before each of them went back
    ranks: tuple[tuple[str, float], ...]  # every group with the error it causes alone, the worst first

    __pydantic_config__ = {"extra": "forbid"}


def compare(
    reference: Counts, candidate: Counts, cases: Sequence[str], limit: float, metric: str = "Dice"
) -> GateVerdict:
    """Compare the masks of two networks.

    Args:
        reference: the counts of every slice.
        candidate: of the same slices in the same order.
        cases: which case each slice belongs to: slices of one patient are no independent images.
        limit: the largest drop of the mean that is allowed.
        metric: what the scores are.

    Raises:
        ValueError: there is no slice, or the lengths differ.
    """
    if not len(reference) or not len(reference) == len(candidate) == len(cases):
        raise ValueError(f"{len(reference)}, {len(candidate)} and {len(cases)} slices cannot be paired")
    numbers = np.unique(np.asarray(cases), return_inverse=True)[1]
    by_case = bool(numbers.max() + 1 >= MIN_CASES)
    units = numbers if by_case else np.arange(len(numbers))
    count = int(units.max()) + 1
    drawn = draw(count, RESAMPLES, np.random.default_rng(0))[:, units]
    times = np.concatenate([np.ones((1, len(units)), np.int64), drawn])  # as they are, then resampled
    scores = _scores((reference, candidate), times, numbers, by_case)
    drops = scores[:, 0] - scores[:, 1]
    low, high = bounds(drops[1:], count)
    return GateVerdict(
        metric=metric, images=len(units), unit="cases" if by_case else "slices", reference=float(scores[0, 0]),
        candidate=float(scores[0, 1]), drop=float(drops[0]), low=low, high=high, limit=limit,
    )  # fmt: skip


def fall_back_to_float(
    judge: Callable[[frozenset[str]], GateVerdict],
    error_alone: Callable[[str], float],
    groups: Iterable[str],
    within_budget: Callable[[frozenset[str]], bool],
) -> FloatFallback:
    """Give the worst groups of layers back to float, one at a time, until the gate holds or no more may go.

    Args:
        judge: build the network with these groups in float, and compare it.
        error_alone: how far the answer is off when one group alone is quantised; only asked for where the gate fails.
        groups: the names of the groups.
        within_budget: whether so many groups in float still leave a network that deserves its name.

    Returns:
        What was reached; its verdict may not hold.
    """
    kept: tuple[str, ...] = ()
    verdict = judge(frozenset())
    if verdict.holds:
        return FloatFallback(verdict=verdict, kept_float=(), costs=(), ranks=())
    ranks = sorted(((group, error_alone(group)) for group in groups), key=lambda each: -each[1])
    costs: list[float] = []
    for group, _ in ranks:
        if verdict.holds or not within_budget(frozenset((*kept, group))):
            break
        costs.append(verdict.high)
        kept = (*kept, group)
        verdict = judge(frozenset(kept))
    return FloatFallback(verdict=verdict, kept_float=kept, costs=tuple(costs), ranks=tuple(ranks))


def _scores(
    networks: tuple[Counts, Counts],
    times: Int64[ndarray, "draws images"],
    cases: Int64[ndarray, " images"],
    by_case: bool,
) -> Float64[ndarray, "draws 2"]:
    """Return the mean Dice of both networks over the same classes and cases, for every draw of slices or cases."""
    totals, number = np.zeros((len(times), 2)), np.zeros(len(times))
    for case in range(cases.max() + 1):
        mine = cases == case
        pooled = [np.einsum("di,icp->dcp", times[:, mine], counts[mine]) for counts in networks]
        occurs = pooled[0][..., 2] + pooled[0][..., 1] + pooled[1][..., 1] > 0  # in the truth or in either mask
        weight = occurs * (times[:, mine][:, :1] if by_case else 1)
        number += weight.sum(axis=1)
        totals += np.stack([(weight * _dice(counts)).sum(axis=1) for counts in pooled], axis=1)
    return np.where(number[:, None] > 0, totals / np.maximum(number, 1)[:, None], 1.0)


def _dice(counts: Int64[ndarray, "draws classes 3"]) -> Float64[ndarray, "draws classes"]:
    """Return Dice; a class that is neither in the mask nor in the truth is right."""
    both = counts[..., 1] + counts[..., 2]
    return np.where(both > 0, 2 * counts[..., 0] / np.maximum(both, 1), 1.0)
