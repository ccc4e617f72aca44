"""A file is judged by its first bytes, whatever it is called."""

import gzip
import logging
from pathlib import Path

import h5py
import nibabel
import nrrd
import numpy as np
import PIL.Image
import pytest
import SimpleITK
import tifffile
from dicoms import save_series
from tiny import TWO_ORGANS, write_nifti

from medseg_trt.errors import InputError
from medseg_trt.imaging.images import Mask, find_images, read_image, read_labels, write_mask

GREY = np.random.default_rng(0).integers(0, 255, (16, 24), dtype=np.uint8)
VOLUME = np.arange(60, dtype=np.int16).reshape(5, 4, 3)


def write_kind(kind: str, path: Path) -> None:
    """Write a file of a kind, whatever its path is called."""
    named = path.parent / f"written{kind}"
    if kind in (".nii", ".nii.gz"):
        write_nifti(named, VOLUME)
    elif kind == ".nrrd":
        nrrd.write(str(named), GREY.T)
    elif kind == ".tif":
        tifffile.imwrite(named, GREY, photometric="minisblack")
    elif kind == ".npz":
        np.savez(named, image=GREY, label=GREY % 3)
    elif kind == ".h5":
        with h5py.File(named, "w") as file:
            file["image"], file["label"] = GREY, GREY % 3
    elif kind == ".dcm":
        (only,) = save_series(path.parent / "series", GREY[np.newaxis].astype(np.int16)).iterdir()
        only.rename(named)
    else:
        PIL.Image.fromarray(GREY).save(named)
    named.rename(path)


@pytest.mark.parametrize("kind", [".png", ".jpg", ".bmp", ".tif", ".nii", ".nii.gz", ".nrrd", ".npz", ".h5", ".dcm"])
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.nii", "a.nii.gz", "a.nrrd", "a.npz", "a.dcm", "a"])
def test_file_format_is_detected_by_content_and_determines_the_mask_suffix(kind, name, tmp_path):
    write_kind(kind, tmp_path / f"right{kind}")
    write_kind(kind, tmp_path / name)
    expected, image = read_image(tmp_path / f"right{kind}"), read_image(tmp_path / name)
    np.testing.assert_array_equal(image.pixels, expected.pixels)
    labels = (image.pixels[..., 0] % 3).astype(np.uint8)
    path = write_mask(Mask.of(image, labels, TWO_ORGANS), tmp_path / "masks")
    assert path.name == ("a.png" if image.geometry is None else "a.nii.gz")
    np.testing.assert_array_equal(read_labels(path, image, 3), labels)


def test_mismatch_of_content_and_suffix_is_logged(tmp_path, caplog):
    for kind, name in (
        (".png", "a.jpg"),
        (".tif", "b.png"),
        (".nii.gz", "c.nii"),
        (".jpg", "d.jpeg"),
        (".tif", "e.tiff"),
        (".png", "f"),
    ):
        write_kind(kind, tmp_path / name)
        with caplog.at_level(logging.INFO, "medseg_trt"):
            read_image(tmp_path / name)
    for name, said in (("a.jpg", "PNG"), ("b.png", "TIFF"), ("c.nii", "gzip-compressed NIfTI")):
        assert f"{name} is a {said} file by its content and is read as such" in caplog.text
    assert "d.jpeg is" not in caplog.text
    assert "e.tiff is" not in caplog.text
    assert "f is" not in caplog.text, "its name says nothing"


def metaimage(path: Path) -> None:
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(VOLUME), str(path))


OTHER_KINDS = {
    "WebP": lambda path: PIL.Image.fromarray(GREY).save(path, format="WEBP"),
    "GIF": lambda path: PIL.Image.fromarray(GREY).save(path, format="GIF"),
    "JPEG 2000": lambda path: PIL.Image.fromarray(GREY).save(path, format="JPEG2000"),
    "Netpbm": lambda path: PIL.Image.fromarray(GREY).save(path, format="PPM"),
    "PDF": lambda path: PIL.Image.fromarray(GREY).save(path, format="PDF"),
    "NumPy's npy": lambda path: path.write_bytes(b"\x93NUMPY\x01\0" + bytes(99)),
    "NIfTI pair": lambda path: path.write_bytes(nibabel.Nifti1Pair(VOLUME, np.eye(4)).header.binaryblock + bytes(99)),
    "Analyze 7.5": lambda path: path.write_bytes(nibabel.AnalyzeImage(VOLUME, np.eye(4)).header.binaryblock),
    "gzip-compressed PNG": lambda path: path.write_bytes(gzip.compress(PIL.Image.fromarray(GREY)._repr_png_() or b"")),
    "bzip2": lambda path: path.write_bytes(b"BZh91AY&SY"),
}


@pytest.mark.parametrize("kind", list(OTHER_KINDS))
@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.nii.gz", "a.xyz"])
def test_unsupported_format_error_suggests_a_conversion(kind, name, tmp_path):
    OTHER_KINDS[kind](tmp_path / name)
    with pytest.raises(
        InputError, match=rf"{name} is a {kind}.* which is not supported; (convert|save|unpack) "
    ) as caught:
        read_image(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_metaimage_is_refused_with_conversion_advice(tmp_path):
    metaimage(tmp_path / "a.mha")
    (tmp_path / "a.mha").rename(tmp_path / "a.nii")
    with pytest.raises(InputError, match=r"a\.nii is a MetaImage file.*convert it to NIfTI or NRRD"):
        read_image(tmp_path / "a.nii")


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.nii", "a.nii.gz", "a.nrrd", "a.npz", "a.h5"])
@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "cannot be read: it is empty"), (b"no image here " * 99, "(is not an?|.* are not those of a) [A-Z]")],
)
def test_an_empty_or_unknown_file_is_named_as_such(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name} {message}"):
        read_image(tmp_path / name)


def test_files_with_wrong_suffixes_in_a_folder_are_found_once_each(tmp_path):
    write_kind(".dcm", tmp_path / "b.png")
    write_kind(".png", tmp_path / "c.dcm")
    PIL.Image.fromarray(GREY).save(tmp_path / "d.jpg", format="WEBP")
    sources = find_images([tmp_path])
    assert sorted(source.files[0].name for source in sources) == ["b.png", "c.dcm", "d.jpg"]
    for source in sources:
        if source.files[0].name != "d.jpg":
            np.testing.assert_array_equal(read_image(source).pixels[0, ..., 0], GREY)


def test_a_dicom_file_whose_preamble_is_a_tiff_header_is_dicom(tmp_path):
    write_kind(".dcm", tmp_path / "a.dcm")
    content = (tmp_path / "a.dcm").read_bytes()
    (tmp_path / "a.tif").write_bytes(b"II*\0" + content[4:])
    assert read_image(tmp_path / "a.tif").geometry is not None
