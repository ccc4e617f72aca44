"""Run all networks on the same cases, and record the scores of their masks and their worst slices.

All scores are at the size of the images. Only the current case and the worst slices are in memory.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy import ndarray

from medseg_trt.bench.accuracy_record import AccuracyRecord, SliceImages
from medseg_trt.bench.accuracy_schema import (
    Accuracy,
    CaseAccuracy,
    Difference,
    SliceCounts,
    Unit,
    Verdict,
    WorstCase,
)
from medseg_trt.bench.missing import Missing
from medseg_trt.bench.network_inputs import network_inputs
from medseg_trt.errors import InputError, MedsegError
from medseg_trt.export.gate import compare
from medseg_trt.export.verify import labels_of
from medseg_trt.imaging.images import Image
from medseg_trt.imaging.segment import Finish, Run
from medseg_trt.metrics.intervals import CONFIDENCE, MIN_UNITS, Interval, change_interval
from medseg_trt.metrics.overlap import ClassScore, confusion, mean_scores, scores
from medseg_trt.spec import Classes, Preprocessing

WORST = 3  # slices of each row that are drawn
PIXELS = (1.0, 1.0, 1.0)
AGREEMENT = "agreement with the reference in Dice"


@dataclass(kw_only=True)
class NetworkScores:
    """The records by name of the network, the reference first, and the units of HD95."""

    networks: dict[str, AccuracyRecord]
    labelled: bool
    units: set[str] = field(default_factory=set[str])

    @property
    def hd95_unit(self) -> str | None:
        """Millimetres or pixels; None if the images have no common unit."""
        return next(iter(self.units)) if len(self.units) == 1 else None

    def accuracy(self, name: str) -> Accuracy | Missing:
        """Return the scores of a network's masks."""
        record, unit = self.networks[name], self.hd95_unit
        if record.failure is not None or not record.cases:
            return Missing(reason=record.failure or "there is no image")
        cases = [
            case if unit else replace(case, scores=tuple(replace(score, hd95=None) for score in case.scores))
            for case in record.cases
        ]
        means = mean_scores([case.scores for case in cases])
        return Accuracy(
            metric="Dice" if self.labelled else AGREEMENT,
            mean_dice=_mean(score.dice for score in means),
            mean_iou=_mean(score.iou for score in means),
            mean_hd95=_mean(score.hd95 for score in means),
            hd95_unit=unit,
            means=means,
            cases=tuple(cases),
            slices=tuple(record.slices),
        )


def compare_all(
    runs: Mapping[str, Run],
    cases: Iterable[tuple[str, Image, ndarray | None]],
    preprocessing: Preprocessing,
    classes: Classes,
    on_case: Callable[[str, Image], None],
    finish: Finish,
) -> NetworkScores:
    """Run every network on every case; a network that fails is left out from then on.

    Args:
        runs: the networks, the reference first.
        cases: name, image and labels; without labels the reference's mask is the truth.
        preprocessing: of all networks.
        classes: of all networks.
        on_case: called with every case.
        finish: corrects the labels of every network.

    Raises:
        MedsegError: the reference fails.
    """
    reference_name = next(iter(runs))
    compared = NetworkScores(networks={name: AccuracyRecord() for name in runs}, labelled=True)
    for case, image, truth in cases:
        on_case(case, image)
        compared.labelled = truth is not None
        compared.units.add("pixels" if image.spacing_mm is None else "mm")
        made = _labels_of_all(runs, compared.networks, case, image, preprocessing)
        finished = {name: finish(image, labels) for name, labels in made.items()}
        reference_labels = finished[reference_name]
        for name, labels in finished.items():
            record = compared.networks[name]
            _add_scores(record, case, image, labels, reference_labels if truth is None else truth, classes)
            if name != reference_name:
                _add_worst(record, compared.networks[reference_name], case, image, truth, reference_labels, labels)
    return compared


