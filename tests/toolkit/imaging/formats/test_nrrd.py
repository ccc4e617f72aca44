"""NRRD files, written with pynrrd or by hand; nibabel reads the same volume as NIfTI."""

import bz2
import gzip
from pathlib import Path

import nibabel
import nrrd
import numpy as np
import pytest
from itk import require_seen_alike
from tiny import TWO_ORGANS

from medseg_trt.errors import InputError
from medseg_trt.imaging.images import Mask, read_image, read_labels, write_mask

SHAPE = (5, 4, 3)  # columns, rows, slices
AFFINE = np.array([[-2.0, 0, 0, 31], [0, 1.5, 0, -12], [0, 0, 3, 7], [0, 0, 0, 1]])  # to right, anterior, superior
TO_SPACE = {
    "right-anterior-superior": (1, 1, 1),
    "left-posterior-superior": (-1, -1, 1),
    "left-anterior-superior": (-1, 1, 1),
}


def numbers() -> np.ndarray:
    return np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)


def save(
    path: Path, values: np.ndarray, affine: np.ndarray = AFFINE, space="left-posterior-superior", **fields
) -> Path:
    placed = np.diag([*TO_SPACE[space], 1]) @ affine
    header = {"space": space, "space directions": placed[:3, :3].T, "space origin": placed[:3, 3], "encoding": "raw"}
    nrrd.write(str(path), values, header | fields)
    return path


def raw(path: Path, *lines: str, content: bytes = b"", magic: str = "NRRD0004", newline: str = "\n") -> Path:
    path.write_bytes(newline.join([magic, *lines, "", ""]).encode() + content)
    return path


PLAIN = ("type: short", "dimension: 3", "sizes: 5 4 3", "endian: little")


@pytest.mark.parametrize("space", list(TO_SPACE))
@pytest.mark.parametrize("flip", [(1, 1, 1), (-1, 1, 1), (1, -1, -1)])
def test_a_volume_is_read_as_its_nifti_twin_and_its_mask_lies_in_the_same_place(space, flip, tmp_path):
    affine = AFFINE @ np.diag([*flip, 1])
    nibabel.save(nibabel.Nifti1Image(numbers(), affine), tmp_path / "twin.nii")
    image, twin = read_image(save(tmp_path / "a.nrrd", numbers(), affine, space)), read_image(tmp_path / "twin.nii")
    np.testing.assert_array_equal(image.pixels, twin.pixels)
    assert image.spacing_mm == pytest.approx(twin.spacing_mm)
    labels = (image.pixels[..., 0] % 3).astype(np.uint8)
    path = write_mask(Mask.of(image, labels, TWO_ORGANS), tmp_path / "masks")
    assert path.name == "a.nii.gz"
    written = nibabel.load(path)
    np.testing.assert_array_equal(np.asanyarray(written.dataobj), numbers() % 3)  # pyright: ignore
    np.testing.assert_allclose(written.affine, affine, atol=1e-6)  # pyright: ignore  # float32 of at most 31 mm
    require_seen_alike(path)
    np.testing.assert_array_equal(read_labels(path, image, 3), labels)
    np.testing.assert_array_equal(read_labels(path, twin, 3), labels)


def test_an_nrrd_mask_of_a_nifti_volume_is_turned_as_its_image(tmp_path):
    nibabel.save(nibabel.Nifti1Image(numbers(), AFFINE), tmp_path / "a.nii")
    image = read_image(tmp_path / "a.nii")
    flipped = AFFINE @ np.array([[1, 0, 0, 0], [0, -1, 0, SHAPE[1] - 1], [0, 0, 1, 0], [0, 0, 0, 1]])
    mask = save(tmp_path / "m.nrrd", (numbers() % 3)[:, ::-1].astype(np.uint8), flipped)
    np.testing.assert_array_equal(read_labels(mask, image, 3), image.pixels[..., 0] % 3)
    moved = AFFINE.copy()
    moved[0, 3] += 1
    with pytest.raises(InputError, match=r"m\.nrrd has another geometry than its image"):
        read_labels(save(mask, (numbers() % 3).astype(np.uint8), moved), image, 3)


@pytest.mark.parametrize("encoding", ["raw", "gzip", "bzip2", "ascii"])
@pytest.mark.parametrize("dtype", ["u1", "i2", "u2", "i4", "f4", "f8"])
def test_every_encoding_gives_the_same_numbers(encoding, dtype, tmp_path):
    path = save(tmp_path / "a.nrrd", numbers().astype(dtype), encoding=encoding)
    pixels = read_image(path).pixels[..., 0]
    np.testing.assert_array_equal(np.sort(pixels, axis=None), np.arange(60))
    assert pixels.dtype == dtype


