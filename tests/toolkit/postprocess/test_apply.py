"""Post-processing against SciPy's labelling, one step at a time."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from learnt_steps import CLASSES, post_of, steps_of
from scipy import ndimage

from medseg_trt.imaging.images import Image
from medseg_trt.postprocess.apply import finisher, postprocess, unsuited

SPACING = (3.0, 2.0, 1.0)


@pytest.fixture(scope="module")
def labels():
    """Blobs of two classes in 3-D."""
    noise = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal((9, 40, 36)), 1.0)
    return np.digitize(noise, [0.15, 0.3]).astype(np.uint8)


def components(mask: np.ndarray) -> tuple[np.ndarray, int]:
    numbered = np.zeros(mask.shape, np.int32)
    count = ndimage.label(mask, np.ones((3, 3, 3)), output=numbered)
    assert isinstance(count, int)
    return numbered, count


def test_the_largest_component_is_scipys_and_other_classes_stay(labels):
    corrected = postprocess(labels, post_of(steps_of(largest=True)), CLASSES, SPACING)
    numbered, count = components(labels == 1)
    assert count > 3
    largest = 1 + np.argmax(ndimage.sum_labels(labels == 1, numbered, range(1, count + 1)))
    np.testing.assert_array_equal(corrected == 1, numbered == largest)
    np.testing.assert_array_equal(corrected == 2, labels == 2)


@pytest.mark.parametrize("pixels", [2, 9, 40])
def test_components_below_the_minimum_size_in_mm_are_removed(labels, pixels):
    size = pixels * float(np.prod(SPACING))
    corrected = postprocess(labels, post_of(steps_of(min_size=size)), CLASSES, SPACING)
    numbered, count = components(labels == 1)
    sizes = ndimage.sum_labels(labels == 1, numbered, range(count + 1))
    np.testing.assert_array_equal(corrected == 1, (sizes >= pixels)[numbered] & (numbered > 0))
    assert (sizes[1:] < pixels).any()


def test_touching_at_a_corner_is_one_component():
    labels = np.zeros((3, 4, 4), np.uint8)
    labels[0, 0, 0] = labels[1, 1, 1] = labels[2, 2, 2] = 1
    corrected = postprocess(labels, post_of(steps_of(largest=True)), CLASSES, SPACING)
    np.testing.assert_array_equal(corrected, labels)


def test_of_equal_components_the_first_stays():
    labels = np.zeros((1, 3, 7), np.uint8)
    labels[0, 1, [1, 5]] = 1
    post = post_of(steps_of(largest=True), kind="image", unit="share")
    corrected = postprocess(labels, post, CLASSES, None)
    assert np.argwhere(corrected).tolist() == [[0, 1, 1]]


def test_holes_of_background_are_filled_and_enclosed_classes_stay():
    labels = np.zeros((1, 9, 9), np.uint8)
    labels[0, 1:8, 1:8] = 1
    labels[0, 3:6, 3:6] = 0
    labels[0, 4, 4] = 2
    corrected = postprocess(labels, post_of(steps_of(fill_holes=True), kind="image", unit="share"), CLASSES, None)
    assert (corrected[0, 1:8, 1:8] == 1).sum() == 48
    assert corrected[0, 4, 4] == 2
    open_ring = labels.copy()
    open_ring[0, 1:4, 4] = 0  # a channel to the outside
    np.testing.assert_array_equal(
        postprocess(open_ring, post_of(steps_of(fill_holes=True), kind="image", unit="share"), CLASSES, None), open_ring
    )


def test_the_given_labels_and_an_absent_class_stay(labels):
    before = labels.copy()
    postprocess(labels, post_of(steps_of(largest=True, fill_holes=True)), CLASSES, SPACING)
    np.testing.assert_array_equal(labels, before)
    nothing = np.zeros_like(labels)
    np.testing.assert_array_equal(postprocess(nothing, post_of(steps_of(largest=True)), CLASSES, SPACING), nothing)


def image_like(labels, spacing=SPACING):
    return Image(path=Path("scan"), pixels=np.zeros((*labels.shape, 1), np.uint8), spacing_mm=spacing)


def test_steps_of_volumes_leave_single_slices_and_unknown_spacings_raw_and_say_so(labels, caplog):
    post = post_of(steps_of(largest=True))
    finish = finisher(post, CLASSES)
    assert (finish(image_like(labels), labels) != labels).any()
    for image, reason in (
        (image_like(labels[:1]), "learnt on volumes, and it has 1 slice"),
        (image_like(labels, spacing=None), "its spacing is not known"),
    ):
        assert reason in (unsuited(post, image.num_slices, image.size, image.spacing_mm is not None) or "")
        caplog.clear()
        np.testing.assert_array_equal(finish(image, labels[: image.num_slices]), labels[: image.num_slices])
        assert reason in caplog.text


def test_impossible_steps_are_refused():
    with pytest.raises(ValueError, match="has no step"):
        steps_of()
    with pytest.raises(ValueError, match="min_size"):
        steps_of(min_size=float("nan"))
    with pytest.raises(ValueError, match="once"):
        post_of(steps_of(largest=True), steps_of(fill_holes=True))
    with pytest.raises(ValueError, match="mm3 is no size"):
        replace(post_of(steps_of(largest=True)), kind="image")
