"""Score a network on a labelled data set, by one of the protocols of ``metrics.protocols``."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from medseg_trt.errors import InputError, UsageError
from medseg_trt.imaging.preprocess import for_image, prepare, prepare_labels, restore
from medseg_trt.imaging.segment import Finish, Run, segment
from medseg_trt.metrics.overlap import ClassScore, MeanScore, mean_scores, scores
from medseg_trt.metrics.protocols import METRICS, MetricMode
from medseg_trt.progress import track
from medseg_trt.spec import Classes, Preprocessing
from medseg_trt.tiling.segment import tiled, with_mpp
from medseg_trt.tiling.windows import AS_RECORDED, TileChoice, Tiles, chosen_tiles, recorded_tiles
from medseg_trt.train.datasets.folder import Case, read_case

PIXELS = (1.0, 1.0, 1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class CaseScores:
    """The scores of one case (an image or a volume), or of one image or batch, depending on the metric."""

    case: str
    scores: tuple[ClassScore, ...]
    images: int = 1  # its weight in a mean over images


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """The scores of a network on a split."""

    cases: tuple[CaseScores, ...]
    means: tuple[MeanScore, ...]  # by class, over the cases that contain it, or as the metric defines
    hd95_unit: str | None = None  # "mm", "pixels" or "voxels", where HD95 was measured
    metric: str = "volume"  # a key of METRICS
    batch: int | None = None  # images that were pooled; None: the metric does not pool

    @property
    def has_iou(self) -> bool:
        """Whether the metric has an IoU."""
        return not any(mean.dice is not None and mean.iou is None for mean in self.means)

    @property
    def mean_dice(self) -> float:
        """The mean over the classes that occur, 0 … 1; 0 if none occurs."""
        return _mean([mean.dice for mean in self.means]) or 0.0

    @property
    def mean_iou(self) -> float | None:
        """The mean over the classes that occur, 0 … 1; None if the metric has none, or no class occurs."""
        return _mean([mean.iou for mean in self.means])

    @property
    def mean_hd95(self) -> float | None:
        """The mean over the classes that have one."""
        return _mean([mean.hd95 for mean in self.means])


def evaluate(
    run: Run,
    cases: Sequence[Case],
    preprocessing: Preprocessing,
    classes: Classes,
    batch: int = 8,
    hd95: bool = False,
    metric: str = "volume",
    finish: Finish | None = None,
    tiles: TileChoice = AS_RECORDED,
) -> Evaluation:
    """Segment every case and compare the result with its mask.

    Args:
        run: the network: (batch, 3, H, W) float32 to logits.
        cases: the cases of a split.
        preprocessing: of the network.
        classes: its labels.
        batch: number of slices per network call; ``unext_batch`` pools their pixels.
        hd95: also measure HD95 with ``volume``: in millimetres if all images have a spacing, in pixels if none has.
        metric: a key of ``METRICS``.
        finish: corrects the labels of every complete case; metrics at the network's size leave it out.
        tiles: how images are cut into windows; ``AsRecorded``: as the preprocessing says; None: slices are resized as
            a whole.

    Raises:
        InputError: a file cannot be read or does not match the classes; or for HD95 only some images have a spacing.
        UsageError: the metric does not exist, or has no HD95, or scores no masks that are made of windows.
    """
    mode, chosen = metric_mode(metric, hd95), chosen_tiles(tiles, recorded_tiles(preprocessing))
    require_scorable(metric, chosen)
    if mode.unit == "case":
        scored, unit = _score_cases(run, cases, preprocessing, classes, batch, hd95, mode, finish, chosen)
    else:
        scored, unit = _score_at_network_size(run, cases, preprocessing, classes, batch, mode), None
    means = mean_scores(
        [case.scores for case in scored], [float(case.images) for case in scored], over_all=mode.every_unit_counts
    )
    counted_together = batch if mode.unit == "batch" else None
    return Evaluation(cases=tuple(scored), means=means, hd95_unit=unit, metric=metric, batch=counted_together)


def metric_mode(metric: str, hd95: bool = False) -> MetricMode:
    """Return a metric by its name.

    Raises:
        UsageError: the metric does not exist, or ``hd95`` is set and it has no HD95.
    """
    if metric not in METRICS:
        raise UsageError(f"no metric is called {metric!r}; choose one of: {', '.join(METRICS)}")
    if hd95 and METRICS[metric].hd95 == "never":
        raise UsageError(f"{metric} has no HD95; choose --metric volume, or leave --hd95 out")
    return METRICS[metric]


def require_scorable(metric: str, tiles: Tiles | None) -> None:
    """Refuse a metric that scores no masks made of windows.

    Raises:
        UsageError: it scores masks of the network's size.
    """
    if tiles is not None and METRICS[metric].unit != "case":
        raise UsageError(
            f"{metric} scores masks of the network's size, and windows make none; choose --metric volume, "
            "or whole slices: --tile off"
        )


def _score_cases(
    run: Run,
    cases: Sequence[Case],
    preprocessing: Preprocessing,
    classes: Classes,
    batch: int,
    hd95: bool,
    mode: MetricMode,
    finish: Finish | None,
    tiles: Tiles | None,
) -> tuple[list[CaseScores], str | None]:
    """Score complete cases at their own size, and return the unit of the distances."""
    scored: list[CaseScores] = []
    units: set[str] = set()
    in_voxels = mode.hd95 == "always"
    for case in track(cases, "evaluate"):
        image, truth = read_case(case, len(classes.names))
        image = with_mpp(image, tiles)
        in_windows = None if tiles is None else tiled(run, image, preprocessing, tiles)
        prediction = segment(run, image, preprocessing, batch, pixels_to_masks=in_windows)
        prediction = prediction if finish is None else finish(image, prediction)
        spacing = PIXELS if in_voxels else (image.spacing_mm or PIXELS) if hd95 else None
        if len(truth) == 1:  # a 2-D image
            prediction, truth, spacing = prediction[0], truth[0], spacing and spacing[1:]
        class_scores = tuple(map(mode.rule, scores(prediction, truth, classes, spacing)))
        scored.append(CaseScores(case=case.name, scores=class_scores))
        units.add("voxels" if in_voxels else "pixels" if image.spacing_mm is None else "mm")
    if hd95 and len(units) > 1:
        raise InputError("some images have a spacing and some have none, so HD95 has no common unit; leave it out")
    return scored, units.pop() if (hd95 or in_voxels) and units else None


def _score_at_network_size(
    run: Run, cases: Sequence[Case], preprocessing: Preprocessing, classes: Classes, batch: int, mode: MetricMode
) -> list[CaseScores]:
    """Score images one by one or batch by batch, at the network's size."""
    scored: list[CaseScores] = []
    for group in _grouped(_prepared(cases, preprocessing, len(classes.names)), batch):
        names, inputs, truths = zip(*group, strict=True)
        size = preprocessing.image_size
        predictions = np.stack([restore(logits, size, preprocessing, None) for logits in run(np.stack(inputs))])
        units = [slice(None)] if mode.unit == "batch" else [slice(index, index + 1) for index in range(len(names))]
        for unit in units:
            class_scores = tuple(map(mode.rule, scores(predictions[unit], np.stack(truths[unit]), classes)))
            name = names[unit][0] if len(names[unit]) == 1 else f"{names[unit][0]} … {names[unit][-1]}"
            scored.append(CaseScores(case=name, scores=class_scores, images=len(names[unit])))
    return scored


def _prepared(
    cases: Sequence[Case], preprocessing: Preprocessing, num_labels: int
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield the name, the network's input and the labels of that size of every slice, in the order of the cases."""
    for case in track(cases, "evaluate"):
        image, truth = read_case(case, num_labels)
        image_preprocessing = for_image(preprocessing, image.pixels)
        for number, (pixels, labels) in enumerate(zip(image.pixels, truth, strict=True)):
            name = case.name if len(truth) == 1 else f"{case.name}, slice {number}"
            spacing = image.spacing_in_plane
            yield (
                name,
                prepare(pixels, image_preprocessing, spacing),
                prepare_labels(labels, image_preprocessing, spacing),
            )


def _grouped(
    slices: Iterator[tuple[str, np.ndarray, np.ndarray]], size: int
) -> Iterator[list[tuple[str, np.ndarray, np.ndarray]]]:
    group: list[tuple[str, np.ndarray, np.ndarray]] = []
    for slice_ in slices:
        group.append(slice_)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _mean(values: Sequence[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None
