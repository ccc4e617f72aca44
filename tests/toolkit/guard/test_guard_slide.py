"""A slide is compared by parts as large as training images, and those that show most are compared."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from slides import texture

from medseg_trt.guard import slide
from medseg_trt.guard.guard import FeatureRange, Guard, unusual
from medseg_trt.guard.learn import learn_guard
from medseg_trt.guard.slide import part_size, unusual_slide
from medseg_trt.imaging.images import Image
from medseg_trt.spec import Preprocessing

CONTRACT = Preprocessing(image_size=(32, 32))
PART = (60, 80)
SLIDE = (480, 700)
GLASS = 255


def image_of(pixels: np.ndarray) -> Image:
    return Image(path=Path("a"), pixels=pixels[np.newaxis])


@pytest.fixture(scope="module")
def guard() -> Guard:
    training, held_out = (map(image_of, map(partial(texture, PART), range(first, first + 40))) for first in (0, 40))
    learnt = learn_guard(training, held_out, CONTRACT)
    assert learnt is not None
    return learnt


def judged(guard: Guard, pixels: np.ndarray, step: int = 32) -> str | None:
    return unusual_slide(guard, lambda first, end: pixels[first:end], pixels.shape[:2], None, CONTRACT, step)


@pytest.mark.parametrize("step", [1, 17, 512])
def test_a_slide_like_the_training_images_passes_whatever_its_size(guard, step):
    pixels = texture(SLIDE, 99)
    assert judged(guard, pixels, step) is None
    assert "size in pixels" in (unusual(guard, image_of(np.tile(pixels, (4, 4, 1))), CONTRACT) or "")
    assert judged(guard, np.tile(pixels, (4, 4, 1)), step) is None


def striped(pixels: np.ndarray) -> np.ndarray:
    return np.where(np.arange(len(pixels))[:, None, None] % 2, pixels, 0).astype(np.uint8)


CORRUPTIONS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], str]] = {
    "grey": (lambda pixels: np.repeat(pixels[..., :1], 3, axis=2), "colour"),
    "dark": (lambda pixels: pixels // 8, "intensities"),
    "noise": (lambda pixels: np.random.default_rng(0).integers(0, 256, pixels.shape).astype(np.uint8), "noise"),
    "stripes": (striped, "stripes"),
    "nothing but glass": (lambda pixels: np.full_like(pixels, GLASS), "colour"),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_slide_unlike_the_training_images_is_named(guard, name):
    change, reason = CORRUPTIONS[name]
    assert reason in (judged(guard, change(texture(SLIDE, 99))) or "")


def test_glass_around_the_tissue_does_not_speak_for_a_slide(guard, monkeypatch):
    pixels = np.full((*SLIDE, 3), GLASS, np.uint8)
    pixels[:, 500:] = texture((SLIDE[0], 200), 99)  # a quarter of the parts
    assert judged(guard, pixels) is None
    monkeypatch.setattr(slide, "COMPARED", slide.DOWN * slide.ACROSS)
    assert judged(guard, pixels) is not None  # where all parts are compared


def test_a_slide_no_larger_than_the_training_images_is_one_part(guard):
    for pixels in (texture(PART, 7), texture((PART[0], 50), 7) // 8):
        assert part_size(guard, pixels.shape[:2], None) == pixels.shape[:2]
        assert judged(guard, pixels) == unusual(guard, image_of(pixels), CONTRACT)


def test_parts_have_the_size_of_training_images_in_pixels_or_millimetres(guard):
    assert part_size(guard, SLIDE, None) == PART
    assert part_size(guard, (30, 4000), None) == (30, 80)
    extent = FeatureRange(low=5.0, high=5.0, spread=1.0)  # 32 mm
    with_extent = replace(guard, ranges={**guard.ranges, "extent": extent})
    height, width = part_size(with_extent, SLIDE, (0.25, 0.25))
    assert (height * width) ** 0.5 * 0.25 == pytest.approx(32, rel=0.01)
    unknown = replace(guard, ranges={"dark": extent})
    assert part_size(unknown, (5000, 7000), None) == (1024, 1024)
    endless = FeatureRange(low=-1000.0, high=1000.0, spread=1.0)
    assert part_size(replace(guard, ranges=dict.fromkeys(("pixels", "aspect"), endless)), SLIDE, None) == SLIDE


def test_few_parts_are_in_memory_at_once(guard, monkeypatch):
    """Parts beside each other take ``MAX_BYTES`` at most, or are read one at a time."""
    held: list[int] = []
    pixels = texture((480, 960), 3)
    real = slide._parts

    def counted(*arguments):
        held.append(sum(1 for _ in real(*arguments)))
        return real(*arguments)

    monkeypatch.setattr(slide, "_parts", counted)
    assert judged(guard, pixels) is None
    monkeypatch.setattr(slide, "MAX_BYTES", 2 * PART[0] * PART[1] * 3)
    assert judged(guard, pixels) is None
    assert held == [8 * 4, 8 * 2]
