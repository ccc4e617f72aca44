"""The preprocessing of the published protocols: TransUNet's splines and UNeXt's channels, restated line by line."""

import numpy as np
import pytest
from scipy import ndimage

from medseg_trt.imaging.preprocess import clip_and_scale, golden, prepare, prepare_labels, resize_and_normalize, restore
from medseg_trt.imaging.segment import segment
from medseg_trt.spec import Preprocessing

CT = (-125.0, 275.0)
# float32 after the same sums in SciPy's float64: one rounding of values up to 1.2
ROUNDING = 2**-22
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def scan(size, seed=0):
    """Generated Hounsfield units beyond both ends of the window, smooth enough for a spline to overshoot."""
    rows, columns = np.indices(size) / max(size)
    wave = 600 * np.sin(9 * rows) * np.cos(7 * columns)
    return (wave + np.random.default_rng(seed).normal(0, 40, size)).astype(np.int16)


def transunet_input(slice_, size, order):
    """Restate Beckschen/TransUNet: the volume to 0 … 1, then ``zoom`` of the slice, then three equal channels."""
    image = (np.clip(slice_, *CT).astype(np.float32) + 125) / 400
    if image.shape != size:
        image = ndimage.zoom(image, (size[0] / image.shape[0], size[1] / image.shape[1]), order=order)
    return np.stack([np.asarray(image)] * 3)


@pytest.mark.parametrize(("method", "order"), [("spline3", 3), ("spline0", 0)])
@pytest.mark.parametrize("source", [(101, 77), (40, 40), (32, 48)])
def test_a_slice_is_zoomed_as_transunet_does_it(method, order, source):
    p = Preprocessing(image_size=(32, 48), window=CT, resize=method)
    pixels = scan(source)
    prepared = prepare(pixels[..., np.newaxis], p, (0.7, 0.7))
    expected = transunet_input(pixels, (32, 48), order)
    assert prepared.shape == (3, 32, 48)
    assert np.abs(prepared - expected).max() <= ROUNDING
    if source != (32, 48):  # the corners lie on one another there; half-pixel centres are a different picture
        ours = prepare(pixels[..., np.newaxis], Preprocessing(image_size=(32, 48), window=CT, resize="linear"), None)
        assert np.abs(ours - expected).max() > 0.05


def test_masks_are_zoomed_with_order_0_both_ways():
    p = Preprocessing(image_size=(32, 48), window=CT, resize="spline3")
    labels = np.random.default_rng(0).integers(0, 4, (101, 77), dtype=np.uint8)
    np.testing.assert_array_equal(prepare_labels(labels, p, None), ndimage.zoom(labels, (32 / 101, 48 / 77), order=0))
    logits = np.random.default_rng(1).normal(size=(4, 32, 48)).astype(np.float32)
    expected = ndimage.zoom(logits.argmax(0), (101 / 32, 77 / 48), order=0)  # labels first, then back
    np.testing.assert_array_equal(restore(logits, (101, 77), p, None), expected)
    linear = restore(logits, (101, 77), Preprocessing(image_size=(32, 48)), None)
    assert (linear != expected).mean() > 0.2


def test_one_logit_becomes_a_label_before_it_is_zoomed():
    p = Preprocessing(image_size=(16, 16), resize="spline3")
    logits = np.random.default_rng(1).normal(size=(1, 16, 16)).astype(np.float32)
    expected = ndimage.zoom((logits[0] > 0).astype(np.uint8), (2, 3), order=0)
    np.testing.assert_array_equal(restore(logits, (32, 48), p, None), expected)


def test_inference_follows_transunets_test_slice_by_slice():
    """Restate ``test_single_volume``: zoom order 3, the network, argmax, zoom back order 0."""
    from pathlib import Path

    from medseg_trt.imaging.images import Image

    volume = np.stack([scan((60, 50), seed) for seed in range(3)])
    weights = np.random.default_rng(2).normal(size=(4, 3)).astype(np.float32)

    def network(batch):
        return np.einsum("kc,bchw->bkhw", weights, np.sin(9 * batch)).astype(np.float32)

    expected = []
    for slice_ in volume:
        answer = network(transunet_input(slice_, (32, 32), 3)[np.newaxis])[0].argmax(0)
        expected.append(ndimage.zoom(answer, (60 / 32, 50 / 32), order=0))
    p = Preprocessing(image_size=(32, 32), window=CT, resize="spline3")
    image = Image(path=Path("generated.nii"), pixels=volume[..., np.newaxis], spacing_mm=(3.0, 0.8, 0.8))
    mask = segment(network, image, p, batch=2)
    # A logit that ties within a rounding of the input may go the other way.
    assert (mask != np.stack(expected)).mean() < 1e-3


def test_unexts_input_is_normalised_and_then_divided_by_255_again_in_bgr():
    picture = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    p = Preprocessing(
        image_size=(32, 48),
        resize="linear",
        channel_order="bgr",
        mean=IMAGENET_MEAN,
        std=(255 * IMAGENET_STD[0], 255 * IMAGENET_STD[1], 255 * IMAGENET_STD[2]),
    )
    bgr = picture[..., ::-1].astype(np.float64)  # what cv2.imread returns
    expected = ((bgr / 255 - IMAGENET_MEAN) / IMAGENET_STD / 255).transpose(2, 0, 1)
    prepared = prepare(picture, p, None)
    assert np.abs(prepared - expected).max() <= ROUNDING / 50  # the values are below 0.011
    assert np.abs(prepared[::-1] - expected).max() > 1e-3
    grey = picture[..., :1]
    assert np.abs(prepare(grey, p, None)[0] - prepare(grey, p, None)[2]).max() > 1e-5  # its means still differ


@pytest.mark.parametrize("method", ["linear", "linear_antialias", "spline3"])
@pytest.mark.parametrize("source", [(75, 41), (20, 33)])
def test_rotations_and_flips_commute_with_the_resize(method, source):
    """So that pictures may be resized once, before training, though the protocol augments first."""
    p = Preprocessing(image_size=(32, 32), resize=method)
    pixels = np.random.default_rng(0).integers(0, 256, (*source, 3), dtype=np.uint8)
    for turns in range(4):
        for axes in ((), (0,), (1,), (0, 1)):
            before = prepare(np.flip(np.rot90(pixels, turns), axes), p, None)
            after = np.flip(np.rot90(prepare(pixels, p, None), turns, axes=(1, 2)), tuple(axis + 1 for axis in axes))
            assert np.abs(before - after).max() < 1e-6  # the taps are added up in another order


def test_clip_and_scale_followed_by_resize_and_normalize_equals_prepare():
    p = Preprocessing(image_size=(32, 48), window=CT, channel_order="bgr", mean=IMAGENET_MEAN)
    pixels = np.random.default_rng(0).normal(0, 300, (20, 30, 3))
    np.testing.assert_array_equal(resize_and_normalize(clip_and_scale(pixels, p), p, None), prepare(pixels, p, None))


@pytest.mark.parametrize("change", [{"resize": "spline3"}, {"resize": "spline0"}, {"channel_order": "bgr"}])
def test_golden_input_detects_changed_resize_method_and_channel_order(change):
    usual = {"image_size": (32, 48), "window": CT, "mean": IMAGENET_MEAN}
    _, first = golden(Preprocessing(**usual))
    assert np.abs(golden(Preprocessing(**usual, **change))[1] - first).max() > 1e-3


def test_a_spline_has_no_pixel_spacing():
    with pytest.raises(ValueError, match="spline3 stretches images"):
        Preprocessing(image_size=(32, 48), resize="spline3", spacing_mm=1.0)
