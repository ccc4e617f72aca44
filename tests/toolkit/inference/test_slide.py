"""A slide has the mask of the same pixels in a plain file: post-processed, and compared with the training images."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import tifffile
from learnt_steps import post_of, steps_of
from slides import texture, write_slide

from medseg_trt.bundles.bundle import Bundle, load_bundle
from medseg_trt.guard.guard import Guard
from medseg_trt.guard.learn import learn_guard
from medseg_trt.imaging.images import Image, read_image
from medseg_trt.inference.to_folder import MaskFolder
from medseg_trt.pipeline import infer
from medseg_trt.tiling.windows import recorded_tiles
from medseg_trt.window_spec import Windows

SIZE = (150, 175)
STEPS = post_of(
    steps_of(min_size=0.002, fill_holes=True), steps_of("bar", largest=True), kind="image", unit="share"
)  # fmt: skip


def guard_of(size: tuple[int, int], preprocessing) -> Guard:
    def images(seeds: range):
        return (Image(path=Path("a"), pixels=texture(size, seed)[np.newaxis]) for seed in seeds)

    guard = learn_guard(images(range(20)), images(range(20, 40)), preprocessing)
    assert guard is not None
    return guard


def bundle_of(folder: Path, trained_size: tuple[int, int] = SIZE) -> Bundle:
    """Return a bundle of a network that was trained on windows, with post-processing and a guard."""
    loaded = load_bundle(folder)
    preprocessing = replace(loaded.preprocessing, windows=Windows())
    guard = guard_of(trained_size, preprocessing)
    content = replace(loaded.content, preprocessing=preprocessing, postprocessing=STEPS, guard=guard)
    return replace(loaded, content=content, tiles=recorded_tiles(preprocessing))


def write_both(folder: Path, pixels: np.ndarray) -> list[Path]:
    PIL.Image.fromarray(pixels).save(folder / "plain.png")
    return [folder / "plain.png", write_slide(folder / "slide.tif", pixels)]


def masks_of(bundle: Bundle, images: list[Path], folder: Path, **options) -> tuple[np.ndarray, np.ndarray]:
    for _ in infer(images, bundle, destination=MaskFolder(folder), backend="onnxruntime", **options):
        pass
    return np.array(PIL.Image.open(folder / "plain.png")), tifffile.imread(folder / "slide.tif")


def reasons_of(folder: Path) -> dict[str, str]:
    with (folder / "areas.csv").open(encoding="utf-8", newline="") as file:
        return {row["file"]: row["unusual"] for row in csv.DictReader(file)}


def test_a_slide_is_post_processed_as_the_same_pixels_in_a_plain_file(tiny_bundle, tmp_path):
    images, bundle = write_both(tmp_path, texture(SIZE)), bundle_of(tiny_bundle)
    plain, slide = masks_of(bundle, images, tmp_path / "finished")
    raw, raw_slide = masks_of(bundle, images, tmp_path / "raw", postprocess=False)
    np.testing.assert_array_equal(slide, plain)
    np.testing.assert_array_equal(raw_slide, raw)
    assert (plain != raw).any()
    assert [path.name for path in (tmp_path / "finished").iterdir() if path.name.startswith(".partial")] == []


def test_a_slide_much_larger_than_the_training_images_stays_raw_where_its_size_counts(tiny_bundle, tmp_path, caplog):
    images, bundle = write_both(tmp_path, texture(SIZE)), bundle_of(tiny_bundle, (50, 60))
    finished = masks_of(bundle, images, tmp_path / "finished")
    raw = masks_of(bundle, images, tmp_path / "raw", postprocess=False)
    np.testing.assert_array_equal(finished, raw)
    for name in ("plain.png", "slide.tif"):
        assert f"{name} is not post-processed: its sides are 3.0 times those of the training images" in caplog.text


@pytest.mark.parametrize(("pixels", "reason"), [(texture(SIZE, 9), ""), (texture(SIZE, 9) // 8, "intensities")])
def test_a_slide_is_compared_with_the_training_images(pixels, reason, tiny_bundle, tmp_path):
    written = MaskFolder(tmp_path / "masks")
    images = write_both(tmp_path, pixels)
    for _ in infer(images, bundle_of(tiny_bundle), destination=written, backend="onnxruntime"):
        pass
    unusual = reasons_of(tmp_path / "masks")
    assert unusual["slide.tif"] == unusual["plain.png"]
    assert reason in unusual["slide.tif"]
    assert bool(unusual["slide.tif"]) == bool(reason)
    assert sorted(written.unusual) == (sorted(map(str, images)) if reason else [])


def test_evaluation_reads_a_slide_of_a_size_that_it_can_hold_as_the_image_that_it_is(tmp_path):
    pixels = texture(SIZE)
    images = [read_image(path) for path in write_both(tmp_path, pixels)]
    np.testing.assert_array_equal(images[0].pixels, images[1].pixels)