def _labels_of_all(
    runs: Mapping[str, Run],
    records: Mapping[str, AccuracyRecord],
    case: str,
    image: Image,
    preprocessing: Preprocessing,
) -> dict[str, ndarray]:
    """Return the labels of every network that has not failed; ``compare_all`` says what is raised."""
    reference_name = next(iter(runs))
    labels: dict[str, list[ndarray]] = {name: [] for name in runs if records[name].failure is None}
    for part in network_inputs(image, preprocessing):
        reference = part.logits(runs[reference_name])
        if not np.isfinite(reference).all():
            raise InputError(f"{case}: the reference's logits are not finite, so nothing can be compared")
        for name in tuple(labels):
            try:
                logits = reference if name == reference_name else part.logits(runs[name])
            except MedsegError as error:
                records[name].failure = str(error)
                del labels[name]
                continue
            if not np.isfinite(logits).all():
                records[name].failure = f"{case}: the logits are not finite: a value overflows its type"
                del labels[name]
                continue
            _add_agreement(records[name], logits, reference)
            labels[name].append(part.labels(logits))
    return {name: np.concatenate(parts) for name, parts in labels.items()}


def differences(reference: Accuracy, candidate: Accuracy, verdict: Verdict) -> tuple[Difference, ...]:
    """Return the paired differences of two networks, for the mean over the classes and for every class.

    The mean Dice is that of the verdict. Cases are paired if there are at least five, else slices; HD95 is always
    paired by case.
    """
    by_case = len(reference.cases) >= MIN_UNITS
    names = [score.name for score in reference.means]
    paired = [
        Difference(
            metric="Dice",
            class_name=None,
            unit=verdict.unit,
            pairs=verdict.pairs,
            reference=verdict.reference,
            candidate=verdict.candidate,
            difference=-verdict.drop,
            low=-verdict.drop_high,
            high=-verdict.drop_low,
            confidence=verdict.confidence,
        )
    ]
    for metric, attribute in (("Dice", "dice"), ("IoU", "iou"), ("HD95", "hd95")):
        units: Unit = "cases" if by_case or metric == "HD95" else "slices"
        tables = [_table(accuracy, attribute, units) for accuracy in (reference, candidate)]
        missing = np.isnan(tables[0]) | np.isnan(tables[1])
        before, after = (np.where(missing, np.nan, values) for values in tables)
        columns = [(None, slice(None)), *((name, slice(index, index + 1)) for index, name in enumerate(names))]
        for name, column in columns[metric == "Dice" :]:
            rows = ~missing[:, column].all(axis=1)
            if rows.any():
                interval = change_interval(before[rows, column], after[rows, column])
                paired.append(_difference(metric, name, units, before[rows, column], after[rows, column], interval))
    return tuple(paired)


def verdict(
    reference: AccuracyRecord, candidate: AccuracyRecord, limit: float, allowed: float, metric: str
) -> Verdict | Missing:
    """Judge a network's masks: neither the drop of Dice nor the share of changed pixels may exceed its limit.

    This is the gate of ``build`` on these images; false alarms count as well.
    """
    if candidate.failure is not None or len(candidate.slices) != len(reference.slices):
        return Missing(reason=candidate.failure or "it did not run on all images")
    counts = [np.array([counted.counts for counted in record.slices], np.int64) for record in (reference, candidate)]
    gate = compare(counts[0], counts[1], [counted.case for counted in reference.slices], limit, metric)
    disagreement = 1 - candidate.same_labels / candidate.all_labels
    text = f"{gate}"
    if disagreement > allowed:
        text = (
            f"{100 * disagreement:.2f} % of the pixels have another label than the reference's, "
            f"and {100 * allowed:.2f} % may; {text}"
        )
    return Verdict(
        holds=gate.holds and disagreement <= allowed,
        reference=gate.reference,
        candidate=gate.candidate,
        drop=gate.drop,
        drop_low=gate.low,
        drop_high=gate.high,
        limit=limit,
        confidence=CONFIDENCE,
        unit="cases" if gate.unit == "cases" else "slices",
        pairs=len({counted.case for counted in reference.slices}) if gate.unit == "cases" else gate.images,
        words=text,
    )


def _add_agreement(record: AccuracyRecord, logits: ndarray, reference: ndarray) -> None:
    record.max_abs_error = max(record.max_abs_error, float(np.abs(logits - reference).max()))
    same = labels_of(logits) == labels_of(reference)
    record.same_labels += int(same.sum())
    record.all_labels += same.size
    record.noise += float(np.square(logits - reference, dtype=np.float64).sum())
    record.power += float(np.square(reference, dtype=np.float64).sum())


