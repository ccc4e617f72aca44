"""Resizing, prepared pictures and restored labels, against PyTorch in float64 and against geometry."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import picture

from medseg_trt.imaging import preprocess
from medseg_trt.imaging.preprocess import golden, outside_fraction, prepare, prepare_labels, resize, restore
from medseg_trt.spec import Preprocessing, Resize

# Weights and partial sums are float32, of values from 0 to 1: 2.9e-7 is the worst case of 1600 pairs of sizes from 1 to
# 255 on both axes; 2**-20 leaves a factor of three.
RESIZE_TOLERANCE = 2**-20
ORACLES: dict[Resize, dict[str, Any]] = {
    "nearest": {"mode": "nearest-exact"},
    "linear": {"mode": "bilinear", "align_corners": False},
    "linear_antialias": {"mode": "bilinear", "align_corners": False, "antialias": True},
}
# Odd to odd, up and down and both at once. Where a centre falls on the border of two pixels, PyTorch's float32 scale
# decides between the two for nearest-exact: 224 -> 97 is such a pair, these are not.
SIZES = [((7, 9), (13, 33)), ((97, 33), (31, 11)), ((5, 61), (53, 17)), ((1, 3), (5, 1)), ((11, 11), (11, 11))]


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).random(shape, dtype=np.float32)


def interpolated(array: np.ndarray, size: tuple[int, int], **options) -> np.ndarray:
    """Resize (..., height, width) with PyTorch in float64."""
    planes = torch.from_numpy(np.array(array, np.float64)).reshape(1, -1, *array.shape[-2:])
    return F.interpolate(planes, size=size, **options).numpy().reshape(*array.shape[:-2], *size)


def largest_difference(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.abs(first.astype(np.float64) - second).max())


@pytest.mark.parametrize(("old", "new"), SIZES)
@pytest.mark.parametrize("method", ORACLES)
def test_resize_is_what_pytorch_does(method, old, new):
    array = noise(2, 3, *old)
    resized = resize(array, new, method)
    assert resized.shape == (2, 3, *new)
    assert resized.dtype == np.float32
    assert largest_difference(resized, interpolated(array, new, **ORACLES[method])) <= RESIZE_TOLERANCE


@pytest.mark.parametrize(
    ("method", "fault"),
    [
        ("linear", {"mode": "bilinear", "align_corners": True}),
        ("linear_antialias", {"mode": "bilinear", "align_corners": True, "antialias": True}),
        ("linear_antialias", {"mode": "bilinear", "align_corners": False}),
        ("nearest", {"mode": "nearest"}),
    ],
)
def test_the_tolerance_catches_shifted_centres_and_a_missing_antialias(method, fault):
    array = noise(33, 33)
    assert largest_difference(resize(array, (15, 15), method), interpolated(array, (15, 15), **fault)) > 0.1


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    old=st.tuples(st.integers(1, 40), st.integers(2, 40)),  # PyTorch's antialias repeats the rows of a single column
    new=st.tuples(st.integers(1, 40), st.integers(2, 40)),
    method=st.sampled_from(["linear", "linear_antialias"]),
)
def test_linear_methods_agree_with_pytorch_for_any_size(old, new, method):
    array = noise(*old)
    assert largest_difference(resize(array, new, method), interpolated(array, new, **ORACLES[method])) <= (
        RESIZE_TOLERANCE
    )


@pytest.mark.parametrize("method", ORACLES)
def test_a_constant_stays_constant_and_the_same_size_stays_the_same(method):
    flat = np.full((37, 23), 0.7, np.float32)
    # The weights of a pixel sum to one up to their float32 rounding.
    assert largest_difference(resize(flat, (11, 50), method), np.full((11, 50), np.float32(0.7))) <= RESIZE_TOLERANCE
    array = noise(37, 23)
    np.testing.assert_array_equal(resize(array, (37, 23), method), array)


# --- pictures


def stretched(pixels: np.ndarray, p: Preprocessing) -> np.ndarray:
    """Prepare with PyTorch in float64, without a spacing."""
    low, high = p.window
    values = (np.clip(pixels.astype(np.float64), low, high) - low) / (high - low)
    planes = np.broadcast_to(values.transpose(2, 0, 1), (3, *pixels.shape[:2]))
    mean, std = np.reshape(p.mean, (3, 1, 1)), np.reshape(p.std, (3, 1, 1))
    return (interpolated(planes, p.image_size, **ORACLES[p.resize]) - mean) / std


COLOURED: dict[str, Any] = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}


@pytest.mark.parametrize("method", ORACLES)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("source", [(53, 31), (19, 127)])
def test_a_picture_is_windowed_stretched_and_normalised(method, channels, source):
    p = Preprocessing(image_size=(32, 48), window=(-160.0, 240.0), resize=method, **COLOURED)
    pixels = np.random.default_rng(1).integers(-1000, 1000, (*source, channels), dtype=np.int16)
    prepared = prepare(pixels, p, None)
    assert prepared.shape == (3, 32, 48)
    # Divided by the smallest std, 0.2, the resizing's error is five times as large; one more rounding for the rest.
    tolerance = 6 * RESIZE_TOLERANCE
    assert largest_difference(prepared, stretched(pixels, p)) <= tolerance
    shifted_window = Preprocessing(image_size=(32, 48), window=(-160.0, 240.01), resize=method, **COLOURED)
    assert largest_difference(prepared, stretched(pixels, shifted_window)) > tolerance


def test_values_are_cut_to_the_window_before_they_are_mixed():
    p = Preprocessing(image_size=(16, 16), window=(0.0, 100.0))
    checkered = np.indices((32, 32)).sum(0) % 2 * 2000 - 1000  # -1000 and 1000, mixed about their mean
    prepared = prepare(checkered[..., np.newaxis], p, None)
    assert largest_difference(prepared[:, 4:-4, 4:-4], np.full((3, 8, 8), 0.5)) <= RESIZE_TOLERANCE
    mixed_first = resize(checkered.astype(np.float32), (16, 16), "linear_antialias")[4:-4, 4:-4]
    assert np.abs(mixed_first.clip(0, 100) / 100 - 0.5).min() > 0.4


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64, np.float32, np.float64])
def test_the_type_of_the_raw_values_does_not_matter(dtype):
    pixels = picture(3)[0][..., np.newaxis]
    p = Preprocessing(image_size=(16, 48))
    np.testing.assert_array_equal(prepare(pixels.astype(dtype), p, None), prepare(pixels, p, None))


def test_a_grey_picture_is_repeated_and_the_channels_of_a_coloured_one_are_kept_apart():
    grey = picture(0)[0][..., np.newaxis]
    p = Preprocessing(image_size=(48, 48))
    three = prepare(grey, p, None)
    np.testing.assert_array_equal(three[0], three[1])
    np.testing.assert_array_equal(three[0], three[2])
    coloured = np.concatenate([grey, 255 - grey, np.zeros_like(grey)], axis=2)
    prepared = prepare(coloured, p, None)
    np.testing.assert_array_equal(prepared[0], three[0])
    # two float32 sums of the same weights
    assert largest_difference(prepared[0] + prepared[1], np.ones((48, 48))) <= 2 * RESIZE_TOLERANCE
    assert not prepared[2].any()


# image 32 x 48 at 2 mm: 64 mm x 96 mm
PLACED = [
    pytest.param((40, 30), (1.0, 2.0), (20, 30), id="both axes padded"),
    pytest.param((41, 61), (2.5, 3.3), (51, 101), id="both axes cropped"),
    pytest.param((100, 20), (1.5, 1.7), (75, 17), id="rows cropped and columns padded"),
    pytest.param((16, 24), (4.0, 4.0), (32, 48), id="just fitting"),
    pytest.param((3, 2000), (0.1, 0.1), (1, 100), id="thinner than a pixel"),
]


@pytest.mark.parametrize(("source", "spacing_mm", "resampled"), PLACED)
def test_a_known_spacing_pads_and_crops_about_the_centre(source, spacing_mm, resampled):
    p = Preprocessing(image_size=(32, 48), window=(-100.0, 300.0), spacing_mm=2.0, **COLOURED)
    pixels = np.random.default_rng(2).integers(-200, 400, (*source, 1), dtype=np.int16)
    prepared = prepare(pixels, p, spacing_mm)
    values = (np.clip(pixels[..., 0].astype(np.float64), -100, 300) + 100) / 400
    whole = interpolated(values, resampled, **ORACLES["linear_antialias"])
    expected = np.zeros((32, 48))
    places = []
    for canvas, filled in zip((32, 48), resampled, strict=True):
        margin = abs(canvas - filled)
        before = margin // 2 if filled <= canvas else -(-margin // 2)  # an odd pixel more after the picture
        places.append((slice(before, before + min(filled, canvas)), slice(0, None)))
        if filled > canvas:
            places[-1] = (slice(0, None), slice(before, before + canvas))
    expected[places[0][0], places[1][0]] = whole[places[0][1], places[1][1]]
    expected = (expected - np.reshape(p.mean, (3, 1, 1))) / np.reshape(p.std, (3, 1, 1))
    assert largest_difference(prepared, expected) <= 6 * RESIZE_TOLERANCE  # as for stretched pictures
    assert largest_difference(prepared, np.roll(expected, 1, axis=1)) > 0.1  # one row too low


def test_without_a_spacing_of_the_picture_or_of_the_contract_it_is_stretched():
    pixels = picture(0, (40, 30))[0][..., np.newaxis]
    plain = prepare(pixels, Preprocessing(image_size=(32, 48)), None)
    np.testing.assert_array_equal(prepare(pixels, Preprocessing(image_size=(32, 48), spacing_mm=2.0), None), plain)
    np.testing.assert_array_equal(prepare(pixels, Preprocessing(image_size=(32, 48)), (1.0, 2.0)), plain)
    placed = prepare(pixels, Preprocessing(image_size=(32, 48), spacing_mm=2.0), (1.0, 2.0))
    assert not np.array_equal(placed, plain)


@pytest.mark.parametrize("channels", [0, 2, 4])
def test_other_numbers_of_channels_are_refused(channels):
    with pytest.raises(ValueError, match=f"the image has {channels} channels; 1 or 3 are supported"):
        prepare(np.zeros((8, 8, channels), np.uint8), Preprocessing(image_size=(16, 16)), None)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_prepare_and_restore_refuse_nan_and_infinity_with_their_count(value):
    p = Preprocessing(image_size=(16, 16))
    pixels = np.zeros((8, 8, 1), np.float32)
    pixels[3, 4] = pixels[7, 7] = value
    with pytest.raises(ValueError, match="2 pixels are NaN or infinite"):
        prepare(pixels, p, None)
    logits = np.zeros((2, 16, 16), np.float32)
    logits[1, 2, 3] = value
    with pytest.raises(ValueError, match="1 logits are NaN or infinite"):
        restore(logits, (8, 8), p, None)


@pytest.mark.parametrize("spacing_mm", [(0.0, 1.0), (1.0, -1.0), (float("nan"), 1.0), (1.0, float("inf"))])
def test_a_spacing_that_cannot_be_is_refused(spacing_mm):
    p = Preprocessing(image_size=(16, 16), spacing_mm=1.0)
    for call in (
        lambda: prepare(np.zeros((8, 8, 1), np.uint8), p, spacing_mm),
        lambda: prepare_labels(np.zeros((8, 8), np.uint8), p, spacing_mm),
        lambda: restore(np.zeros((1, 16, 16), np.float32), (8, 8), p, spacing_mm),
        lambda: outside_fraction((8, 8), p, spacing_mm),
    ):
        with pytest.raises(ValueError, match="must be positive"):
            call()


# --- labels


@pytest.mark.parametrize(("old", "new"), [((7, 9), (16, 48)), ((97, 33), (32, 16)), ((5, 61), (48, 16))])
def test_labels_are_those_of_the_nearest_source_pixel(old, new):
    labels = np.random.default_rng(0).integers(0, 9, old, dtype=np.uint8)
    prepared = prepare_labels(labels, Preprocessing(image_size=new), None)
    np.testing.assert_array_equal(prepared, interpolated(labels, new, mode="nearest-exact"))


def disc(size: tuple[int, int], spacing_mm: tuple[float, float], radius_mm: float) -> np.ndarray:
    """Return a disc, round in millimetres, somewhat beside the centre."""
    rows, columns = ((np.arange(n) - 0.5 * (n - 1)) * mm for n, mm in zip(size, spacing_mm, strict=True))
    return ((rows[:, np.newaxis] - 3.0) ** 2 + (columns + 5.0) ** 2 < radius_mm**2).astype(np.uint8)


def centre(weights: np.ndarray) -> np.ndarray:
    return np.array([(places * weights).sum() / weights.sum() for places in np.indices(weights.shape)])


DISCS = [
    ((83, 120), (1.0, 0.7), None),
    ((83, 120), (1.0, 0.7), 2.0),
    ((31, 29), (3.0, 4.0), 1.0),
    ((200, 30), (0.5, 3.0), 1.5),
]


@pytest.mark.parametrize("method", ["linear", "linear_antialias"])
@pytest.mark.parametrize(("size", "spacing_mm", "target_mm"), DISCS)
def test_prepared_labels_lie_on_the_prepared_picture(size, spacing_mm, target_mm, method):
    labels = disc(size, spacing_mm, 20.0)
    p = Preprocessing(image_size=(64, 64), window=(0.0, 1.0), spacing_mm=target_mm, resize=method)
    seen = prepare(labels[..., np.newaxis], p, spacing_mm)[0]
    prepared = prepare_labels(labels, p, spacing_mm)
    # The rim is drawn twice, once in steps: the two centres differ by 0.11 pixels at most here, and one pixel if moved.
    tolerance = 0.2
    assert np.abs(centre(seen) - centre(prepared)).max() < tolerance
    for axis in (0, 1):
        assert np.abs(centre(seen) - centre(np.roll(prepared, 1, axis))).max() > tolerance


@pytest.mark.parametrize(("size", "spacing_mm", "target_mm"), DISCS)
def test_restored_labels_lie_on_the_source(size, spacing_mm, target_mm):
    labels = disc(size, spacing_mm, 20.0)
    p = Preprocessing(image_size=(64, 64), spacing_mm=target_mm)
    restored = restore(one_hot(prepare_labels(labels, p, spacing_mm), 2), size, p, spacing_mm)
    inside = restore(np.ones((1, 64, 64), np.float32), size, p, spacing_mm).astype(bool)
    assert (labels[inside] != restored[inside]).mean() < 0.02  # the rim; 0.01 at most here
    millimetres = np.abs(centre(labels * inside) - centre(restored)) * spacing_mm
    assert millimetres.max() < 0.5  # a source pixel is up to 4 mm
    moved = np.abs(centre(labels * inside) - centre(np.roll(restored, 1, 0))) * spacing_mm
    assert moved.max() >= 0.5


def one_hot(labels: np.ndarray, count: int) -> np.ndarray:
    return np.eye(count, dtype=np.float32)[labels].transpose(2, 0, 1)


@pytest.mark.parametrize("target_mm", [None, 1.0])
@pytest.mark.parametrize("source", [(16, 24), (13, 11), (15, 8)])
def test_an_enlarged_picture_gives_every_label_back(source, target_mm):
    # From a factor of two on, all that is mixed at a source pixel's centre comes from this pixel.
    labels = np.random.default_rng(0).integers(0, 5, source, dtype=np.uint8)
    p = Preprocessing(image_size=(32, 48), spacing_mm=target_mm)
    spacing_mm = (2.0, 2.0)
    prepared = prepare_labels(labels, p, spacing_mm)
    np.testing.assert_array_equal(restore(one_hot(prepared, 5), source, p, spacing_mm), labels)
    moved = restore(one_hot(np.roll(prepared, 8, axis=1), 5), source, p, spacing_mm)
    assert (moved != labels).mean() > 0.5


@pytest.mark.parametrize("classes", [1, 4])
@pytest.mark.parametrize("source", [(97, 33), (20, 61), (32, 48)])
def test_logits_are_brought_back_before_the_largest_is_chosen(classes, source):
    logits = np.random.default_rng(0).normal(size=(classes, 32, 48)).astype(np.float32)
    restored = restore(logits, source, Preprocessing(image_size=(32, 48)), None)
    planes = interpolated(logits, source, **ORACLES["linear"])
    expected = planes.argmax(0) if classes > 1 else planes[0] > 0
    best = np.sort(planes, axis=0)[::-1]
    margin = best[0] - best[1] if classes > 1 else np.abs(planes[0])
    clear = margin > 1e-5  # logits up to 4: float32 may decide otherwise below 4e-6
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(restored[clear], expected[clear])
    if source != (32, 48):
        chosen_first = logits.argmax(0) if classes > 1 else logits[0] > 0
        early = interpolated(chosen_first, source, mode="nearest-exact")
        assert (early != restored).mean() > 0.05


def test_equal_logits_go_to_the_lower_label():
    p = Preprocessing(image_size=(16, 16))
    logits = np.zeros((3, 16, 16), np.float32)
    assert not restore(logits, (16, 16), p, None).any()
    logits[1:] = 1
    assert (restore(logits, (16, 16), p, None) == 1).all()
    assert not restore(np.zeros((1, 16, 16), np.float32), (16, 16), p, None).any()


def test_logits_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"the logits are \(16, 32\) pixels, but the network's input is \(32, 16\)"):
        restore(np.zeros((2, 16, 32), np.float32), (8, 8), Preprocessing(image_size=(32, 16)), None)


@pytest.mark.parametrize("band_values", [1, 5000, 2**30])
def test_restore_is_independent_of_the_band_size(band_values, monkeypatch):
    logits = np.random.default_rng(0).normal(size=(3, 32, 48)).astype(np.float32)
    p = Preprocessing(image_size=(32, 48), spacing_mm=1.0)
    usual = restore(logits, (61, 77), p, (0.7, 0.7))
    monkeypatch.setattr(preprocess, "BAND_VALUES", band_values)
    np.testing.assert_array_equal(restore(logits, (61, 77), p, (0.7, 0.7)), usual)


def test_what_was_cropped_away_becomes_background_and_is_counted():
    p = Preprocessing(image_size=(32, 48), spacing_mm=1.0)
    source = (64, 40)  # of 1 mm: half of the rows are cut off, and the columns are padded
    restored = restore(np.ones((1, 32, 48), np.float32), source, p, (1.0, 1.0))
    expected = np.zeros(source, np.uint8)
    expected[16:48] = 1
    np.testing.assert_array_equal(restored, expected)
    assert outside_fraction(source, p, (1.0, 1.0)) == 0.5


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    source=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    spacing_mm=st.tuples(st.floats(0.2, 5), st.floats(0.2, 5)),
    target_mm=st.one_of(st.none(), st.floats(0.2, 5)),
)
def test_the_outside_fraction_is_the_share_of_pixels_that_can_have_no_label(source, spacing_mm, target_mm):
    p = Preprocessing(image_size=(16, 32), spacing_mm=target_mm)
    labels = restore(np.ones((1, 16, 32), np.float32), source, p, spacing_mm)
    # two means in float64
    assert outside_fraction(source, p, spacing_mm) == pytest.approx(1 - labels.mean(), abs=1e-12)
    if target_mm is None:
        assert labels.all()


# --- golden


@pytest.mark.parametrize("target_mm", [None, 1.5])
def test_the_golden_input_is_the_same_bits_every_time_whatever_the_global_generator(target_mm):
    p = Preprocessing(image_size=(32, 48), window=(-160.0, 240.0), spacing_mm=target_mm, **COLOURED)
    np.random.seed(1)  # noqa: NPY002  # the global generator is the point
    first = golden(p)
    np.random.seed(2)  # noqa: NPY002
    undisturbed = np.random.random()  # noqa: NPY002
    np.random.seed(2)  # noqa: NPY002
    second = golden(p)
    assert np.random.random() == undisturbed  # noqa: NPY002
    for one, other in zip(first, second, strict=True):
        assert one.tobytes() == other.tobytes()
    pixels, prepared = first
    assert pixels.min() < -160
    assert pixels.max() > 240
    spacing_mm = None if target_mm is None else (1.3 * target_mm, 0.8 * target_mm)
    np.testing.assert_array_equal(prepared, prepare(pixels, p, spacing_mm))


@pytest.mark.parametrize(
    "change",
    [
        {"resize": "linear"},
        {"resize": "nearest"},
        {"window": (-160.0, 241.0)},
        {"mean": (0.4, 0.5, 0.61)},
        {"std": (0.2, 0.25, 0.31)},
        {"spacing_mm": None},
    ],
)
def test_the_golden_input_tells_contracts_apart(change):
    usual: dict[str, Any] = {"image_size": (32, 48), "window": (-160.0, 240.0), "spacing_mm": 1.5, **COLOURED}
    _, first = golden(Preprocessing(**usual))
    pixels, _ = golden(Preprocessing(**usual))
    changed = Preprocessing(**{**usual, **change})
    assert largest_difference(prepare(pixels, changed, (1.3 * 1.5, 0.8 * 1.5)), first) > 1e-3


@pytest.mark.parametrize("size", [(96, 40), (31, 300), (300, 31), (257, 190)])
def test_wide_sources_are_labelled_band_by_band_as_small_ones_are_at_once(size, monkeypatch):
    """The two ways add in another order, so only where two logits are nearly equal may a label differ."""
    contract = Preprocessing(image_size=(64, 48))
    logits = np.random.default_rng(0).standard_normal((5, 64, 48)).astype(np.float32)
    at_once = restore(logits, size, contract, None)
    monkeypatch.setattr(preprocess, "MAX_WIDENED_VALUES", 0)
    assert (restore(logits, size, contract, None) != at_once).mean() < 1e-4
    scaled = resize(logits, size, "linear")
    ordered = np.sort(scaled, axis=0)
    clear = ordered[-1] - ordered[-2] > 1e-5
    assert (at_once == scaled.argmax(0))[clear].all()
    assert clear.mean() > 0.99
