"""Test whether a network of reduced precision makes masks as good as the reference's; if not, return layers to float.

The score is the mean Dice over all pairs of a case, which is a 2-D image or a volume, and a class that the truth or a
mask of either network has. It equals that of ``evaluate`` where every case has every class; a false alarm, which
``evaluate`` leaves out of the mean, counts 0 here. Without any pair, the score is 1. The gate is a non-inferiority
test on paired slices: the upper end of the interval of the drop must not exceed the limit. Few or varied images widen
the interval, which makes the gate harder to pass.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray

from medseg_trt.metrics.intervals import CONFIDENCE, RESAMPLES, bounds, draw

MIN_CASES = 5  # with fewer cases, slices are resampled instead

Counts = Int64[ndarray, "images classes 3"]  # pixels: correct, in the mask, in the truth; without the background


@dataclass(frozen=True, kw_only=True, slots=True)
class GateVerdict:
    """How much worse a network's masks are than the reference's, on the same images."""

    metric: str  # "Dice", or "agreement with PyTorch in Dice" or with another reference where there are no true masks
    images: int
    unit: str  # resampled unit: "cases", or "slices" where there are too few cases
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

    @property
    def remark(self) -> str | None:
        """A sentence where every candidate passes, because the reference has no more to lose than the limit."""
        return empty_gate(self.reference, self.limit, self.metric)

    def __str__(self) -> str:
        """Return one line with the interval."""
        return (
            f"{self.metric} {self.reference:.4f} → {self.candidate:.4f}, drop {self.drop:.4f} "
            f"({100 * CONFIDENCE:.0f} % interval {self.low:.4f} … {self.high:.4f}, {self.images} images, "
            f"by {self.unit}), limit {self.limit:g}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class FloatFallback:
    """Layers that returned to float, and the verdict that this led to."""

    verdict: GateVerdict
    kept_float: tuple[str, ...]  # groups of layers that returned to float, in this order
    costs: tuple[float, ...]  # the upper end of the drop's interval before each of them returned
    ranks: tuple[tuple[str, float], ...]  # every group with the error that it causes alone, the largest first

    __pydantic_config__ = {"extra": "forbid"}


def empty_gate(reference: float, limit: float, metric: str) -> str | None:
    """Say in one sentence that a gate shows nothing, or return None where a network can fail it.

    Args:
        reference: mean score of the reference, 0 … 1.
        limit: the largest allowed drop of the mean.
        metric: name of the score.
    """
    if reference > limit:
        return None
    return (
        f"the accuracy gate shows nothing: the reference itself has {metric} {reference:.4f}, so that no masks can "
        f"lose more than the limit of {limit:g}; judge a network that segments these images"
    )


def compare(
    reference: Counts, candidate: Counts, cases: Sequence[str], limit: float, metric: str = "Dice"
) -> GateVerdict:
    """Compare the masks of two networks.

    Args:
        reference: the counts of every slice.
        candidate: of the same slices in the same order.
        cases: the case of each slice; slices of one case are not independent.
        limit: the largest allowed drop of the mean.
        metric: name of the score.

    Raises:
        ValueError: there are no slices, or the lengths differ.
    """
    if not len(reference) or not len(reference) == len(candidate) == len(cases):
        raise ValueError(f"{len(reference)}, {len(candidate)} and {len(cases)} slices cannot be paired")
    numbers = np.unique(np.asarray(cases), return_inverse=True)[1]
    by_case = bool(numbers.max() + 1 >= MIN_CASES)
    units = numbers if by_case else np.arange(len(numbers))
    count = int(units.max()) + 1
    resampled = draw(count, RESAMPLES, np.random.default_rng(0))[:, units]
    weights = np.concatenate([np.ones((1, len(units)), np.int64), resampled])  # the original sample first
    scores = _scores((reference, candidate), weights, numbers, by_case)
    drops = scores[:, 0] - scores[:, 1]
    low, high = bounds(drops[1:], count)
    return GateVerdict(
        metric=metric,
        images=len(units),
        unit="cases" if by_case else "slices",
        reference=float(scores[0, 0]),
        candidate=float(scores[0, 1]),
        drop=float(drops[0]),
        low=low,
        high=high,
        limit=limit,
    )


def fall_back_to_float(
    judge: Callable[[frozenset[str]], GateVerdict],
    error_alone: Callable[[str], float],
    groups: Iterable[str],
    within_budget: Callable[[frozenset[str]], bool],
) -> FloatFallback:
    """Return groups of layers to float, that with the largest error first, until the gate holds or the budget is used.

    Args:
        judge: builds the network with these groups in float, and compares it with the reference.
        error_alone: error of the logits when one group alone is quantised; called only where the gate fails.
        groups: the names of the groups.
        within_budget: whether the network still has its precision with these groups in float.

    Returns:
        The groups in float and the last verdict, which may not hold.
    """
    kept: tuple[str, ...] = ()
    verdict = judge(frozenset())
    if verdict.holds:
        return FloatFallback(verdict=verdict, kept_float=(), costs=(), ranks=())
    ranks = sorted(((group, error_alone(group)) for group in groups), key=lambda rank: -rank[1])
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
    weights: Int64[ndarray, "draws images"],
    cases: Int64[ndarray, " images"],
    by_case: bool,
) -> Float64[ndarray, "draws 2"]:
    """Return the mean Dice of both networks over the same classes and cases, for every draw of slices or cases."""
    totals, number = np.zeros((len(weights), 2)), np.zeros(len(weights))
    for case in range(cases.max() + 1):
        of_case = cases == case
        pooled = [np.einsum("di,icp->dcp", weights[:, of_case], counts[of_case]) for counts in networks]
        occurs = pooled[0][..., 2] + pooled[0][..., 1] + pooled[1][..., 1] > 0  # in the truth or in either mask
        weight = occurs * (weights[:, of_case][:, :1] if by_case else 1)
        number += weight.sum(axis=1)
        totals += np.stack([(weight * _dice(counts)).sum(axis=1) for counts in pooled], axis=1)
    return np.where(number[:, None] > 0, totals / np.maximum(number, 1)[:, None], 1.0)


def _dice(counts: Int64[ndarray, "draws classes 3"]) -> Float64[ndarray, "draws classes"]:
    """Return Dice; 1 for a class that is neither in the mask nor in the truth."""
    both = counts[..., 1] + counts[..., 2]
    return np.where(both > 0, 2 * counts[..., 0] / np.maximum(both, 1), 1.0)
