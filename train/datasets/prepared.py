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
IMAGES, LABELS = "images.npy", "labels.npy"


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedSlices:
    """The slices of a split as the network takes them."""

    images: np.ndarray  # (slices, 3, height, width) float32, mapped from disk
    labels: np.ndarray  # (slices, height, width) uint8, mapped from disk
    slices_of_class: tuple[np.ndarray, ...]  # for every label that occurs, the slices that hold it


def mapped_slices(folder: Path, slices_of_class: tuple[np.ndarray, ...]) -> PreparedSlices:
    """Return the slices that ``prepare_slices`` has put into a folder, in whichever process."""
    images, labels = (np.load(folder / name, mmap_mode="r") for name in (IMAGES, LABELS))
    return PreparedSlices(images=images, labels=labels, slices_of_class=slices_of_class)


def prepare_slices(
    cases: Sequence[Case], preprocessing: Preprocessing, num_labels: int, folder: Path
) -> PreparedSlices:
    """Read, check and prepare every slice of ``cases`` into two files in ``folder``.

    Every mask is checked here, before anything is trained: a label out of range on a GPU ends in an error that names
    no file.

    Raises:
        InputError: a file cannot be used, or the disk is too full.
    """
    height, width = preprocessing.image_size
    total = sum(_num_slices(case, num_labels) for case in track(cases, "check the masks"))
    wanted = total * height * width * (3 * 4 + 1)
    folder.mkdir(parents=True, exist_ok=True)
    if wanted > shutil.disk_usage(folder).free:
        raise InputError(
            f"the disk of {folder} has no room for {wanted / 1e9:.1f} GB of prepared slices; choose another with -o"
        )
    images = np.lib.format.open_memmap(folder / IMAGES, "w+", np.float32, (total, 3, height, width))
    labels = np.lib.format.open_memmap(folder / LABELS, "w+", np.uint8, (total, height, width))
    holds = np.zeros((total, num_labels), bool)
    unscaled: list[str] = []
    index = 0
    for case in track(cases, "prepare the slices"):
        image, masks = read_case(case, num_labels)
        unscaled += _unlike_window(case, image.pixels, preprocessing)
        for pixels, mask in zip(image.pixels, masks, strict=True):
            images[index] = prepare(pixels, preprocessing, image.spacing_in_plane)
            labels[index] = prepare_labels(mask, preprocessing, image.spacing_in_plane)
            holds[index, np.unique(labels[index])] = True
            index += 1
    if unscaled:
        LOG.warning(
            '%d case(s) do not have values of 0 … 255, but the window does; set "window" in dataset.json: %s',
            len(unscaled), unscaled[0],
        )  # fmt: skip
    slices_of_class = tuple(np.flatnonzero(column) for column in holds.T if column.any())
    return PreparedSlices(images=images, labels=labels, slices_of_class=slices_of_class)


def _num_slices(case: Case, num_labels: int) -> int:
    image, _ = read_case(case, num_labels)
    return image.num_slices


def _unlike_window(case: Case, pixels: np.ndarray, preprocessing: Preprocessing) -> list[str]:
    """Name a case whose values are not those of an 8-bit picture though the window is: it turns all black or white."""
    low, high = pixels.min(), pixels.max()
    fits = pixels.dtype == np.uint8 or (low >= 0 and 1 < high <= EIGHT_BIT[1])
    if fits or preprocessing.window != EIGHT_BIT:
        return []
    return [f"{case.name} runs from {low:g} to {high:g}"]
