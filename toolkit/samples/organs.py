"""Convert the test scans of TotalSegmentator to the data set ``organs``.

Images and masks become NIfTI files on the same grid. The eight organs of the Synapse (BTCV) task get the labels 1 to 8,
and other header fields are dropped. The one DICOM series is also kept as it is, anonymised by its authors. The labels
are TotalSegmentator's predictions.
"""

import gzip
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
from jaxtyping import Float64, Int16, UInt8

from medseg_trt.errors import ArtefactError
from medseg_trt.files import write_json
from medseg_trt.progress import track

REFERENCE = "totalsegmentator-2.18.0/tests/reference_files"
LICENCE = "totalsegmentator-2.18.0/LICENSE"
MAX_VOLUME_BYTES = 64 << 20  # of one decompressed NIfTI file; the largest here has 6 MiB
GRID_TOLERANCE_MM = 1e-2  # largest distance between the grids of an image and its mask

ORGANS = ("spleen", "kidney_right", "kidney_left", "gallbladder", "liver", "stomach", "pancreas", "aorta")
CT_LABELS = (1, 2, 3, 4, 5, 6, 7, 52)  # TotalSegmentator's number of each organ in CT
MR_LABELS = (1, 2, 3, 4, 5, 6, 7, 23)  # ... and in MR

