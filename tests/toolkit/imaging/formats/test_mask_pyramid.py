"""Masks that are written by rows, read by tifffile, Pillow and SimpleITK."""

from pathlib import Path

import numpy as np
import PIL.Image
import PIL.TiffImagePlugin
import pytest
import SimpleITK
import tifffile
from tiny import TWO_ORGANS

from medseg_trt.errors import InputError, MedsegError
from medseg_trt.imaging.formats import mask_pyramid
from medseg_trt.imaging.formats.mask_pyramid import write_pyramid


def labels_of(size: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 3, size).astype(np.uint8)


def written(path: Path, labels: np.ndarray, step: int = 100, **how) -> tuple[int, ...]:
    bands = (labels[first : first + step] for first in range(0, len(labels), step))
    return write_pyramid(path, bands, labels.shape, TWO_ORGANS, **how)


@pytest.mark.parametrize("size", [(1, 1), (30, 700), (512, 512), (513, 512), (1100, 1301)])
@pytest.mark.parametrize("step", [1, 100, 5000])
def test_every_level_has_every_second_row_and_column(size, step, tmp_path):
    labels, path = labels_of(size), tmp_path / "a.tif"
    if step == 1 and size[0] > 600:
        labels = labels[:600]
    assert written(path, labels, step) == tuple(np.bincount(labels.ravel(), minlength=3))
    with tifffile.TiffFile(path) as file, PIL.Image.open(path) as image:
        assert isinstance(image, PIL.TiffImagePlugin.TiffImageFile)
        assert image.n_frames == len(file.pages)
        assert max(file.pages[-1].shape) <= 512 < max(*file.pages[-2].shape, 513)
        for level, page in enumerate(file.pages):
            expected = labels[:: 2**level, :: 2**level]
            np.testing.assert_array_equal(page.asarray(), expected)
            image.seek(level)
            np.testing.assert_array_equal(np.array(image), expected)
            assert isinstance(page, tifffile.TiffPage)
            assert (page.is_tiled, page.is_reduced) == (True, level > 0)
        assert len(file.series[0].levels) == len(file.pages)


def test_colours_and_spacing_are_those_of_the_classes_and_the_slide(tmp_path):
    labels, path = labels_of((600, 700)), tmp_path / "a.tif"
    written(path, labels, spacing_mm=(0.5e-3, 0.25e-3))
    read = SimpleITK.ReadImage(path)
    assert read.GetSize() == (700, 600)
    assert read.GetSpacing() == pytest.approx((0.25e-3, 0.5e-3))
    with PIL.Image.open(path) as image:
        colours = np.array(image.convert("RGB"))
    np.testing.assert_array_equal(colours, np.array(TWO_ORGANS.colors, np.uint8)[labels])
    with tifffile.TiffFile(path) as file:  # a smaller copy has larger pixels
        (over, under), (over2, under2) = (
            page.tags["XResolution"].value for page in file.pages if isinstance(page, tifffile.TiffPage)
        )
    assert over / under == pytest.approx(2 * over2 / under2)


def test_a_mask_with_too_few_or_too_many_rows_is_not_written(tmp_path):
    for rows in (599, 601, 1200):
        with pytest.raises((MedsegError, RuntimeError)):
            write_pyramid(tmp_path / "a.tif", [labels_of((rows, 20))], (600, 20), TWO_ORGANS)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_between_two_bands_leaves_the_older_mask_and_no_other_file(tmp_path):
    path = tmp_path / "a.tif"
    written(path, labels_of((40, 40)))
    before = path.read_bytes()

    def bands():
        yield labels_of((600, 600))
        raise InputError("a tile is damaged")

    with pytest.raises(InputError, match="damaged"):
        write_pyramid(path, bands(), (1200, 600), TWO_ORGANS)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_mask_that_reads_back_differently_is_not_written(tmp_path, monkeypatch):
    real, calls = mask_pyramid.zlib.compress, iter(range(100))
    monkeypatch.setattr(mask_pyramid.zlib, "compress", lambda tile: real(tile if next(calls) else bytes(len(tile))))
    with pytest.raises(MedsegError, match="differs when read back"):
        written(tmp_path / "a.tif", labels_of((600, 600)))
    assert list(tmp_path.iterdir()) == []


def test_large_masks_are_bigtiff(tmp_path, monkeypatch):
    monkeypatch.setattr(mask_pyramid, "CLASSIC_BYTES", 1000)
    labels = labels_of((40, 40))
    written(tmp_path / "a.tif", labels)
    assert (tmp_path / "a.tif").read_bytes()[:4] == b"II\x2b\0"
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "a.tif"), labels)
