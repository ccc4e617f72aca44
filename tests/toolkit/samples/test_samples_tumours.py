"""Generated NRRD files for what is refused; the real scans where pip can fetch them."""

import json
from pathlib import Path

import nibabel
import nrrd
import numpy as np
import pytest
from scipy import ndimage

from medseg_trt.errors import ArtefactError
from medseg_trt.imaging.images import read_image, read_labels
from medseg_trt.samples.catalogue import NetworkError, get
from medseg_trt.samples.tumours import DATA, DATASET, LICENCE, SCANS, read_nrrd, unpack_tumours
from medseg_trt.train.datasets.folder import open_folder

REVERSED_Y = np.diag([2.0, -3.0, 4.0])
ORIGIN_MM = (10.0, 20.0, 30.0)


@pytest.fixture(scope="module")
def tumours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the data set ``tumours``: three MR and two CT scans."""
    try:
        return get(["tumours"], tmp_path_factory.mktemp("samples"))[0]
    except NetworkError as error:
        pytest.skip(str(error))


def generated(values: np.ndarray, folder: Path, space: str = "left-posterior-superior", shift_mm: float = 0.0) -> bytes:
    header = {
        "space": space,
        "space directions": REVERSED_Y,
        "encoding": "gzip",
        "space origin": np.add(ORIGIN_MM, shift_mm),
    }
    nrrd.write(str(folder / "a.nrrd"), values, header)
    return (folder / "a.nrrd").read_bytes()


def members(folder: Path, mask_shift_mm: float = 0.0) -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    values = rng.integers(-1000, 1000, (5, 4, 3)).astype(np.int16)
    mask = np.where(values > 0, 7, 0).astype(np.int32)
    files = {LICENCE: b"generated"}
    for scan in SCANS:
        files[f"{DATA}/{scan}_image.nrrd"] = generated(values, folder)
        files[f"{DATA}/{scan}_label.nrrd"] = generated(mask, folder, shift_mm=mask_shift_mm)
    return files


def test_read_nrrd_keeps_voxels_and_patient_positions(tmp_path):
    values = np.arange(60, dtype=np.int16).reshape(5, 4, 3) - 30
    volume = read_nrrd(generated(values, tmp_path), "generated")
    np.testing.assert_array_equal(volume.voxels, values)
    column, row, plane = 4, 3, 2
    left, posterior, superior = np.array([2.0 * column, -3.0 * row, 4.0 * plane]) + ORIGIN_MM
    np.testing.assert_allclose(volume.affine @ [column, row, plane, 1], [-left, -posterior, superior, 1])


def test_a_label_of_any_number_is_the_tumour(tmp_path):
    (tmp_path / "out").mkdir()
    unpack_tumours(members(tmp_path), tmp_path / "out")
    mask = nibabel.Nifti1Image.from_filename(tmp_path / "out" / "masks" / "lung1.nii.gz")
    image = nibabel.Nifti1Image.from_filename(tmp_path / "out" / "images" / "lung1.nii.gz")
    np.testing.assert_array_equal(np.asarray(mask.dataobj), np.asarray(image.dataobj) > 0)
    np.testing.assert_array_equal(mask.affine, image.affine)
    assert (tmp_path / "out" / "LICENSE.txt").read_bytes() == b"generated"


def test_a_mask_in_another_place_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ArtefactError, match=r"brain1_label\.nrrd does not lie on the grid"):
        unpack_tumours(members(tmp_path, mask_shift_mm=2.0), tmp_path / "out")


def test_read_nrrd_refuses_another_space_or_more_than_16_bits(tmp_path):
    with pytest.raises(ArtefactError, match="no volume in the space left-posterior-superior"):
        read_nrrd(generated(np.zeros((5, 4, 3), np.int16), tmp_path, "right-anterior-superior"), "generated")
    with pytest.raises(ArtefactError, match="more than 16 bits"):
        read_nrrd(generated(np.full((5, 4, 3), 40000, np.int32), tmp_path), "generated")


@pytest.mark.network
def test_the_real_scans_are_divided_by_scan(tumours):
    data = open_folder(tumours)
    names = {split: sorted(case.name for case in cases) for split, cases in data.splits.items()}
    assert names == {"train": ["brain1", "lung2"], "val": ["breast1"], "test": ["brain2", "lung1"]}
    assert data.classes.names == ("background", "tumour")
    assert data.classes.num_logits == 1


# Slices, voxels of the tumour and slices that hold it, as PyRadiomics' own files have them (read with pynrrd alone).
REAL = {
    "brain1": (25, 4137, 7),
    "brain2": (23, 453, 3),
    "breast1": (21, 143, 3),
    "lung1": (48, 837, 3),
    "lung2": (61, 24644, 11),
}


@pytest.mark.network
@pytest.mark.parametrize("scan", SCANS)
def test_the_real_tumours_are_brighter_than_what_is_round_them(tumours, scan):
    image = read_image(tumours / "images" / f"{scan}.nii.gz")
    labels = read_labels(tumours / "masks" / f"{scan}.nii.gz", image, 2) == 1
    holding = labels.any(axis=(1, 2))
    assert (image.num_slices, int(labels.sum()), int(holding.sum())) == REAL[scan]
    values = image.pixels[..., 0].astype(float)
    here = brightness(values, labels)
    # Measured: 0.35 for brain2, whose tumour touches the bright skull, and 1.2 to 2.0 for the others.
    assert here > 0.3
    if scan != "brain2":
        elsewhere = [brightness(values, np.roll(labels[flip], shift, (1, 2))) for flip, shift in MOVED]
        assert max(elsewhere) < here / 1.5  # the nearest comes to 1 / 1.8


MOVED = [(np.s_[:, :, ::-1], 0), (np.s_[:, ::-1], 0), (np.s_[:], (8, 0)), (np.s_[:], (0, 8))]  # a flip, and pixels


def brightness(values: np.ndarray, labels: np.ndarray) -> float:
    """Return how far the median inside is above that of a rim of three pixels, in standard deviations of both."""
    rim = ndimage.binary_dilation(labels, np.ones((1, 3, 3), bool), 3) & ~labels
    return (np.median(values[labels]) - np.median(values[rim])) / values[labels | rim].std()


@pytest.mark.network
def test_the_split_notes_count_what_is_there(tumours):
    written = json.loads((tumours / "dataset.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(DATASET))
    for split, entries in DATASET["splits"].items():
        counts = np.sum([REAL[entry["image"]] for entry in entries], axis=0)
        assert f"{counts[0]} slices, {counts[2]} " in written["split_notes"][split]
    text = (tumours / "README.md").read_text(encoding="utf-8")
    for scan in SCANS:
        assert any(line.startswith(f"| {scan} ") and line.endswith(f"| {REAL[scan][2]} |") for line in text.split("\n"))
    assert "cannot prove" in text