DATASET = {
    "name": "organs",
    "classes": ["background", *ORGANS],
    "window": [-125, 275],
    "note": (
        "Labels by TotalSegmentator, not drawn by hand; Apache-2.0. Three patients: the figures show that the tool "
        "works and mean nothing clinically. mr_C, an MR scan, is in no split."
    ),
    "split_notes": {
        "train": "ct_A, the slices outside val and its gaps",
        "val": "the same patient as train: 14 slices of ct_A with a gap of 3 (9 mm) on either side",
        "test": "another scan: ct_B, with contrast agent; kidneys and gallbladder are not in it",
    },
    "splits": {
        "train": [{"image": "ct_A", "slices": [0, 88]}, {"image": "ct_A", "slices": [108, 112]}],
        "val": [{"image": "ct_A", "slices": [91, 105]}],
        "test": [{"image": "ct_B"}],
    },
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Scan:
    """Where one scan lies in the package; ``image`` is a NIfTI file or the pattern of a DICOM series."""

    image: str
    mask: str
    labels: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Volume:
    """Voxels on a grid, as NIfTI orders them."""

    voxels: Int16[np.ndarray, "columns rows slices"]
    affine: Float64[np.ndarray, "4 4"]  # from (column, row, slice, 1) to millimetres right, anterior, superior


SCANS: Mapping[str, Scan] = {
    "ct_A": Scan(
        image=f"{REFERENCE}/example_ct.nii.gz",
        mask=f"{REFERENCE}/example_seg_fast_force_split.nii.gz",
        labels=CT_LABELS,
    ),
    "ct_B": Scan(
        image=f"{REFERENCE}/example_ct_dicom/CT.*",
        mask=f"{REFERENCE}/example_seg_dicom.nii.gz",
        labels=CT_LABELS,
    ),
    "mr_C": Scan(
        image=f"{REFERENCE}/example_mr_sm.nii.gz",
        mask=f"{REFERENCE}/example_seg_mr.nii.gz",
        labels=MR_LABELS,
    ),
}
ORGANS_MEMBERS = (LICENCE, *(name for scan in SCANS.values() for name in (scan.image, scan.mask)))


def unpack_organs(members: Mapping[str, bytes], folder: Path) -> None:
    """Write ``images/``, ``masks/``, ``dicom/``, ``dataset.json`` and the licence into ``folder``.

    The same package gives the same bytes on the same machine.

    Raises:
        ArtefactError: a mask does not lie on its image's grid, or a series has a gap.
    """
    for subfolder in ("images", "masks"):
        (folder / subfolder).mkdir()
    for name, scan in track(SCANS.items(), "convert scans"):
        series = [content for member, content in sorted(members.items()) if fnmatchcase(member, scan.image)]
        image = read_nifti(series[0], scan.image) if scan.image.endswith(".nii.gz") else read_dicom(series, name)
        mask = on_grid_of(image, read_nifti(members[scan.mask], scan.mask), scan.mask)
        write_nifti(folder / "images" / f"{name}.nii.gz", image.voxels, image.affine)
        write_nifti(folder / "masks" / f"{name}.nii.gz", relabel(mask.voxels, scan.labels), image.affine)
        if not scan.image.endswith(".nii.gz"):
            write_series(folder / "dicom" / name, series)
    (folder / "LICENSE").write_bytes(members[LICENCE])
    write_json(folder / "dataset.json", DATASET)


def write_series(folder: Path, files: Sequence[bytes]) -> None:
    """Write the files of a DICOM series as they are; some of their UIDs are empty."""
    folder.mkdir(parents=True)
    for index, content in enumerate(files):
        (folder / f"{index:03}.dcm").write_bytes(content)


def relabel(
    labels: Int16[np.ndarray, "columns rows slices"], numbers: Sequence[int]
) -> UInt8[np.ndarray, "columns rows slices"]:
    """Give the structures ``numbers`` the labels 1, 2, 3 … in their order, and everything else 0."""
    table = np.zeros(256, np.uint8)
    table[list(numbers)] = np.arange(1, len(numbers) + 1)
    return table[labels]


def read_nifti(content: bytes, name: str) -> Volume:
    """Decode a gzipped NIfTI-1 file of whole numbers that fit in 16 bits.

    Raises:
        ArtefactError: it is larger than ``MAX_VOLUME_BYTES``.
    """
    import nibabel as nib

    with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
        plain = file.read(MAX_VOLUME_BYTES + 1)
    if len(plain) > MAX_VOLUME_BYTES:
        raise ArtefactError(f"{name} holds more than {MAX_VOLUME_BYTES >> 20} MiB; the file is not to be trusted")
    image = nib.Nifti1Image.from_bytes(plain)
    return Volume(voxels=np.asanyarray(image.dataobj).astype(np.int16), affine=np.asarray(image.affine, np.float64))


def read_dicom(files: Sequence[bytes], name: str) -> Volume:
    """Decode the slices of one DICOM series and put them in order along the patient.

    The distance of the slices comes from their positions: SliceThickness may differ from it, and does here.

    Raises:
        ArtefactError: the slices are not evenly spaced, so one may be missing.
    Source: DICOM PS3.3 C.7.6.2.1.1, image plane to patient coordinates (left, posterior, superior).
    """
    import pydicom

    slices = [pydicom.dcmread(io.BytesIO(content)) for content in files]
    along_row, along_column = np.asarray(slices[0].ImageOrientationPatient, np.float64).reshape(2, 3)
    normal = np.cross(along_row, along_column)
    slices.sort(key=lambda plane: float(np.dot(plane.ImagePositionPatient, normal)))

    positions = np.array([plane.ImagePositionPatient for plane in slices], np.float64)  # (slices, 3)
    steps = np.diff(positions, axis=0)
    if not np.allclose(steps, steps[0], atol=GRID_TOLERANCE_MM):
        raise ArtefactError(f"{name}: the slices of the series are not evenly spaced; one may be missing")
    between_rows, between_columns = (float(mm) for mm in slices[0].PixelSpacing)

    affine = np.eye(4)
    affine[:3, :3] = np.stack([along_row * between_columns, along_column * between_rows, steps[0]], axis=1)
    affine[:3, 3] = positions[0]
    voxels = np.stack([plane.pixel_array * plane.RescaleSlope + plane.RescaleIntercept for plane in slices])
    lps_to_ras = np.diag([-1.0, -1.0, 1.0, 1.0])
    return Volume(voxels=voxels.transpose(2, 1, 0).astype(np.int16), affine=lps_to_ras @ affine)


def on_grid_of(image: Volume, mask: Volume, name: str) -> Volume:
    """Turn a mask's axes the way its image's axes run.

    Raises:
        ArtefactError: its grid is another one even so.
    """
    import nibabel as nib

    turn = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(mask.affine), nib.orientations.io_orientation(image.affine)
    )
    voxels = np.ascontiguousarray(nib.orientations.apply_orientation(mask.voxels, turn))
    affine = mask.affine @ nib.orientations.inv_ornt_aff(turn, mask.voxels.shape)
    if voxels.shape != image.voxels.shape or not np.allclose(affine, image.affine, atol=GRID_TOLERANCE_MM):
        raise ArtefactError(f"{name} does not lie on the grid of its image")
    return Volume(voxels=voxels, affine=affine)


def write_nifti(
    path: Path,
    voxels: Int16[np.ndarray, "columns rows slices"] | UInt8[np.ndarray, "columns rows slices"],
    affine: Float64[np.ndarray, "4 4"],
) -> None:
    """Write a gzipped NIfTI-1 file that says nothing but voxels, grid and millimetres, not even when it was written."""
    import nibabel as nib

    image = nib.Nifti1Image(voxels, affine)
    image.header.set_xyzt_units("mm")
    path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=6, mtime=0))
