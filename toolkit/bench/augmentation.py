"""Measure what test-time augmentation gains and costs, with one network on the cases of a report."""

from collections.abc import Iterable
from dataclasses import dataclass

from numpy import ndarray

from medseg_trt.bench.accuracy import AGREEMENT, compare_all, verdict
from medseg_trt.bench.accuracy_schema import Verdict
from medseg_trt.bundles.bundle import Bundle
from medseg_trt.errors import MedsegError
from medseg_trt.imaging.images import Image
from medseg_trt.imaging.segment import Run
from medseg_trt.sessions.augmented import TimedRun, averaged

WITHOUT, WITH = "once", "augmented"


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentationGain:
    """The scores and times of a network without and with test-time augmentation, on the same slices."""

    name: str  # a key of ``sessions.augmented.TTA``
    network: str  # name of the row
    metric: str
    before: float  # mean score, 0 … 1
    after: float
    low: float  # the interval of ``after - before``
    high: float
    unit: str  # that was resampled
    ms_before: float  # of a slice: the network and the way to its process and back
    ms_after: float

    __pydantic_config__ = {"extra": "forbid"}

    def __str__(self) -> str:
        """Return one line."""
        return (
            f"tta {self.name} with {self.network}: {self.metric} {self.before:.4f} → {self.after:.4f}, "
            f"{self.after - self.before:+.4f} (90 % interval {self.low:+.4f} … {self.high:+.4f}, by {self.unit}); "
            f"{self.ms_before:.2f} → {self.ms_after:.2f} ms a slice"
        )


def augmentation_gain(
    name: str, network: str, run: Run, cases: Iterable[tuple[str, Image, ndarray | None]], bundle: Bundle
) -> AugmentationGain:
    """Run every case without and with augmentation; without masks, those of the network itself are the truth.

    Args:
        name: a key of ``TTA``.
        network: the name of the row.
        run: its network.
        cases: name, image and labels.
        bundle: its preprocessing, classes and post-processing are used.

    Raises:
        MedsegError: the network fails.
    """
    once = TimedRun(run=run)
    many = TimedRun(run=averaged(run, name, bundle.preprocessing.image_size))
    runs: dict[str, Run] = {WITHOUT: once, WITH: many}
    scores = compare_all(runs, cases, bundle.preprocessing, bundle.classes, lambda *_: None, bundle.finish)
    metric = "Dice" if scores.labelled else AGREEMENT
    judged = verdict(scores.networks[WITHOUT], scores.networks[WITH], 1.0, 1.0, metric)
    if not isinstance(judged, Verdict):
        raise MedsegError(f"tta {name} with {network}: {judged.reason}")
    return AugmentationGain(
        name=name,
        network=network,
        metric=metric,
        before=judged.reference,
        after=judged.candidate,
        low=-judged.drop_high,
        high=-judged.drop_low,
        unit=judged.unit,
        ms_before=once.take_ms(),
        ms_after=many.take_ms(),
    )
