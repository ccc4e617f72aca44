"""Choose the images of a build: what it is verified on, what its masks are judged on, and what calibrates it.

They are real where real ones can be had, there is a record of what they were, and no image serves for calibration and
for judgement.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int64, UInt8
from numpy import ndarray

from medseg_trt.building.spread_slices import Inputs, SpreadSlice, evenly_spread, spread_inputs, spread_slices
from medseg_trt.errors import InputError, UsageError
from medseg_trt.export.verify import noise
from medseg_trt.imaging.digest import image_digests
from medseg_trt.imaging.images import Image, Source, find_images, read_image
from medseg_trt.imaging.preprocess import Size, restore
from medseg_trt.metrics.overlap import confusion
from medseg_trt.progress import LOG
from medseg_trt.spec import Preprocessing
from medseg_trt.tiling.segment import labels_of_windows
from medseg_trt.tiling.windows import num_windows
from medseg_trt.train.checkpoint import Checkpoint
from medseg_trt.train.datasets.folder import (
    SPLIT_SEED,
    Case,
    DataFolder,
    manifest_sha256,
    read_case,
    read_case_image,
)
from medseg_trt.train.datasets.official import is_labelled
from medseg_trt.train.datasets.splits import split_files
from medseg_trt.train.recorded_data import open_recorded

MAX_VERIFIED = 8
MAX_JUDGED = 64
MAX_JUDGED_WINDOWS = 256  # of all slices: the network runs on each of them for every graph
MAX_CALIBRATION = 32
SECOND_SPLIT = "test"  # judged besides the validation split where a replacement of the block is chosen
NOISE_SPACINGS = (1.3, 0.8)  # of rows and columns, in the network's: rows are cropped, columns padded


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgedImages:
    """Slices whose masks are compared at their own size.

    ``inputs`` are one of every slice or, with ``windows``, as many as each slice is cut into.
    """

    inputs: Inputs
    sizes: tuple[Size, ...]
    spacings: tuple[tuple[float, float] | None, ...]
    cases: tuple[str, ...]  # the case of each slice
    truths: tuple[UInt8[ndarray, "_ _"], ...] | None  # None: nobody has drawn masks, the reference's are the truth
    reference: str = "PyTorch"  # name of the network that is the reference
    windows: tuple[Size, ...] | None = None  # of each slice, in its pixels; None: slices are resized as a whole
    overlap: float = 0.0  # of windows

    @property
    def metric(self) -> str:
        """What the scores of these images are."""
        return "Dice" if self.truths is not None else f"agreement with {self.reference} in Dice"

    def masks(
        self, logits: Float32[ndarray, "images classes height width"], preprocessing: Preprocessing
    ) -> list[ndarray]:
        """Return the labels of every slice at its own size; logits of windows are blended, as in ``infer``."""
        if self.windows is not None:
            return list(self._blended(logits, self.windows))
        slices = zip(logits, self.sizes, self.spacings, strict=True)
        return [restore(of_slice, size, preprocessing, spacing) for of_slice, size, spacing in slices]

    def _blended(self, logits: ndarray, windows: tuple[Size, ...]) -> Iterator[ndarray]:
        first = 0
        for size, window in zip(self.sizes, windows, strict=True):
            count = num_windows(size, window, self.overlap)
            yield labels_of_windows(logits[first : first + count], size, window, self.overlap)
            first += count

    def counts(
        self, masks: Sequence[ndarray], reference_masks: Sequence[ndarray], num_labels: int
    ) -> Int64[ndarray, "images classes 3"]:
        """Count the pixels of every class but the background in every slice: right, in the mask, in the truth.

        Without drawn masks, the reference's are the truth.
        """
        truths = self.truths or reference_masks
        matrices = [confusion(mask, truth, num_labels) for mask, truth in zip(masks, truths, strict=True)]
        return np.array([np.stack([m.diagonal(), m.sum(axis=0), m.sum(axis=1)], axis=1)[1:] for m in matrices])


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceImages:
    """The images of a build."""

    verified: Inputs  # a few, for the comparison of logits
    description: str  # which they are, and whether they are real
    judged: JudgedImages
    calibration: Inputs | None  # None where there are no images to spare
    labelled: DataFolder | None = None  # that they are of; None for noise and for images without masks


def reference_images(checkpoint: Checkpoint, data: Path | None) -> ReferenceImages:
    """Return images of the validation split to verify and judge on, and of the training split to calibrate on.

    Args:
        checkpoint: its preprocessing is used, and without ``data`` the folder that it was trained on, if that is still
            what it was; else seeded noise, with a warning.
        data: a data folder, or a folder of images without masks: then the reference's masks are the truth.

    Raises:
        InputError: ``data`` cannot be used.
        UsageError: an image is in both splits.
    """
    if data is not None and not is_labelled(data):
        return _unlabelled(checkpoint, data)
    folder = _labelled_folder(checkpoint, data)
    if folder is None:
        return _noise(checkpoint)
    names = (folder.classes.names, checkpoint.classes.names)
    if names[0] != names[1]:
        raise UsageError(f"{folder.root} has the classes {', '.join(names[0])}, the checkpoint {', '.join(names[1])}")
    split = "val" if folder.splits.get("val") else "train"
    cases = folder.cases(split)
    read = ((case.name, *read_case(case, len(checkpoint.classes.names))) for case in cases)
    judged = _judged(checkpoint, read, -(-MAX_JUDGED // len(cases)), folder.name)
    calibration = _calibration_inputs(checkpoint, folder.cases("train")) if split == "val" else None
    return replace(_checked(judged, calibration, f"of {folder.name}, split {split}"), labelled=folder)


def second_judged_images(checkpoint: Checkpoint, data: Path | None) -> JudgedImages | None:
    """Return slices of the test split, where the data folder has a validation split besides; None elsewhere.

    Raises:
        InputError: ``data`` cannot be used, or every image of the split is of one grey.
    """
    folder = _labelled_folder(checkpoint, data)
    if folder is None or not folder.splits.get("val") or not folder.splits.get(SECOND_SPLIT):
        return None
    cases = folder.cases(SECOND_SPLIT)
    read = ((case.name, *read_case(case, len(checkpoint.classes.names))) for case in cases)
    return _judged(checkpoint, read, -(-MAX_JUDGED // len(cases)), folder.name)


def block_fitting_cases(checkpoint: Checkpoint, data: Path | None) -> tuple[Case, ...]:
    """Return the training cases that no judged image is of; empty where there are none.

    Raises:
        InputError: ``data`` cannot be used.
    """
    if data is not None and not is_labelled(data):
        calibrating, _ = _halves(data)
        return tuple(Case(image=source, mask=source) for source in calibrating)
    folder = _labelled_folder(checkpoint, data)
    return folder.cases("train") if folder is not None and folder.splits.get("val") else ()


def _labelled_folder(checkpoint: Checkpoint, data: Path | None) -> DataFolder | None:
    if data is not None:
        return open_recorded(data, checkpoint.provenance) if is_labelled(data) else None
    return _recorded_folder(checkpoint)


def _noise(checkpoint: Checkpoint) -> ReferenceImages:
    """Return noise that stands for images of the network's size; with a fixed spacing, for cropped and padded ones.

    A network that sees windows gets one of every image.
    """
    inputs, preprocessing = noise(checkpoint.spec.image_size), checkpoint.preprocessing
    spacing_mm = preprocessing.spacing_mm if preprocessing.windows is None else None
    spacing = None if spacing_mm is None else (NOISE_SPACINGS[0] * spacing_mm, NOISE_SPACINGS[1] * spacing_mm)
    judged = JudgedImages(
        inputs=inputs,
        sizes=(checkpoint.spec.image_size,) * len(inputs),
        spacings=(spacing,) * len(inputs),
        cases=("noise",) * len(inputs),
        truths=None,
    )
    return ReferenceImages(verified=inputs, description="generated noise", judged=judged, calibration=None)


def _checked(judged: JudgedImages, calibration: Inputs | None, origin: str) -> ReferenceImages:
    shared = (
        set(image_digests(judged.inputs)) & set(image_digests(calibration)) if calibration is not None else set[str]()
    )
    if shared:
        raise UsageError(
            f"{len(shared)} of the images {origin} are also calibration images, so they cannot judge the result; "
            "remove the copies, or give other splits in dataset.json"
        )
    varied = np.flatnonzero(np.ptp(judged.inputs, axis=(2, 3)).any(axis=1))  # windows may be of one grey
    verified = judged.inputs[varied[evenly_spread(len(varied), MAX_VERIFIED)]]
    kind = "real images" if judged.windows is None else f"windows of {len(judged.sizes)} real images"
    return ReferenceImages(
        verified=verified, description=f"{len(verified)} {kind} {origin}", judged=judged, calibration=calibration
    )


def _judged(
    checkpoint: Checkpoint, cases: Iterator[tuple[str, Image, ndarray | None]], per_case: int, name: str
) -> JudgedImages:
    """Take up to ``per_case`` slices of every case, with their labels where there are some."""
    slices = _within_limits(list(spread_slices(checkpoint.preprocessing, cases, per_case))[:MAX_JUDGED])
    if not slices:
        raise InputError(f"every validation image of {name} is of one grey; there is nothing to judge masks on")
    truths = tuple(item.labels for item in slices if item.labels is not None)
    windows = tuple(item.window for item in slices if item.window is not None)
    recorded = checkpoint.preprocessing.windows
    return JudgedImages(
        inputs=np.concatenate([item.inputs() for item in slices]),
        sizes=tuple(item.size for item in slices),
        spacings=tuple(item.spacing for item in slices),
        cases=tuple(item.case for item in slices),
        truths=truths or None,
        windows=windows or None,
        overlap=0.0 if recorded is None else recorded.overlap,
    )


def _within_limits(slices: Sequence[SpreadSlice]) -> Sequence[SpreadSlice]:
    """Leave out slices, evenly spread, until their windows are few enough; one is always kept."""
    kept = slices
    while len(kept) > 1 and sum(item.num_inputs for item in kept) > MAX_JUDGED_WINDOWS:
        kept = [slices[index] for index in evenly_spread(len(slices), len(kept) - 1)]
    return kept


def _unlabelled(checkpoint: Checkpoint, data: Path) -> ReferenceImages:
    calibrating, judging = _halves(data)
    LOG.warning("%s has no masks, so masks are compared with the unchanged network's, not with the truth", data)
    read = ((source.name, read_image(source), None) for source in judging)
    judged = _judged(checkpoint, read, -(-MAX_JUDGED // len(judging)), data.name)
    calibration = _calibration_inputs(checkpoint, [Case(image=source, mask=source) for source in calibrating])
    return _checked(judged, calibration, f"of {data.resolve().name}")


def _halves(data: Path) -> tuple[Sequence[Source], Sequence[Source]]:
    """Return the images of a folder without masks that calibrate, and those that are judged."""
    sources = find_images([data / "images" if (data / "images").is_dir() else data])
    return split_files(sources, SPLIT_SEED)


def _calibration_inputs(checkpoint: Checkpoint, cases: Sequence[Case]) -> Inputs | None:
    """Return slices, evenly spread over the cases."""
    chosen = [cases[index] for index in evenly_spread(len(cases), MAX_CALIBRATION)]
    read = ((case.name, read_case_image(case), None) for case in chosen)
    slices = list(spread_slices(checkpoint.preprocessing, read, -(-MAX_CALIBRATION // len(chosen))))
    inputs = [prepared for _, prepared in spread_inputs(slices, MAX_CALIBRATION)]
    return np.stack(inputs[:MAX_CALIBRATION]) if inputs else None


def _recorded_folder(checkpoint: Checkpoint) -> DataFolder | None:
    """Return the folder that the checkpoint was trained on, if it is there and unchanged."""
    recorded = checkpoint.provenance.data
    reason = "the network does not say what it was trained on"
    if recorded:
        reason = "where the training's data lie is not known here"
    if recorded and checkpoint.data_folder is not None:
        try:
            folder = open_recorded(checkpoint.data_folder, checkpoint.provenance)
            if manifest_sha256(folder.manifest()) == recorded.sha256:
                return folder
            reason = f"{folder.root} has changed since the training"
        except InputError as error:
            reason = str(error)
    LOG.warning("%s, so the bundle is verified on generated noise; give real images: --data DIR", reason)
    return None