def _add_scores(
    record: AccuracyRecord, case: str, image: Image, labels: ndarray, truth: ndarray, classes: Classes
) -> None:
    spacing = image.spacing_mm or PIXELS
    if len(labels) == 1:  # the surface of a 2-D image is its outline
        scored = scores(labels[0], truth[0], classes, spacing[1:])
    else:
        scored = scores(labels, truth, classes, spacing)
    record.cases.append(CaseAccuracy(case=case, scores=scored))
    for index, (mask, true) in enumerate(zip(labels, truth, strict=True)):
        matrix = confusion(mask, true, len(classes.names))
        counts = np.stack([matrix.diagonal(), matrix.sum(axis=0), matrix.sum(axis=1)], axis=1)[1:]
        triples = tuple((int(right), int(predicted), int(there)) for right, predicted, there in counts)
        record.slices.append(SliceCounts(case=case, slice=index, counts=triples))


def _add_worst(
    record: AccuracyRecord,
    reference: AccuracyRecord,
    case: str,
    image: Image,
    truth: ndarray | None,
    reference_labels: ndarray,
    labels: ndarray,
) -> None:
    """Keep the slices with the largest loss of Dice, and among equals those with the most changed pixels."""
    record_slices, reference_slices = (item.slices[-len(labels) :] for item in (record, reference))
    for index, (counts, reference_counts) in enumerate(zip(record_slices, reference_slices, strict=True)):
        changed = int((labels[index] != reference_labels[index]).sum())
        if not changed:
            continue
        score, reference_score = _slice_dice(counts, reference_counts)
        entry = WorstCase(
            case=case,
            slice=index,
            reference_dice=reference_score,
            candidate_dice=score,
            difference=(score or 0.0) - (reference_score or 0.0),
            changed_pixels=changed,
        )
        images = SliceImages(
            pixels=image.pixels[index].copy(),
            truth=None if truth is None else truth[index].copy(),
            reference=reference_labels[index].copy(),
            candidate=labels[index].copy(),
        )
        record.worst.append((entry, images))
    record.worst.sort(key=lambda item: (item[0].difference, -item[0].changed_pixels))
    del record.worst[WORST:]


def _slice_dice(candidate: SliceCounts, reference: SliceCounts) -> tuple[float | None, float | None]:
    """Return the mean Dice of both masks over the classes in the truth or in either mask."""
    counts = [np.array(array.counts, np.float64) for array in (candidate, reference)]
    occurs = counts[0][:, 2] + counts[0][:, 1] + counts[1][:, 1] > 0
    if not occurs.any():
        return None, None
    sums = [array[:, 1] + array[:, 2] for array in counts]
    dice = [
        np.where(both > 0, 2 * array[:, 0] / np.maximum(both, 1), 1.0) for array, both in zip(counts, sums, strict=True)
    ]
    return float(dice[0][occurs].mean()), float(dice[1][occurs].mean())


def _table(accuracy: Accuracy, attribute: str, unit: Unit) -> ndarray:
    """Return a score by unit and class; NaN if the truth lacks the class or there is no score."""
    if unit == "cases":
        return np.array([[_score(score, attribute) for score in case.scores] for case in accuracy.cases], np.float64)
    counts = np.array([score.counts for score in accuracy.slices], np.float64)  # slices, classes, 3
    right, predicted, there = counts[..., 0], counts[..., 1], counts[..., 2]
    below = predicted + there if attribute == "dice" else predicted + there - right
    above = 2 * right if attribute == "dice" else right
    return np.where(there > 0, above / np.maximum(below, 1), np.nan)


def _score(score: ClassScore, attribute: str) -> float:
    value = getattr(score, attribute)
    return float("nan") if value is None or not score.truth_pixels else value


def _difference(
    metric: str, name: str | None, unit: Unit, before: ndarray, after: ndarray, interval: Interval
) -> Difference:
    return Difference(
        metric=metric,  # pyright: ignore[reportArgumentType]  # one of three
        class_name=name,
        unit=unit,
        pairs=interval.units,
        reference=_mean_of_means(before),
        candidate=_mean_of_means(after),
        difference=interval.estimate,
        low=interval.low,
        high=interval.high,
        confidence=interval.confidence,
    )


def _mean_of_means(values: ndarray) -> float:
    columns = values[:, ~np.isnan(values).all(axis=0)]
    return float(np.nanmean(columns, axis=0).mean())


def _mean(values: Iterable[float | None]) -> float | None:
    existing = [value for value in values if value is not None]
    return sum(existing) / len(existing) if existing else None
