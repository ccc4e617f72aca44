"""Generated 2-D images and volumes for the tests of reading and writing; Pillow and nibabel write them."""

import itertools
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import PIL.Image
from tiny import write_nifti

from medseg_trt.imaging.images import Image, read_image

RNG = np.random.default_rng(0)
SHAPE = (3, 4, 5)  # slices, rows, columns: all different, so that no two axes can be confused
SPACING_MM = (3.0, 1.5, 2.0)
ORIENTATIONS = [(p, f) for p in itertools.permutations(range(3)) for f in itertools.product([False, True], repeat=3)]
LPS_AFFINE = np.array([[-2.0, 0, 0, 31], [0, -1.5, 0, -12], [0, 0, 3, 7], [0, 0, 0, 1]])  # of (column, row, slice)


def reoriented(
    values: np.ndarray, permutation: tuple[int, ...], flips: tuple[bool, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Store (slice, row, column) values with permuted and flipped axes (column, row, slice); return the affine too."""
    stored = values.transpose(2, 1, 0).transpose(permutation)
    to_lps = np.zeros((4, 4))
    to_lps[3, 3] = 1
    for axis, (source, flip) in enumerate(zip(permutation, flips, strict=True)):
        to_lps[source, axis] = -1 if flip else 1
        to_lps[source, 3] = stored.shape[axis] - 1 if flip else 0
    return np.flip(stored, tuple(axis for axis, flip in enumerate(flips) if flip)), LPS_AFFINE @ to_lps


def load(path: Path) -> Any:
    return nibabel.load(path)


def stored_values(path: Path) -> np.ndarray:
    return np.asanyarray(load(path).dataobj)


def save_volume(path: Path, stored: np.ndarray, affine: np.ndarray, codes=(1, 2), kind=nibabel.Nifti1Image) -> Path:
    volume = kind(np.ascontiguousarray(stored), affine)
    for set_form, code in zip((volume.set_qform, volume.set_sform), codes, strict=True):
        set_form(affine if code else None, code)
    nibabel.save(volume, path)
    return path


def some_labels(shape=SHAPE, count=3) -> np.ndarray:
    return RNG.integers(0, count, shape, dtype=np.uint8)


def colours(height: int = 6, width: int = 9) -> PIL.Image.Image:
    return PIL.Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))


def save(image: PIL.Image.Image, path: Path) -> Path:
    image.save(path)
    return path


def save_array(values: np.ndarray, path: Path) -> Path:
    return save(PIL.Image.fromarray(values), path)


def opened(path: Path) -> PIL.Image.Image:
    """Return Pillow's picture, with its file closed."""
    with PIL.Image.open(path) as image:
        image.load()
        return image.copy()


def picture_image(folder: Path, size=(6, 9)) -> Image:
    return read_image(save_array(np.zeros(size, np.uint8), folder / "picture.png"))


def volume_image(folder: Path) -> Image:
    return read_image(write_nifti(folder / "volume.nii", np.zeros((5, 4, 3), np.int16)))
