"""Slices go through the network in batches and come back in order, on the image's own pixels."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from medseg_trt.imaging.images import Image
from medseg_trt.imaging.preprocess import prepare, prepare_labels, restore
from medseg_trt.imaging.segment import prepared_slices, segment
from medseg_trt.spec import Preprocessing

P = Preprocessing(image_size=(32, 48), window=(0.0, 100.0))
NUM_CLASSES = 7


def generated(num_slices: int = 11, size: tuple[int, int] = (13, 21), spacing_mm=None) -> Image:
    """Return noise, other in every slice."""
    pixels = 100 * np.random.default_rng(0).random((num_slices, *size, 1), dtype=np.float32)
    return Image(path=Path("generated.nii"), pixels=pixels, spacing_mm=spacing_mm)


def levels(inputs: np.ndarray) -> np.ndarray:
    """Answer every pixel with the seventh of the window that its value lies in."""
    return -np.abs(inputs[:, :1] * NUM_CLASSES - 0.5 - np.arange(NUM_CLASSES).reshape(1, -1, 1, 1)).astype(np.float32)


@pytest.mark.parametrize("batch", [1, 2, 4, 11, 100])
def test_the_batch_size_changes_no_label(batch):
    image = generated()
    sizes = []

    def run(inputs: np.ndarray) -> np.ndarray:
        sizes.append(len(inputs))
        return levels(inputs)

    one_by_one = [
        restore(levels(prepare(pixels, P, None)[np.newaxis])[0], (13, 21), P, None) for pixels in image.pixels
    ]
    assert len({slice_labels.tobytes() for slice_labels in one_by_one}) == 11
    np.testing.assert_array_equal(segment(run, image, P, batch), one_by_one)
    assert sum(sizes) == 11
    assert max(sizes) <= batch


@pytest.mark.parametrize("batch", [1, 2, 4, 100])
def test_an_images_own_window_is_that_of_the_whole_image_whatever_the_batch(batch):
    """The slices are of ever higher values, so that the window of a batch would be another."""
    size = (32, 48)  # the network's, so that nothing is resized
    image = generated(size=size)
    image.pixels[:] += 1000 * np.arange(11, dtype=np.float32).reshape(-1, 1, 1, 1)
    low, high = image.pixels.min(), image.pixels.max()
    seen: list[np.ndarray] = []

    def run(inputs: np.ndarray) -> np.ndarray:
        seen.extend(inputs[:, 0])
        return levels(inputs)

    segment(run, image, replace(P, own_window=True), batch)
    expected = (image.pixels[..., 0].astype(np.float64) - low) / (np.float64(high) - low)
    np.testing.assert_allclose(seen, expected, atol=1e-6)  # a few roundings of float32, of values up to 1
    assert seen[0].max() < 0.01
    assert seen[-1].min() > 0.99 - 0.01


def test_segment_keeps_the_order_of_slices():
    image = generated(num_slices=NUM_CLASSES)
    image.pixels[:] = (np.arange(NUM_CLASSES).reshape(-1, 1, 1, 1) + 0.5) * 100 / NUM_CLASSES
    labels = segment(levels, image, P, batch=3)
    np.testing.assert_array_equal(labels, np.broadcast_to(np.arange(NUM_CLASSES).reshape(-1, 1, 1), labels.shape))


def test_the_spacing_in_the_plane_places_the_slice():
    spacing_mm = (9.0, 4.0, 0.5)  # slices, rows, columns
    p = Preprocessing(image_size=(32, 48), window=(0.0, 1.0), spacing_mm=1.0)
    truth = np.zeros((2, 10, 40), np.uint8)
    truth[0, 2:8, 10:30], truth[1, 4:6, :] = 1, 1
    image = Image(path=Path("generated.nii"), pixels=truth[..., np.newaxis], spacing_mm=spacing_mm)
    inputs = prepared_slices(image, p)
    assert inputs.shape == (2, 3, 32, 48)
    for index, labels in enumerate(truth):
        expected = prepare_labels(labels, p, (4.0, 0.5))
        assert ((inputs[index, 0] > 0.5) == expected).mean() > 0.97  # the rim
    segmented = segment(lambda inputs: inputs[:, :1] - np.float32(0.5), image, p, batch=2)
    inside = slice(1, 9)  # 10 rows of 4 mm are more than 32 mm
    np.testing.assert_array_equal(segmented[:, inside], truth[:, inside])
    assert not segmented[:, [0, 9]].any()


@pytest.mark.parametrize("answered", [0, 1, 3])
def test_segment_refuses_a_wrong_number_of_network_outputs(answered):
    with pytest.raises(ValueError, match=f"returned {answered} outputs for 2 slices"):
        segment(lambda inputs: np.zeros((answered, 1, 32, 48), np.float32), generated(2), P, batch=2)


def test_progress_is_shown_under_the_label(monkeypatch):
    shown = []

    def track(items, label):
        shown.append((label, len(items)))
        return items

    monkeypatch.setattr("medseg_trt.imaging.segment.track", track)
    unlabelled = segment(levels, generated(), P, batch=2)
    assert not shown
    np.testing.assert_array_equal(segment(levels, generated(), P, 2, "scan.nii"), unlabelled)
    assert shown == [("scan.nii", 6)]
