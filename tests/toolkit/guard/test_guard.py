"""A guard names images that are unlike the training's, lets held-out ones pass, and changes no mask."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import picture

from medseg_trt.errors import ArtefactError
from medseg_trt.guard.features import NAMES
from medseg_trt.guard.guard import FeatureRange, Guard, unusual
from medseg_trt.guard.learn import FALSE_ALARMS, learn_guard
from medseg_trt.imaging.images import Image
from medseg_trt.spec import Preprocessing, from_dict, to_dict

CT = Preprocessing(image_size=(32, 32), window=(-100.0, 300.0))


def scan(seed: int, slices: int = 12, size: tuple[int, int] = (44, 40)) -> Image:
    """Return a volume of Hounsfield units: a body on a table, with a bright organ on its left side, in air."""
    rng = np.random.default_rng(seed)
    rows, columns = np.indices(size)
    body = ((rows - 20) / 15) ** 2 + ((columns - 20) / 17) ** 2 < 1
    organ = (rows - 16) ** 2 + (columns - 12) ** 2 < 16
    flat = np.where(organ, 150.0, np.where(body, 40.0, -1000.0))
    flat[38:40, 4:36] = 120.0  # the table
    pixels = flat + rng.normal(0, 12, (slices, *size))
    return Image(path=Path("scan"), pixels=pixels[..., np.newaxis].astype(np.float32), spacing_mm=(3.0, 2.0, 2.0))


@pytest.fixture(scope="module")
def guard() -> Guard:
    learnt = learn_guard(map(scan, range(4)), map(scan, range(4, 7)), CT)
    assert learnt is not None
    return learnt


def changed(change, seed: int = 9) -> Image:
    image = scan(seed)
    return replace(image, pixels=change(image.pixels))


def striped(pixels):
    pixels = pixels.copy()
    pixels[:, ::4] = pixels.min()
    return pixels


CORRUPTIONS = {
    "inverted": (lambda pixels: -pixels, "intensities"),
    "not rescaled": (lambda pixels: pixels + 1024, "intensities"),
    "already windowed": (lambda pixels: 255 * (pixels.clip(-100, 300) + 100) / 400, "intensities"),
    "upside down": (lambda pixels: pixels[:, ::-1], "upside down"),
    "sides exchanged": (lambda pixels: pixels[:, :, ::-1], "left and right exchanged"),
    "stripes": (striped, "stripes"),
    "in colour": (lambda pixels: pixels * np.array([1.0, 0.8, 0.5]), "colour"),
    "noise": (lambda pixels: np.random.default_rng(0).uniform(-1000, 300, pixels.shape), "noise or sharpness"),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_every_corruption_is_named(guard, name):
    change, reason = CORRUPTIONS[name]
    assert reason in (unusual(guard, changed(change), CT) or "")


@pytest.mark.parametrize(
    "change", [lambda pixels: -pixels, lambda pixels: pixels.max() + pixels.min() - pixels], ids=["negative", "within"]
)
def test_an_inverted_image_is_called_inverted_first_and_not_turned(guard, change):
    reason = unusual(guard, changed(change), CT) or ""
    assert reason.startswith("inverted intensities: content (similarity -")
    assert "exchanged" not in reason
    assert "upside" not in reason
    assert "; intensities (" in reason


@pytest.mark.parametrize("name", [name for name in CORRUPTIONS if name != "inverted"])
def test_guard_does_not_call_other_corruptions_inverted(guard, name):
    assert "inverted" not in (unusual(guard, changed(CORRUPTIONS[name][0]), CT) or "inverted")


def test_images_like_the_training_pass_also_at_another_resolution(guard):
    assert unusual(guard, scan(20), CT) is None
    image = scan(21)
    finer = replace(image, pixels=image.pixels.repeat(2, 1).repeat(2, 2), spacing_mm=(3.0, 1.0, 1.0))
    assert unusual(guard, finer, CT) is None


def test_a_few_bad_slices_of_a_volume_do_not_speak_for_it(guard):
    image = scan(22)
    pixels = image.pixels.copy()
    pixels[:4] = -pixels[:4]
    assert unusual(guard, replace(image, pixels=pixels), CT) is None


def test_another_size_is_named_in_pixels_and_millimetres(guard):
    image = scan(23, size=(44, 40))
    huge = replace(image, spacing_mm=(3.0, 20.0, 20.0))
    assert "size in millimetres (839, in training 83.9 … 83.9)" in (unusual(guard, huge, CT) or "")


def test_a_reason_gives_raw_values(guard):
    reason = unusual(guard, changed(lambda pixels: -pixels), CT) or ""
    assert "in training 1" in reason
    assert "…" in reason


def test_the_limit_leaves_the_stated_share_of_held_out_slices():
    """With enough slices the limit is the quantile of split conformal prediction: new slices exceed it as rarely."""
    held_out = [scan(seed, slices=30) for seed in range(4, 8)]
    learnt = learn_guard(map(scan, range(4)), held_out, CT)
    assert learnt is not None
    assert learnt.false_alarms <= FALSE_ALARMS
    new = [scan(seed, slices=1) for seed in range(100, 160)]
    alarms = sum(unusual(learnt, image, CT) is not None for image in new)
    assert alarms / len(new) <= 3 * FALSE_ALARMS  # 60 draws at 5 %: nine or more in one of 600 runs


def test_learn_guard_returns_none_for_too_few_slices():
    assert learn_guard([scan(0, slices=3)], [scan(1)], CT) is None
    assert learn_guard([scan(0)], [scan(1, slices=2)], CT) is None


def test_guard_with_own_window_ignores_brightness_and_contrast():
    own = replace(CT, own_window=True)

    def shown(seed):
        pixels, _ = picture(seed)
        return Image(path=Path("a"), pixels=pixels[np.newaxis, ..., np.newaxis].astype(np.float32))

    learnt = learn_guard(map(shown, range(12)), map(shown, range(12, 24)), own)
    assert learnt is not None
    assert unusual(learnt, shown(30), own) is None
    brighter = replace(shown(30), pixels=7 * shown(30).pixels - 300)
    assert unusual(learnt, brighter, own) is None  # the network sees no difference
    assert "content" in (unusual(learnt, replace(shown(30), pixels=-shown(30).pixels), own) or "")


def test_a_stored_guard_is_the_same_and_a_damaged_one_is_refused(guard):
    stored = json.loads(json.dumps(to_dict(guard)))
    assert from_dict(Guard, stored, "a manifest") == guard
    for damage in (
        {"limit": float("nan")},
        {"template": [[0.0] * 8]},
        {"ranges": {"taste": {"low": 0, "high": 1, "spread": 1}}},
        {"ranges": {"dark": {"low": 0, "high": 1, "spread": 0}}},
    ):
        with pytest.raises(ArtefactError):
            from_dict(Guard, {**stored, **damage}, "a manifest")


@pytest.mark.parametrize(
    "numbers", [(2000.0, 2000.0, 1.0), (0.0, 1e308, 1.0), (0.0, 1.0, float("nan")), (0.0, 1.0, 0.0)]
)
def test_a_range_that_cannot_be_one_is_refused(numbers):
    with pytest.raises(ValueError, match="the range of a feature lies within ±1000"):
        FeatureRange(**dict(zip(("low", "high", "spread"), numbers, strict=True)))


def test_slices_that_differ_each_in_another_feature_are_given_a_reason_that_holds(guard, monkeypatch):
    """All medians are within the limit then; the reason was of the first feature, whatever its value."""
    image = scan(9, slices=3)
    names = ["roughness", "stripes", "colour"]
    rows = iter([[(guard.limit + 1) * (name == far) for name in NAMES] for far in names])
    monkeypatch.setattr(Guard, "distances", lambda *_: np.array(next(rows)))
    assert (unusual(guard, image, CT) or "").startswith("colour")


@pytest.mark.parametrize("size", [(1, 40_000), (40_000, 1)])
def test_an_image_of_one_row_or_column_is_compared(guard, size):
    assert unusual(guard, Image(path=Path("line"), pixels=np.zeros((1, *size, 1), np.uint8)), CT) is not None
