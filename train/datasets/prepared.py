"""All slices of a split, prepared once for the network and kept in files that every worker process maps."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medseg_trt.errors import InputError
from medseg_trt.preprocess import prepare, prepare_labels
from medseg_trt.progress import LOG, track
from medseg_trt.spec import Preprocessing
from medseg_trt.train.datasets.folder import Case, read_case

EIGHT_BIT = (0.0, 255.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedSlices:
    """The slices of a split as the network takes them."""

    images: np.ndarray  # (slices, 3, height, width) float32, mapped from disk
    labels: np.ndarray  # (slices, height, width) uint8, mapped from disk
    slices_of_class: tuple[np.ndarray, ...]  # for every label that occurs, the slices that hold it


def prepare_slices(
    cases: Sequence[Case], preprocessing: Preprocessing, num_labels: int, folder: Path
) -> PreparedSlices:
    """Read, check and prepare every slice of ``cases`` into two files in ``folder``.

    Every mask is checked here, before anything is trained: a label out of range on a GPU ends in an error that names
    no file.

    Raises:
        InputError: a file cannot be used, or the disk is too full.
    """
    counts = [_num_slices(case, num_labels) for case in track(cases, "check the masks")]
    height, width = preprocessing.image_size
    total = sum(counts)
    wanted = total * height * width * (3 * 4 + 1)
    folder.mkdir(parents=True, exist_ok=True)
    if wanted > shutil.disk_usage(folder).free:
        raise InputError(
            f"{folder} has no room for {wanted / 1e9:.1f} GB of prepared slices; choose another disk with -o"
        )
    images = np.lib.format.open_memmap(folder / "images.npy", "w+", np.float32, (total, 3, height, width))
    labels = np.lib.format.open_memmap(folder / "labels.npy", "w+", np.uint8, (total, height, width))
    index = 0
    for case in track(cases, "prepare the slices"):
        image, masks = read_case(case, num_labels)
        _warn_if_clipped(case, image.pixels, preprocessing)
        for pixels, mask in zip(image.pixels, masks, strict=True):
            images[index] = prepare(pixels, preprocessing, image.spacing_in_plane)
            labels[index] = prepare_labels(mask, preprocessing, image.spacing_in_plane)
            index += 1
    present = [np.flatnonzero((labels == label).any((1, 2))) for label in range(num_labels)]
    return PreparedSlices(images=images, labels=labels, slices_of_class=tuple(some for some in present if len(some)))


def _num_slices(case: Case, num_labels: int) -> int:
    image, _ = read_case(case, num_labels)
    return image.num_slices


def _warn_if_clipped(case: Case, pixels: np.ndarray, preprocessing: Preprocessing) -> None:
    if pixels.dtype != np.uint8 and preprocessing.window == EIGHT_BIT:
        LOG.warning(
            '%s: the values run from %g to %g, but the window is 0 … 255; set "window" in dataset.json',
            case.name, pixels.min(), pixels.max(),
        )  # fmt: skip
