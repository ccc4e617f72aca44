"""A copy is found though it was resized or compressed again, and pictures that merely are of one kind are not."""

import io

import numpy as np
import PIL.Image
import pytest
from official import colour_picture

from medseg_trt.train.datasets import duplicates
from medseg_trt.train.datasets.duplicates import MIN_CORRELATION, find_duplicates, hash_image

SIZE = (192, 256)


def textured(seed, size=SIZE):
    """Return a picture of generated tissue: blobs of many sizes, and a disc."""
    rng = np.random.default_rng(seed)
    colours, _ = colour_picture(seed, size)
    tissue = np.zeros(size)
    for cells in (3, 6, 12, 24):
        coarse = PIL.Image.fromarray(rng.normal(0, 1, (cells, cells)).astype(np.float32))
        tissue += np.asarray(coarse.resize(size[::-1], PIL.Image.Resampling.BICUBIC)) * 60 / cells**0.5
    return (colours + tissue[..., None]).clip(0, 255).astype(np.uint8)


def resized(pixels, factor):
    size = round(pixels.shape[1] * factor), round(pixels.shape[0] * factor)
    return np.asarray(PIL.Image.fromarray(pixels).resize(size, PIL.Image.Resampling.BILINEAR))


def compressed(pixels, quality):
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    with PIL.Image.open(file) as image:
        return np.asarray(image)


COPIES = {
    "half the size": lambda pixels: resized(pixels, 0.5),
    "larger": lambda pixels: resized(pixels, 1.5),
    "JPEG of quality 30": lambda pixels: compressed(pixels, 30),
    "half the size, then JPEG of quality 50": lambda pixels: compressed(resized(pixels, 0.5), 50),
    "grey": lambda pixels: np.asarray(PIL.Image.fromarray(pixels).convert("L"))[..., None],
    "darker and of less contrast": lambda pixels: (0.7 * pixels + 20).astype(np.uint8),
}


def image_hash(pixels):
    return hash_image(np.asarray(pixels)[np.newaxis])


@pytest.mark.parametrize("make", [textured, lambda seed: colour_picture(seed, SIZE)[0]], ids=["tissue", "discs"])
@pytest.mark.parametrize("copy", COPIES)
def test_a_copy_is_found_and_only_the_copy(make, copy):
    originals = [make(seed) for seed in range(12)]
    hashes = [image_hash(pixels) for pixels in (*originals, COPIES[copy](originals[7]))]
    (pair,) = find_duplicates(hashes, [None] * len(hashes))
    assert (pair.first, pair.second, pair.is_exact) == (7, 12, False)


def test_the_same_pixels_are_exact_copies_whatever_file_they_lie_in():
    hashes = [image_hash(textured(seed)) for seed in (0, 1, 0, 2, 0)]
    duplicates = find_duplicates(hashes, [None] * 5)
    assert [(pair.first, pair.second, pair.is_exact) for pair in duplicates] == [(0, 2, True), (0, 4, True)]


def test_different_pictures_are_none():
    hashes = [image_hash(textured(seed)) for seed in range(60)] + [
        image_hash(colour_picture(seed, SIZE)[0]) for seed in range(40)
    ]
    assert find_duplicates(hashes, [None] * len(hashes)) == []


def test_low_frequencies_alone_would_take_different_pictures_for_copies(monkeypatch):
    # Discs before a bar share their lowest frequencies: only the comparison of thumbnails tells them apart.
    hashes = [image_hash(colour_picture(seed, SIZE)[0]) for seed in range(40)]
    monkeypatch.setattr(duplicates, "MIN_CORRELATION", -1)
    assert find_duplicates(hashes, [None] * len(hashes))


def test_the_limit_of_the_second_look_has_room_on_the_copies_side():
    agreement = []
    for seed in range(6):
        original = image_hash(textured(seed)).thumbnail
        agreement += [float((original * image_hash(copy(textured(seed))).thumbnail).sum()) for copy in COPIES.values()]
    assert min(agreement) > MIN_CORRELATION + 0.003


def test_frames_of_one_sequence_may_look_alike_but_not_be_the_same():
    pixels = textured(0)
    hashes = [image_hash(pixels), image_hash(resized(pixels, 0.5)), image_hash(pixels)]
    duplicates = find_duplicates(hashes, ["film"] * 3)
    assert [(pair.first, pair.second, pair.is_exact) for pair in duplicates] == [(0, 2, True)]
    assert len(find_duplicates(hashes, ["film", "film 2", "film 3"])) == 3


def test_constant_images_are_no_duplicates():
    hashes = [image_hash(np.full((*SIZE, 1), value, np.uint8)) for value in (0, 0, 90)]
    assert find_duplicates(hashes, [None] * 3) == []


def test_image_hash_ignores_values_outside_the_window():
    scan = 1.5 * textured(0)[np.newaxis, ..., :1] - 100
    metal = scan.copy()
    metal[0, 20:24, 30:34] = 20_000
    first, second = (hash_image(values.astype(np.float32), (-125.0, 275.0)) for values in (scan, metal))
    assert find_duplicates([first, second], [None, None])
    first, second = (hash_image(values.astype(np.float32)) for values in (scan, metal))
    assert not find_duplicates([first, second], [None, None])


def test_all_pairs_are_found_across_blocks(monkeypatch):
    monkeypatch.setattr(duplicates, "BLOCK", 2)
    originals = [textured(seed) for seed in range(4)]
    hashes = [image_hash(pixels) for pixels in (*originals, *(resized(pixels, 0.5) for pixels in originals))]
    assert [(pair.first, pair.second) for pair in find_duplicates(hashes, [None] * 8)] == [
        (0, 4),
        (1, 5),
        (2, 6),
        (3, 7),
    ]
