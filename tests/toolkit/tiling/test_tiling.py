"""Windows and their blending: MONAI is the oracle; pointwise and small networks show the seams."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.inferers.utils import sliding_window_inference
from scipy import ndimage
from window_networks import CONTRACT, WINDOW, convolved, pointwise

from medseg_trt.errors import UsageError
from medseg_trt.imaging.formats.limits import MAX_PIXELS
from medseg_trt.imaging.images import Image
from medseg_trt.imaging.preprocess import labels_of, prepare
from medseg_trt.imaging.segment import segment
from medseg_trt.tiling.blend import blended_rows
from medseg_trt.tiling.segment import label_rows, labels_of_windows, tiled, window_inputs
from medseg_trt.tiling.windows import Tiles, num_windows, starts, weights, window_size
from medseg_trt.window_spec import LARGEST


def positioned(batch: np.ndarray) -> np.ndarray:
    """Depend on where in a window a pixel lies, so that every weight shows."""
    rows, columns = np.indices(batch.shape[2:], np.float32)
    return pointwise(batch) + np.stack([np.sin(rows), np.cos(columns), rows * columns / 100])


def pixels_of(size, seed=0, channels=3):
    return np.random.default_rng(seed).integers(0, 256, (*size, channels)).astype(np.uint8)


def blended(run, pixels, window=WINDOW, overlap=0.25, batch=3):
    """Return the logits of an image at least a window large, in one array."""

    def prepared(windows):
        return run(
            np.stack([prepare(window, replace(CONTRACT, image_size=window.shape[:2]), None) for window in windows])
        )

    bands = list(blended_rows(prepared, lambda first, end: pixels[first:end], pixels.shape[:2], window, overlap, batch))
    assert [start for start, _ in bands] == np.cumsum([0, *(band.shape[1] for _, band in bands[:-1])]).tolist()
    return np.concatenate([band for _, band in bands], axis=1)


def monai(run, pixels, window=WINDOW, overlap=0.25):
    whole = prepare(pixels, replace(CONTRACT, image_size=pixels.shape[:2]), None)[np.newaxis]
    logits = sliding_window_inference(
        torch.from_numpy(whole), window, 3, lambda batch: torch.from_numpy(run(batch.numpy())), overlap, mode="gaussian"
    )
    assert isinstance(logits, torch.Tensor)
    return logits.numpy()[0]


@pytest.mark.parametrize("run", [pointwise, convolved, positioned])
@pytest.mark.parametrize(
    ("size", "overlap"), [((16, 24), 0.25), ((40, 61), 0.25), ((17, 90), 0.5), ((50, 25), 0.0), ((33, 30), 0.9)]
)
def test_blended_logits_are_those_of_monai(run, size, overlap):
    pixels = pixels_of(size)
    # float32 sums in another order: 1e-7 of logits up to 5
    np.testing.assert_allclose(blended(run, pixels, overlap=overlap), monai(run, pixels, overlap=overlap), atol=1e-5)


def test_one_pixel_offset_differs_from_monai_sliding_window():
    pixels = pixels_of((40, 61))
    moved = blended(lambda batch: np.roll(pointwise(batch), 1, axis=3), pixels)
    assert np.abs(moved - monai(pointwise, pixels)).max() > 0.1


def test_pointwise_networks_have_no_seams():
    pixels = pixels_of((70, 55))
    whole = prepare(pixels, replace(CONTRACT, image_size=(70, 55)), None)[np.newaxis]
    np.testing.assert_allclose(blended(pointwise, pixels), pointwise(whole)[0], atol=1e-5)


def test_a_convolution_is_exact_where_every_windows_edge_is_farther_than_its_radius():
    pixels = pixels_of((70, 55))
    whole = convolved(prepare(pixels, replace(CONTRACT, image_size=(70, 55)), None)[np.newaxis])[0]
    difference = np.abs(blended(convolved, pixels) - whole).max(axis=0)
    near = np.zeros((70, 55), bool)
    for axis, (length, window) in enumerate(zip((70, 55), WINDOW, strict=True)):
        for start in starts(length, window, 0.25):
            for edge in (start, start + window - 1):  # the image's own edge has zeros beyond it either way
                if 0 < edge < length - 1:
                    near[(slice(None),) * axis + (edge,)] = True
    assert difference[~near].max() < 1e-5
    assert difference[near].max() > 1e-2


def test_every_pixel_is_covered_and_windows_stay_inside():
    for length in range(16, 80):
        first = starts(length, 16, 0.25)
        covered = np.zeros(length, bool)
        for start in first:
            assert 0 <= start <= length - 16
            covered[start : start + 16] = True
        assert covered.all()
        assert first == sorted(set(first))


def test_window_weights_lie_between_0_001_and_1():
    assert weights((64, 64)).min() == pytest.approx(1e-3)
    assert weights((64, 64)).max() <= 1


def image_of(pixels, spacing=None):
    return Image(path=Path("a.png"), pixels=pixels[np.newaxis], spacing_mm=spacing)


@pytest.mark.parametrize("size", [(70, 55), (10, 55), (9, 11)])
def test_tiled_labels_of_a_pointwise_network_equal_the_untiled_image(size):
    pixels = pixels_of(size)
    image = image_of(pixels)
    labels = segment(pointwise, image, CONTRACT, 1, pixels_to_masks=tiled(pointwise, image, CONTRACT, Tiles()))
    whole = prepare(pixels, replace(CONTRACT, image_size=size), None)[np.newaxis]
    np.testing.assert_array_equal(labels[0], labels_of(pointwise(whole)[0]))


def test_windows_of_another_size_are_resized_to_the_network_and_back():
    smooth = np.asarray(ndimage.zoom(np.random.default_rng(0).uniform(0, 255, (6, 6)), 20, order=1))[..., np.newaxis]
    image = image_of(smooth.astype(np.float32))
    seen = []

    def recorded(batch):
        seen.append(batch.shape)
        return np.stack([batch[:, 0] - 0.5, 0.5 - batch[:, 0]], axis=1)

    labels = tiled(recorded, image, CONTRACT, Tiles(size=48))(image.pixels)[0]
    assert {shape[1:] for shape in seen} == {(3, *WINDOW)}
    assert (labels == (smooth[..., 0] < 127.5)).mean() > 0.97  # 48 pixels in 16 rows and 24 columns, and back


def test_a_window_covers_the_field_of_view_where_there_is_a_spacing():
    spaced = replace(CONTRACT, spacing_mm=2.0)
    assert window_size(Tiles(), spaced, (1.0, 0.5)) == (32, 96)
    assert window_size(Tiles(), spaced, None) == WINDOW
    assert window_size(Tiles(size=30), spaced, (1.0, 0.5)) == (30, 30)


def test_impossible_tiles_are_refused():
    with pytest.raises(ValueError, match="impossible"):
        Tiles(size=0)
    for overlap in (1.0, -0.1):
        with pytest.raises(ValueError, match="must be from 0"):
            Tiles(overlap=overlap)
    image = image_of(pixels_of((40, 40)))
    with pytest.raises(UsageError, match="leave --tile out"):
        tiled(pointwise, image, replace(CONTRACT, resize="spline3"), Tiles())


@pytest.mark.slow
def test_memory_depends_on_the_row_of_windows_for_a_large_image():
    """4,000 x 4,000 pixels and 9 classes: all logits would take 576 MB, a row of windows of 256 takes 37 MB."""
    import tracemalloc

    size = (4000, 4000)
    pixels = pixels_of(size, channels=1)

    def nine(windows):
        grey = windows[..., 0].astype(np.float32)
        return np.stack([np.sin(grey * number) for number in range(9)], axis=1)

    tracemalloc.start()
    labels = np.empty(size, np.uint8)
    for start, logits in blended_rows(nine, lambda first, end: pixels[first:end], size, (256, 256), 0.25, 4):
        labels[start : start + logits.shape[1]] = labels_of(logits)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(labels[::97], labels_of(nine(pixels[np.newaxis])[0])[::97])
    assert peak < 16e6 + 6 * 37e6  # the mask, and sums, quotients and copies of a row of windows


@pytest.mark.parametrize("size", [0, 16385, 10**20])
def test_windows_larger_than_any_image_are_refused(size):
    with pytest.raises(ValueError, match="are impossible; give 1 to 16384"):
        Tiles(size=size)
    assert LARGEST**2 == MAX_PIXELS


@pytest.mark.parametrize(("size", "window"), [((70, 55), WINDOW), ((10, 55), WINDOW), ((9, 11), (16, 30))])
def test_windows_that_are_cut_beforehand_give_the_same_labels(size, window):
    pixels, tiles = pixels_of(size), Tiles(overlap=0.5)
    inputs = window_inputs(pixels, CONTRACT, window, tiles.overlap)
    seen = []

    def recorded(batch):
        seen.extend(batch)
        return pointwise(batch)

    rows = label_rows(recorded, lambda first, end: pixels[first:end], size, CONTRACT, window, tiles.overlap)
    expected = np.concatenate([labels for _, labels in rows])
    np.testing.assert_array_equal(inputs, np.stack(seen))
    assert len(inputs) == num_windows(size, window, tiles.overlap)
    np.testing.assert_array_equal(labels_of_windows(pointwise(inputs), size, window, tiles.overlap), expected)
    moved = labels_of_windows(pointwise(inputs[::-1]), size, window, tiles.overlap)
    assert (len(inputs) == 1) == np.array_equal(moved, expected)  # a wrong order of windows would show