def test_big_endian_skips_and_windows_lines_are_understood(tmp_path):
    lines = (*PLAIN[:3], "endian: big", "encoding: raw", "byte skip: -1")
    path = raw(tmp_path / "a.nrrd", *lines, content=b"junk" + numbers().astype(">i2").tobytes("F"), newline="\r\n")
    np.testing.assert_array_equal(read_image(path).pixels[..., 0], numbers().transpose(2, 1, 0))
    lines = (*PLAIN, "encoding: raw", "line skip: 1", "byte skip: 2")
    path = raw(tmp_path / "b.nrrd", *lines, content=b"a line\nab" + numbers().tobytes("F"))
    np.testing.assert_array_equal(read_image(path).pixels[..., 0], numbers().transpose(2, 1, 0))


def test_without_a_space_the_spacings_count_and_a_warning_says_so(tmp_path, caplog):
    path = raw(tmp_path / "a.nrrd", *PLAIN, "encoding: raw", "spacings: 2 1.5 3", content=numbers().tobytes("F"))
    assert read_image(path).spacing_mm == (3.0, 1.5, 2.0)
    assert "has no orientation" in caplog.text


def test_colours_and_pictures_of_two_axes_are_read(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (3, *SHAPE), dtype=np.uint8)
    lines = ("type: uchar", "dimension: 4", "sizes: 3 5 4 3", "kinds: RGB-color domain domain domain", "encoding: raw")
    pixels = read_image(raw(tmp_path / "rgb.nrrd", *lines, content=colours.tobytes("F"))).pixels
    np.testing.assert_array_equal(pixels, colours.transpose(3, 2, 1, 0))
    flat = np.arange(20, dtype=np.uint8).reshape(5, 4)
    lines = ("type: uchar", "dimension: 2", "sizes: 5 4", "encoding: raw")
    image = read_image(raw(tmp_path / "flat.nrrd", *lines, content=flat.tobytes("F")))
    np.testing.assert_array_equal(image.pixels[0, ..., 0], flat.T)
    assert image.geometry is None
    assert write_mask(Mask.of(image, (flat.T % 3)[np.newaxis], TWO_ORGANS), tmp_path / "masks").suffix == ".png"


def test_a_detached_header_takes_its_voxels_from_its_own_folder(tmp_path):
    (tmp_path / "voxels.raw.gz").write_bytes(gzip.compress(numbers().tobytes("F")))
    path = raw(tmp_path / "a.nhdr", *PLAIN, "encoding: gzip", "data file: voxels.raw.gz")
    np.testing.assert_array_equal(read_image(path).pixels[..., 0], numbers().transpose(2, 1, 0))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../voxels.raw", "outside its folder"),
        ("/etc/passwd", "outside its folder"),
        ("sub/../../voxels.raw", "outside its folder"),
        ("http://example.org/voxels.raw", "not in its folder"),
        ("link.raw", "outside its folder"),
        ("nowhere.raw", "not in its folder"),
        ("slice%03d.raw 1 3 1", "in several files"),
        ("LIST\nslice1.raw\nslice2.raw", "in several files; save it as one"),
        ("LIST 2\nslice1.raw", "in several files; save it as one"),
    ],
)
def test_nrrd_data_outside_its_folder_or_in_several_files_is_refused(name, message, tmp_path):
    folder = tmp_path / "scans"
    folder.mkdir()
    (tmp_path / "voxels.raw").write_bytes(numbers().tobytes("F"))
    (folder / "link.raw").symlink_to(tmp_path / "voxels.raw")
    with pytest.raises(InputError, match=message) as caught:
        read_image(raw(folder / "a.nhdr", *PLAIN, "encoding: raw", f"data file: {name}"))
    assert "a.nhdr" in str(caught.value)


@pytest.mark.parametrize(("encoding", "pack"), [("gzip", gzip.compress), ("bzip2", bz2.compress)])
def test_no_more_is_inflated_than_the_header_says(encoding, pack, tmp_path):
    padded = pack(numbers().tobytes("F") + b"\0" * 512)
    path = raw(tmp_path / "a.nrrd", *PLAIN, f"encoding: {encoding}", content=padded)
    np.testing.assert_array_equal(read_image(path).pixels[..., 0], numbers().transpose(2, 1, 0))
    for more in (b"\0" * 2**26, b"\1\0"):
        raw(path, *PLAIN, f"encoding: {encoding}", content=pack(numbers().tobytes("F") + more))
        with pytest.raises(InputError, match=r"a\.nrrd holds more pixels than the 120 bytes"):
            read_image(path)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (("type: short", "dimension: 3", "sizes: 60000 60000 60000", "encoding: raw"), "says it has 60000 x 60000"),
        (("type: short", "dimension: 3", "sizes: 5 4 -3", "encoding: raw"), "says it has 5 x 4 x -3 pixels"),
        (("type: short", "dimension: 4", "sizes: 5 4 3 2", "encoding: raw"), "a volume has three axes"),
        (("type: block", "dimension: 3", "sizes: 5 4 3", "encoding: raw"), "type block"),
        ((*PLAIN, "encoding: zrl"), "encoded as zrl; supported: raw"),
        ((*PLAIN, "encoding: raw"), "cut short: it holds 0 of 120 bytes"),
        ((*PLAIN, "encoding: ascii"), "cut short: it holds 0 of 60 values"),
        (("type: short", "sizes: 5 4 3", "encoding: raw"), "cannot be read"),
        ((*PLAIN, "encoding: raw", "byte skip: 99999999999"), "impossible byte skip"),
        ((*PLAIN, "encoding: raw", "space: scanner-xyz", "space directions: (1,0,0) (0,1,0) (0,0,1)"), "has the space"),
        (
            (*PLAIN, "encoding: raw", "space: LPS", "space directions: (1,0,0) (1,0,0) (0,0,1)"),
            "linearly dependent axes",
        ),
        (("# " + "x" * 2**20,), "header of more than"),
    ],
)
def test_headers_that_cannot_be_are_refused_in_one_line(lines, message, tmp_path):
    with pytest.raises(InputError, match=message) as caught:
        read_image(raw(tmp_path / "a.nrrd", *lines, content=b"" if "cut short" in message else bytes(240)))
    assert "a.nrrd" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_nrrd_and_every_truncation_is_refused(tmp_path):
    path = tmp_path / "cut.nrrd"
    path.write_bytes(b"no volume" * 99)
    with pytest.raises(InputError, match="is not an NRRD file"):
        read_image(path)
    whole = save(tmp_path / "a.nrrd", numbers(), encoding="gzip").read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"cut\.nrrd"):
            read_image(path)


