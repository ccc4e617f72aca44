"""Masks are read as labels of the image that they belong to."""

import numpy as np
import PIL.Image
import pytest
from stored_images import (
    RNG,
    SHAPE,
    colours,
    opened,
    picture_image,
    reoriented,
    save,
    save_array,
    save_volume,
    some_labels,
    volume_image,
)
from tiny import write_nifti

from medseg_trt.errors import InputError
from medseg_trt.imaging.images import read_image, read_labels


@pytest.mark.parametrize("mode", ["L", "P", "LA", "RGB", "RGBA"])
def test_label_pictures_of_every_mode_give_the_same_labels(mode, tmp_path):
    labels = some_labels((6, 9))
    picture = PIL.Image.fromarray(labels)
    if mode == "P":
        picture.putpalette([200, 10, 10, 10, 200, 10, 10, 10, 200])
    else:
        picture = picture.convert(mode)
    path = save(picture, tmp_path / "mask.png")
    assert opened(path).mode == mode
    np.testing.assert_array_equal(read_labels(path, picture_image(tmp_path), 3)[0], labels)


def test_a_deep_label_picture_is_read_while_its_values_are_labels(tmp_path):
    labels = some_labels((6, 9)).astype(np.uint16)
    path = save_array(labels, tmp_path / "mask.png")
    np.testing.assert_array_equal(read_labels(path, picture_image(tmp_path), 3)[0], labels)
    save_array(labels + np.uint16(256), path)  # 256 … 258: the lower bytes alone would be labels
    with pytest.raises(InputError, match="256, 257, 258"):
        read_labels(path, picture_image(tmp_path), None)


def test_a_colour_picture_is_no_mask(tmp_path):
    with pytest.raises(InputError, match=r"mask\.png is a colour image; a mask holds label numbers"):
        read_labels(save(colours(), tmp_path / "mask.png"), picture_image(tmp_path), 3)


@pytest.mark.parametrize("high", [1, 255])
@pytest.mark.parametrize("mode", ["L", "1"])
def test_a_binary_mask_may_be_written_as_0_and_255(high, mode, tmp_path):
    truth = RNG.integers(0, 2, (6, 9), dtype=np.uint8)
    path = save_array((truth * high) if mode == "L" else truth.astype(bool), tmp_path / "mask.png")
    np.testing.assert_array_equal(read_labels(path, picture_image(tmp_path), 2)[0], truth)


@pytest.mark.parametrize("num_labels", [2, 3])
def test_a_mask_of_0_1_and_255_is_not_taken_for_a_binary_one(num_labels, tmp_path):
    values = np.zeros((6, 9), np.uint8)
    values[0, 0], values[1, 1] = 1, 255
    with pytest.raises(InputError, match=rf"mask\.png holds the values 255 .* 0 to {num_labels - 1}"):
        read_labels(save_array(values, tmp_path / "mask.png"), picture_image(tmp_path), num_labels)


def test_values_without_a_class_are_named_with_the_file(tmp_path):
    path = save_array(np.arange(54, dtype=np.uint8).reshape(6, 9), tmp_path / "mask.png")
    with pytest.raises(InputError, match=r"mask\.png holds the values 3, 4, 5, 6, 7 …, but labels range from 0 to 2"):
        read_labels(path, picture_image(tmp_path), 3)
    np.testing.assert_array_equal(read_labels(path, picture_image(tmp_path), None).ravel(), np.arange(54))


@pytest.mark.parametrize("shape", [(9, 6), (6, 8), (7, 9)])
def test_a_mask_of_another_size_is_refused(shape, tmp_path):
    path = save_array(np.zeros(shape, np.uint8), tmp_path / "mask.png")
    with pytest.raises(InputError, match=rf"mask\.png is {shape[1]} x {shape[0]} pixels, but its image is 9 x 6"):
        read_labels(path, picture_image(tmp_path), 2)


def test_float_labels_are_read_while_they_are_whole(tmp_path):
    labels = RNG.integers(0, 3, (5, 4, 3)).astype(np.float32)
    image = volume_image(tmp_path)
    path = write_nifti(tmp_path / "mask.nii", labels)
    labels_read = read_labels(path, image, 3)
    np.testing.assert_array_equal(
        labels_read, labels[::-1, ::-1].transpose(2, 1, 0)
    )  # x and y run the other way in LPS
    labels[2, 2, 2] = 0.5
    with pytest.raises(InputError, match=r"mask\.nii holds the values 0\.5 "):
        read_labels(write_nifti(path, labels), image, 3)


@pytest.mark.parametrize("value", [-1, 300, 256])
def test_numbers_that_do_not_fit_a_byte_do_not_wrap_round_to_labels(value, tmp_path):
    labels = np.zeros((5, 4, 3), np.int16)
    labels[0, 0, 0] = value
    with pytest.raises(InputError, match=rf"mask\.nii holds the values {value} "):
        read_labels(write_nifti(tmp_path / "mask.nii", labels), volume_image(tmp_path), None)


def test_the_mask_of_a_volume_is_turned_as_its_image_even_if_it_is_stored_otherwise(tmp_path):
    labels = some_labels()
    image = read_image(save_volume(tmp_path / "scan.nii", *reoriented(labels, (0, 1, 2), (False, True, False))))
    mask = save_volume(tmp_path / "mask.nii", *reoriented(labels, (2, 0, 1), (True, False, False)))
    np.testing.assert_array_equal(read_labels(mask, image, 3), labels)


@pytest.mark.parametrize(("shift_mm", "refused"), [(0.029, False), (0.031, True), (1.5, True)])  # 2 % of 1.5 mm
def test_a_mask_that_lies_elsewhere_is_refused(shift_mm, refused, tmp_path):
    stored, affine = reoriented(some_labels(), (0, 1, 2), (False, False, False))
    image = read_image(save_volume(tmp_path / "scan.nii", stored, affine))
    affine[1, 3] += shift_mm
    mask = save_volume(tmp_path / "mask.nii", stored, affine, codes=(0, 1))
    if refused:
        with pytest.raises(InputError, match=r"mask\.nii has another geometry than its image .*scan\.nii: "):
            read_labels(mask, image, 3)
    else:
        assert read_labels(mask, image, 3).shape == SHAPE


def test_volumes_and_pictures_are_not_mixed(tmp_path):
    png = save_array(np.zeros((4, 5), np.uint8), tmp_path / "mask.png")
    nifti = write_nifti(tmp_path / "mask.nii", np.zeros((5, 4, 3), np.uint8))
    with pytest.raises(InputError, match="give a NIfTI mask"):
        read_labels(png, volume_image(tmp_path), 2)
    with pytest.raises(InputError, match="give a PNG mask"):
        read_labels(nifti, picture_image(tmp_path, (4, 5)), 2)
    with pytest.raises(InputError, match=r"\(4, 4, 5\) slices, rows and columns, but its image is \(3, 4, 5\)"):
        read_labels(write_nifti(nifti, np.zeros((5, 4, 4), np.uint8)), volume_image(tmp_path), 2)
