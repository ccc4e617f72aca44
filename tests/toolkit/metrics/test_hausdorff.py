import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy import ndimage

from medseg_trt.metrics.hausdorff import hd95, surface_points
from medseg_trt.metrics.overlap import mean_scores, scores
from medseg_trt.spec import Classes

SPACINGS = {2: (1.5, 0.7), 3: (3.0, 0.7, 1.1)}
ORGANS = Classes(names=("background", "a", "b"))


def blobs(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 3) > 0.02


def by_distance_transform(prediction: np.ndarray, truth: np.ndarray, spacing) -> tuple[np.ndarray, np.ndarray]:
    """Both directed surface distances, by erosion and an exact Euclidean distance transform."""
    structure = ndimage.generate_binary_structure(truth.ndim, 1)
    borders = [mask ^ ndimage.binary_erosion(mask, structure) for mask in (prediction, truth)]
    fields = [np.asarray(ndimage.distance_transform_edt(~border, sampling=spacing)) for border in borders]
    return fields[1][borders[0]], fields[0][borders[1]]


@pytest.mark.parametrize("shape", [(40, 50), (20, 30, 40), (1, 30, 30)])
@pytest.mark.parametrize("seed", range(3))
def test_the_distance_agrees_with_distance_transforms(shape, seed):
    prediction, truth = blobs(shape, seed), blobs(shape, seed + 100)
    there, back = by_distance_transform(prediction, truth, SPACINGS[len(shape)])
    pooled = np.percentile(np.concatenate([there, back]), 95)
    # Both are square roots of the same few float64 sums: 1e-13 seen.
    assert hd95(prediction, truth, SPACINGS[len(shape)]) == pytest.approx(pooled, abs=1e-9)


def test_hd95_differs_from_the_maximum_of_directed_percentiles():
    """The other definition in use, MONAI's; they differ where one outline has an island."""
    truth = blobs((40, 50), 0)
    prediction = truth.copy()
    prediction[:10, :10] = True
    directions = by_distance_transform(prediction, truth, (1.0, 1.0))
    pooled = np.percentile(np.concatenate(directions), 95)
    assert hd95(prediction, truth) == pytest.approx(pooled, abs=1e-9)
    assert max(np.percentile(distances, 95) for distances in directions) > pooled + 0.1


@pytest.mark.parametrize("shape", [(40, 50), (20, 30, 40)])
def test_hd95_equals_medpy(shape):
    medpy = pytest.importorskip("medpy.metric.binary", reason="medpy is not installed")
    prediction, truth = blobs(shape, 1), blobs(shape, 2)
    spacing = SPACINGS[len(shape)]
    assert hd95(prediction, truth, spacing) == pytest.approx(medpy.hd95(prediction, truth, spacing), abs=1e-9)
    assert hd95(prediction, truth) == pytest.approx(medpy.hd95(prediction, truth), abs=1e-9)


@pytest.mark.parametrize("shape", [(40, 50), (20, 30, 40)])
def test_surfaces_and_distances_are_monais(shape):
    with warnings.catch_warnings(action="ignore"):
        utils = pytest.importorskip("monai.metrics.utils", reason="monai is not installed")
        edges = utils.get_mask_edges(blobs(shape, 1), blobs(shape, 2), crop=False)
        spacing = list(SPACINGS[len(shape)])
        distances = [utils.get_surface_distance(*pair, spacing=spacing) for pair in (edges, edges[::-1])]
    expected = np.percentile(np.concatenate([np.asarray(values) for values in distances]), 95)
    # MONAI works in float32, which resolves 1e-6 of distances around 10.
    assert hd95(blobs(shape, 1), blobs(shape, 2), SPACINGS[len(shape)]) == pytest.approx(float(expected), abs=1e-5)


@settings(max_examples=60, deadline=None)
@given(arrays(bool, array_shapes(min_dims=1, max_dims=3, max_side=6)))
def test_a_surface_is_the_mask_without_its_erosion(mask):
    border = mask ^ ndimage.binary_erosion(mask, ndimage.generate_binary_structure(mask.ndim, 1))
    np.testing.assert_array_equal(surface_points(mask), np.argwhere(border))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_hd95_is_symmetric_none_for_empty_masks_and_zero_for_equal_masks(data):
    shape = data.draw(array_shapes(min_dims=2, max_dims=3, max_side=6))
    first, second = (data.draw(arrays(bool, shape)) for _ in range(2))
    distance = hd95(first, second)
    assert distance == hd95(second, first)
    assert (distance is None) == (not first.any() or not second.any())
    if first.any():
        assert hd95(first, first) == 0


def test_a_shift_is_measured_in_the_axis_own_spacing():
    mask = np.zeros((30, 30, 30), bool)
    mask[5:10, 5:10, 5:10] = True
    for axis, spacing in enumerate((5.0, 2.0, 1.0)):
        # Half of the surface of a cube that is shifted along one axis lies within it; its far face is 12 pixels away.
        assert hd95(mask, np.roll(mask, 12, axis), (5.0, 2.0, 1.0)) == pytest.approx(12 * spacing)


def test_wrong_arguments_are_refused():
    mask = np.ones((4, 4), bool)
    with pytest.raises(ValueError, match="the truth is"):
        hd95(mask, mask[:3])
    with pytest.raises(ValueError, match="3 spacings for 2 axes"):
        hd95(mask, mask, (1.0, 1.0, 1.0))


def test_scores_count_the_cases_without_a_distance():
    empty = np.zeros((16, 16), np.uint8)
    truth, prediction = empty.copy(), empty.copy()
    truth[2:6, 2:6] = 1
    prediction[2:6, 4:8] = 1
    alarm = np.where(prediction == 1, 2, 0).astype(np.uint8)
    cases = [scores(*pair, ORGANS, (2.0, 2.0)) for pair in ((prediction, truth), (empty, truth), (alarm, empty))]
    first, second = mean_scores(cases)
    assert first.hd95 == pytest.approx(hd95(prediction == 1, truth == 1, (2.0, 2.0)))
    assert (first.cases, first.missed, first.absent) == (2, 1, 1)
    assert (second.hd95, second.false_alarms, second.absent) == (None, 1, 2)
    assert all(score.hd95 is None for case in cases for score in case if score.state != "present")
    assert scores(prediction, truth, ORGANS)[0].hd95 is None  # it was not asked for
