"""Make the data set ``tumours`` out of the scans that PyRadiomics ships to test itself.

Images and masks become NIfTI files of the same grid, with the scanner's own values and geometry, and nothing else of a
file's header goes along.
"""

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from medseg_trt.errors import ArtefactError
from medseg_trt.files import write_json
from medseg_trt.progress import track
from medseg_trt.samples.organs import Volume, on_grid_of, write_nifti

DATA = "pyradiomics-3.0.1/data"
LICENCE = "pyradiomics-3.0.1/LICENSE.txt"
SCANS = ("brain1", "brain2", "breast1", "lung1", "lung2")
TUMOURS_MEMBERS = (LICENCE, *(f"{DATA}/{scan}_{part}.nrrd" for scan in SCANS for part in ("image", "label")))
SPACE = "left-posterior-superior"  # of all ten files

DATASET = {
    "name": "tumours",
    "classes": ["background", "tumour"],
    "window": [-200, 1200],
    "note": (
        "Five scans with one tumour each, in masks of unknown authors; BSD-3-Clause. The figures show "
        "that the tool works and mean nothing clinically."
    ),
    "split_notes": {
        "train": "brain1 (MR) and lung2 (CT): 86 slices, 18 of them with a tumour",
        "val": "breast1 (MR), another part of the body than any in train: 21 slices, 3 with a tumour",
        "test": "brain2 (MR) and lung1 (CT), other scans than in train: 71 slices, 6 with a tumour",
    },
    "splits": {
        "train": [{"image": "brain1"}, {"image": "lung2"}],
        "val": [{"image": "breast1"}],
        "test": [{"image": "brain2"}, {"image": "lung1"}],
    },
}

README = """# Tumours in five scans

Made by `medseg-trt samples get tumours` from the test data of PyRadiomics 3.0.1, pinned by SHA-256 (`sample.json`).

| scan | kind | columns x rows x slices | mm | slices with the tumour |
|:--|:--|--:|--:|--:|
| brain1 | MR | 256 x 256 x 25 | 0.78 x 0.78 x 6.5 | 7 |
| brain2 | MR | 256 x 256 x 23 | 0.78 x 0.78 x 6.5 | 3 |
| breast1 | MR, cut out | 45 x 120 x 21 | 0.66 x 0.66 x 2.1 | 3 |
| lung1 | CT | 512 x 512 x 48 | 0.57 x 0.57 x 5 | 3 |
| lung2 | CT | 512 x 512 x 61 | 0.63 x 0.63 x 5 | 11 |

**What it can prove:** that reading, training, building and inference work on real MR and CT with one small structure in
a few slices, on grids of different spacing, two of them with a reversed axis.

**What it cannot prove:** any accuracy. There are five scans and 27 slices with a tumour; one scan chooses the best
epoch and two test it. No figure from here can be compared with a published one.

- Splits are by scan, never by slice: train brain1 and lung2, val breast1, test brain2 and lung1.
- One fixed window, -200 to 1200, serves both kinds. In CT these are Hounsfield units: air and lung are cut off at -200.
  In MR the unit is arbitrary and differs between scans: the tumour has a median of 812 in brain1, 375 in brain2 and 130
  in breast1. A network must cope with that by itself.
- Who drew the masks, how, and where the scans come from is not said in the package.
- PyRadiomics is under the BSD-3-Clause licence (`LICENSE.txt`); the package says nothing of its scans alone.
"""


def unpack_tumours(members: Mapping[str, bytes], folder: Path) -> None:
    """Write ``images/``, ``masks/``, ``dataset.json``, ``README.md`` and the licence into ``folder``.

    The same package gives the same bytes on the same machine.

    Raises:
        ArtefactError: a file is not one of the kind that is expected, or a mask does not lie on its image's grid.
    """
    for subfolder in ("images", "masks"):
        (folder / subfolder).mkdir()
    for scan in track(SCANS, "convert scans"):
        image_name, mask_name = (f"{DATA}/{scan}_{part}.nrrd" for part in ("image", "label"))
        image = read_nrrd(members[image_name], image_name)
        mask = on_grid_of(image, read_nrrd(members[mask_name], mask_name), mask_name)
        write_nifti(folder / "images" / f"{scan}.nii.gz", image.voxels, image.affine)
        write_nifti(folder / "masks" / f"{scan}.nii.gz", (mask.voxels > 0).astype(np.uint8), image.affine)
    (folder / "LICENSE.txt").write_bytes(members[LICENCE])
    (folder / "README.md").write_text(README, encoding="utf-8")
    write_json(folder / "dataset.json", DATASET)


def read_nrrd(content: bytes, name: str) -> Volume:
    """Decode an NRRD volume of whole numbers that fit in 16 bits.

    Raises:
        ArtefactError: it has other axes, lies in another space, or holds larger numbers.
    Source: teem.sourceforge.net/nrrd/format.html, section 5, orientation.
    """
    import nrrd

    file = io.BytesIO(content)
    header = nrrd.read_header(file)
    if header["dimension"] != 3 or header.get("space") != SPACE:
        raise ArtefactError(f"{name} is no volume in the space {SPACE}")
    voxels = nrrd.read_data(header, file)  # (columns, rows, slices)
    limits = np.iinfo(np.int16)
    if voxels.min() < limits.min or voxels.max() > limits.max:
        raise ArtefactError(f"{name} holds numbers of more than 16 bits")
    affine = np.eye(4)
    affine[:3, :3] = np.asarray(header["space directions"], np.float64).T
    affine[:3, 3] = header["space origin"]
    lps_to_ras = np.diag([-1.0, -1.0, 1.0, 1.0])
    return Volume(voxels=np.ascontiguousarray(voxels.astype(np.int16)), affine=lps_to_ras @ affine)
