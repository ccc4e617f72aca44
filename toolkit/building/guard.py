"""Learn a bundle's guard against images unlike the training's."""

from collections.abc import Iterator

from medseg_trt.building.reference import Reference
from medseg_trt.building.spread_slices import evenly_spread
from medseg_trt.guard.guard import Guard
from medseg_trt.guard.learn import MIN_SLICES, learn_guard
from medseg_trt.imaging.images import Image
from medseg_trt.progress import LOG, track
from medseg_trt.train.datasets.folder import Case, read_case_image

TRAINING, HELD_OUT = "train", "val"
MAX_CASES = 128  # of a split, evenly spread: reading all of a large data set would take longer than the build


def guard_of(reference: Reference) -> Guard | None:
    """Return the guard of the labelled data of a build; None, with the reason, where it has none.

    Raises:
        InputError: an image cannot be read.
    """
    folder = reference.images.labelled
    if folder is None or not all(folder.splits.get(split) for split in (TRAINING, HELD_OUT)):
        LOG.info("infer will not compare images with the training images: there are no training and validation images")
        return None
    training, held_out = (_images(folder.cases(split), split) for split in (TRAINING, HELD_OUT))
    guard = learn_guard(training, held_out, reference.contract.preprocessing)
    if guard is None:
        needed = f"the guard needs {MIN_SLICES} slices or more for training and as many for validation"
        LOG.info("infer will not compare images with the training images: %s", needed)
    else:
        LOG.info("guard against images unlike the training images: %s", guard.text())
    return guard


def _images(cases: tuple[Case, ...], split: str) -> Iterator[Image]:
    chosen = [cases[index] for index in evenly_spread(len(cases), MAX_CASES)]
    return map(read_case_image, track(chosen, f"look at the images of {split}"))
