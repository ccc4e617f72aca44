"""Values within 1e-3 of a whole number, as a header's slope makes them, are labels; values further off are not."""

from pathlib import Path

import nibabel
import numpy as np
import pytest

from medseg_trt.errors import InputError
from medseg_trt.imaging.images import read_image, read_labels
from medseg_trt.imaging.label_values import CHUNK_PIXELS, ROUNDING, as_labels, looks_soft, pixels_per_label

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 9, (6, 5, 4)).astype(np.float64)
PATH = Path("m.nii")


def scan(folder):
    nibabel.save(nibabel.Nifti1Image(np.zeros((6, 5, 4), np.int16), np.diag([-1.0, -1, 1, 1])), folder / "v.nii")
    return read_image(folder / "v.nii")


def test_a_float_array_with_an_int16_header_is_read(tmp_path):
    volume = nibabel.Nifti1Image(LABELS, np.diag([-1.0, -1, 1, 1]))
    volume.header.set_data_dtype(np.int16)
    nibabel.save(volume, tmp_path / "m.nii")
    scaled = np.asarray(nibabel.Nifti1Image.from_filename(tmp_path / "m.nii").dataobj)
    assert (scaled % 1 != 0).any()  # there is something to round
    np.testing.assert_array_equal(read_labels(tmp_path / "m.nii", scan(tmp_path), 9), LABELS.T)


def test_a_slope_of_1_255_is_read(tmp_path):
    volume = nibabel.Nifti1Image((LABELS * 255).astype(np.uint16), np.diag([-1.0, -1, 1, 1]))
    volume.header.set_slope_inter(1 / 255, 0)
    nibabel.save(volume, tmp_path / "m.nii")
    np.testing.assert_array_equal(read_labels(tmp_path / "m.nii", scan(tmp_path), 9), LABELS.T)


@pytest.mark.parametrize("off", [0.9 * ROUNDING, -0.9 * ROUNDING])
def test_a_value_within_a_thousandth_of_a_whole_number_is_rounded(off):
    np.testing.assert_array_equal(as_labels(LABELS + off, PATH, 9), LABELS)


@pytest.mark.parametrize(("off", "text"), [(1.2 * ROUNDING, r"0\.0012, "), (-1.2 * ROUNDING, r"-0\.0012, ")])
def test_a_value_further_from_a_whole_number_is_refused_and_quoted(off, text):
    with pytest.raises(InputError, match=rf"m\.nii holds the values {text}.* labels range from 0 to 8"):
        as_labels(LABELS + off, PATH, 9)


@pytest.mark.parametrize(
    ("values", "remedy"),
    [
        ([0, 0.25, 0.5, 1], "looks like probabilities or soft edges; threshold it at 0.5"),
        ([0, 40, 128, 255], "looks like 0/255 with soft edges; threshold it, or name the classes"),
        ([0, 65535], "holds only 0 and 65535; save it with 0 and 1"),
        ([0, 1, 7], "check the mask and the list of classes"),
    ],
)
def test_the_remedy_fits_the_values(values, remedy):
    with pytest.raises(InputError, match=remedy):
        as_labels(np.array(values), PATH, 2) if values[1] != 0.25 else as_labels(np.array(values, np.float32), PATH, 2)


@pytest.mark.parametrize(
    ("values", "soft"),
    [
        ([0, 255], False),
        ([0, 1, 255], False),
        ([0, 1, 2, 255], False),
        ([0, 128, 255], False),
        (range(118), False),
        (range(256), True),
        ([0, 3, 60, 126, 130, 250, 255], True),
        ([0, 12, 99, 240, 254], True),
    ],
)
def test_soft_edges_are_told_from_labels(values, soft):
    assert looks_soft(np.array(values)) == soft


@pytest.mark.parametrize("size", [0, 60, CHUNK_PIXELS, CHUNK_PIXELS + 7])
def test_the_pixels_of_every_label_are_counted_up_to_the_last_chunk(size):
    labels = np.random.default_rng(size).integers(0, 3, size, dtype=np.uint8)
    assert pixels_per_label(labels, 5).tolist() == [np.count_nonzero(labels == label) for label in range(5)]


def test_labels_of_a_volume_that_is_not_contiguous_are_counted():
    labels = np.zeros((4, 6, 5), np.uint8)
    labels[::2, 1, ::2] = 2
    assert pixels_per_label(labels[::2].swapaxes(0, 2), 3).tolist() == [54, 0, 6]
