"""Score a network on a labelled data set, at the images' own resolution and case by case."""

from collections.abc import Sequence
from dataclasses import dataclass

from medseg_trt.errors import InputError
from medseg_trt.metrics import ClassScore, MeanScore, mean_scores, scores
from medseg_trt.progress import track
from medseg_trt.segment import Run, segment
from medseg_trt.spec import Classes, Preprocessing
from medseg_trt.train.datasets.folder import Case, read_case

PIXELS = (1.0, 1.0, 1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class CaseScores:
    """The scores of one case, a picture or a volume."""

    case: str
    scores: tuple[ClassScore, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """The scores of a network on a split."""

    cases: tuple[CaseScores, ...]
    means: tuple[MeanScore, ...]  # by class, over the cases that have it
    hd95_unit: str | None = None  # "mm" or "pixels", where HD95 was measured

    @property
    def mean_dice(self) -> float:
        """The mean over the classes that occur, 0 … 1; 0 where none does."""
        found = [mean.dice for mean in self.means if mean.dice is not None]
        return sum(found) / len(found) if found else 0.0


def evaluate(
    run: Run,
    cases: Sequence[Case],
    preprocessing: Preprocessing,
    classes: Classes,
    batch: int = 8,
    hd95: bool = False,
) -> Evaluation:
    """Segment every case and compare it with its mask.

    Args:
        run: the network: (batch, 3, H, W) float32 to logits.
        cases: the cases of a split.
        preprocessing: the contract the network was trained with.
        classes: its labels.
        batch: how many slices go through the network at once.
        hd95: also measure HD95: in millimetres where all images have a spacing, in pixels where none has.

    Raises:
        InputError: a file cannot be read or does not fit the classes; or for HD95 only some images have a spacing.
    """
    scored: list[CaseScores] = []
    units: set[str] = set()
    for case in track(cases, "evaluate"):
        image, truth = read_case(case, len(classes.names))
        prediction = segment(run, image, preprocessing, batch)
        spacing = (image.spacing_mm or PIXELS) if hd95 else None
        if len(truth) == 1:  # a picture: its surface is its outline
            prediction, truth, spacing = prediction[0], truth[0], spacing and spacing[1:]
        scored.append(CaseScores(case=case.name, scores=scores(prediction, truth, classes, spacing)))
        units.add("pixels" if image.spacing_mm is None else "mm")
    if hd95 and len(units) > 1:
        raise InputError("some images have a spacing and some have none, so HD95 has no common unit; leave it out")
    unit = units.pop() if hd95 and units else None
    return Evaluation(cases=tuple(scored), means=mean_scores([case.scores for case in scored]), hd95_unit=unit)