@pytest.mark.parametrize("kinds", ["domain domain domain list", "space space space time", None])
def test_a_closing_axis_of_one_is_dropped_as_in_nifti(kinds, tmp_path):
    nibabel.save(nibabel.Nifti1Image(numbers()[..., np.newaxis], AFFINE), tmp_path / "twin.nii")
    lines = ["type: short", "dimension: 4", "sizes: 5 4 3 1", "endian: little", "encoding: raw", "space: RAS"]
    lines += ["space directions: (-2,0,0) (0,1.5,0) (0,0,3) none", "space origin: (31,-12,7)"]
    lines += [f"kinds: {kinds}"] * (kinds is not None)
    image, twin = read_image(raw(tmp_path / "a.nrrd", *lines, content=numbers().tobytes("F"))), tmp_path / "twin.nii"
    np.testing.assert_array_equal(image.pixels, read_image(twin).pixels)
    path = write_mask(Mask.of(image, (image.pixels[..., 0] % 3).astype(np.uint8), TWO_ORGANS), tmp_path / "masks")
    np.testing.assert_array_equal(np.asanyarray(nibabel.load(path).dataobj), numbers() % 3)  # pyright: ignore


def test_a_list_axis_of_one_that_comes_first_is_dropped_and_one_of_more_is_refused(tmp_path):
    lines = ("type: short", "dimension: 4", "endian: little", "encoding: raw", "kinds: list domain domain domain")
    image = read_image(raw(tmp_path / "a.nrrd", *lines, "sizes: 1 5 4 3", content=numbers().tobytes("F")))
    np.testing.assert_array_equal(image.pixels[..., 0], numbers().transpose(2, 1, 0))
    with pytest.raises(InputError, match="split a series into its volumes"):
        read_image(raw(tmp_path / "a.nrrd", *lines, "sizes: 2 5 4 3", content=bytes(240)))


def test_layers_of_slicer_are_named_with_how_to_export_them(tmp_path):
    lines = ("type: uchar", "dimension: 4", "sizes: 2 5 4 3", "encoding: raw", "kinds: list domain domain domain")
    path = raw(tmp_path / "a.seg.nrrd", *lines, "Segment0_ID:=Segment_1", "Segment0_Layer:=0", content=bytes(120))
    with pytest.raises(InputError, match=r"a\.seg\.nrrd is a segmentation of 3D Slicer in 2 layers.*label map.*Export"):
        read_image(path)


def test_a_single_slice_cut_in_any_direction_stays_one(tmp_path):
    affine = np.eye(4)[:, [0, 2, 1, 3]]
    image = read_image(save(tmp_path / "a.nrrd", numbers()[:, :, :1], affine))
    np.testing.assert_array_equal(image.pixels[..., 0], [numbers()[:, :, 0].T])


@pytest.mark.parametrize(
    ("spacings", "expected_mm", "is_said"),
    [("2 1.5 3", (3, 1.5, 2), False), ("2 1.5 NaN", (1, 1.5, 2), True), (None, (1, 1, 1), True)],
)
def test_assumed_nrrd_spacing_is_logged(spacings, expected_mm, is_said, tmp_path, caplog):
    lines = [*PLAIN, "encoding: raw", *([f"spacings: {spacings}"] if spacings else [])]
    image = read_image(raw(tmp_path / "a.nrrd", *lines, content=numbers().tobytes(order="F")))
    assert image.spacing_mm == pytest.approx(expected_mm)
    assert ("1 mm is assumed" in caplog.text) == is_said
