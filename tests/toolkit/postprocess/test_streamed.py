"""Post-processing band by band has the bytes of post-processing the whole slice."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from learnt_steps import CLASSES, post_of, steps_of
from scipy import ndimage

from medseg_trt.postprocess import streamed
from medseg_trt.postprocess.apply import postprocess, unsuited
from medseg_trt.postprocess.steps import Postprocessing
from medseg_trt.postprocess.streamed import postprocessed_bands

SIZE = (61, 47)
SPACING = (0.5, 0.25)


def labels_of(seed: int, smooth: float) -> np.ndarray:
    """Return blobs of two classes, some of which touch the border or enclose others; without smoothing, noise."""
    noise = np.random.default_rng(seed).standard_normal(SIZE)
    noise = ndimage.gaussian_filter(noise, smooth) if smooth else noise
    return np.digitize(noise / noise.std(), [-0.2, 0.7]).astype(np.uint8)


def bands_of(labels: np.ndarray, seed: int) -> Iterator[np.ndarray]:
    """Yield the rows in bands of different heights, down to one."""
    ends = np.unique([*np.random.default_rng(seed).integers(1, len(labels), 9), len(labels)])
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        yield labels[start:end]


def both(post: Postprocessing, labels: np.ndarray, seed: int, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    whole = postprocess(labels[np.newaxis], post, CLASSES, (1.0, *SPACING))[0]
    bands = postprocessed_bands(bands_of(labels, seed), SIZE, post, CLASSES, SPACING, folder, "a")
    return np.concatenate([*bands]), whole


STEPS = {
    "largest": (steps_of(largest=True),),
    "small ones": (steps_of(min_size=0.6),),
    "holes": (steps_of(fill_holes=True),),
    "all of one": (steps_of(largest=True, min_size=0.3, fill_holes=True),),
    "two classes": (steps_of(min_size=0.4, fill_holes=True), steps_of("bar", largest=True, fill_holes=True)),
    "the other way": (steps_of("bar", min_size=0.4, fill_holes=True), steps_of(largest=True, fill_holes=True)),
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("smooth", [0, 0.8, 2.0])
@pytest.mark.parametrize("rows", [1, 7, 128])
def test_streamed_post_processing_equals_the_whole_image(name, smooth, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(streamed, "MAX_ROWS", rows)
    changed = 0
    for seed in range(8):
        labels = labels_of(seed, smooth)
        banded, whole = both(post_of(*STEPS[name], kind="image", unit="mm2"), labels, seed, tmp_path)
        np.testing.assert_array_equal(banded, whole)
        changed += int((whole != labels).sum())
    assert changed > 0
    assert not [*tmp_path.iterdir()]


def test_a_spiral_is_one_component_and_encloses_nothing(tmp_path, monkeypatch):
    """Pieces that are joined late, and many times, keep one number; the way out of a spiral is no hole."""
    monkeypatch.setattr(streamed, "MAX_ROWS", 1)
    labels = np.zeros(SIZE, np.uint8)
    for inset in range(0, 24, 4):
        labels[inset, inset : SIZE[1] - inset] = 1
        labels[inset : SIZE[0] - inset, SIZE[1] - 1 - inset] = 1
        labels[SIZE[0] - 1 - inset, inset : SIZE[1] - inset] = 1
        labels[inset + 4 : SIZE[0] - inset, inset] = 1
        labels[inset + 4, inset : inset + 5] = 1
    post = post_of(steps_of(largest=True, fill_holes=True), kind="image", unit="share")
    banded, whole = both(post, labels, 0, tmp_path)
    np.testing.assert_array_equal(banded, whole)
    np.testing.assert_array_equal(banded, labels)


def test_of_equal_components_the_first_stays(tmp_path):
    labels = np.zeros(SIZE, np.uint8)
    labels[[40, 3, 3], [4, 30, 9]] = 1
    banded, whole = both(post_of(steps_of(largest=True), kind="image", unit="share"), labels, 1, tmp_path)
    assert np.argwhere(banded).tolist() == [[3, 9]]
    np.testing.assert_array_equal(banded, whole)


def test_a_mask_with_too_many_components_stays_raw_and_is_named(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(streamed, "MAX_COMPONENTS", 20)
    labels = labels_of(0, 0)
    post = post_of(steps_of(largest=True), kind="image", unit="share")
    bands = postprocessed_bands(bands_of(labels, 0), SIZE, post, CLASSES, None, tmp_path, "a.svs")
    np.testing.assert_array_equal(np.concatenate([*bands]), labels)
    assert "a.svs is not post-processed: its mask has more than 20 components" in caplog.text


@pytest.mark.parametrize(
    ("steps", "unit", "is_left_out"),
    [
        (steps_of(largest=True), "mm2", True),
        (steps_of(min_size=0.1), "share", True),
        (steps_of(min_size=0.1), "mm2", False),
        (steps_of(fill_holes=True), "share", False),
    ],
)
def test_steps_that_depend_on_the_size_of_the_image_leave_much_larger_ones_raw(steps, unit, is_left_out):
    post = post_of(steps, kind="image", unit=unit)
    reason = unsuited(post, 1, (900, 400), True, trained_side=200.0)
    assert reason == ("its sides are 3.0 times those of the training images, on which the steps were learnt"
                      if is_left_out else None)  # fmt: skip
    assert unsuited(post, 1, (900, 400), True, trained_side=300.0) is None
    assert unsuited(post, 1, (900, 400), True) is None
