"""ACDC: the heart in MR at end-diastole and end-systole, as volumes or as SSL4MIS's slices and volumes.

Official: ``database/training/patient001/`` with ``Info.cfg``, ``patient001_frame01.nii.gz`` and ``…_gt.nii.gz`` of two
frames, and a series ``patient001_4d.nii.gz``, which has no labels and is ignored. SSL4MIS's:
``ACDC_training_slices/patient100_frame13_slice_0.h5`` and ``ACDC_training_volumes/patient100_frame01.h5``, scaled to
0 … 1; training takes the slices, validation and test the volumes.

The paper gives no list of patients. 31 to 100 are for training, 21 to 30 for validation and 1 to 20 for the test, as in
the regular expressions of the authors' ``dataset_ACDC.py``.
"""

import re
from pathlib import Path

from medseg_trt.errors import InputError
from medseg_trt.imaging.images import natural_key
from medseg_trt.spec import Classes
from medseg_trt.train.datasets.folder import Case
from medseg_trt.train.datasets.layout import (
    Dataset,
    DatasetScan,
    Layout,
    below,
    by_name,
    files,
    folders,
    locator,
    paired,
)
from medseg_trt.train.datasets.options import DataOptions

CLASSES = Classes(names=("background", "right ventricle", "myocardium", "left ventricle"))
PATIENTS = {"train": range(31, 101), "val": range(21, 31), "test": range(1, 21)}
FRAMES_OF_A_PATIENT = 2
SCALED = (0.0, 1.0)
PATIENT, FRAME, SLICE = r"(patient\d{3})", r"(patient\d{3}_frame\d+)", r"(patient\d{3}_frame\d+_slice_\d+)"
MAX_INFO_BYTES = 1 << 16


def read_official(base: Path, _options: DataOptions) -> DatasetScan:
    """Find the two frames of every patient, which must be those that ``Info.cfg`` names."""
    problems: list[str] = []
    cases: list[Case] = []
    for folder in sorted(base.iterdir(), key=lambda path: natural_key(path.name)):
        if not folder.is_dir() or not re.fullmatch(PATIENT, folder.name):
            continue
        images = by_name(files(folder, FRAME), FRAME, problems)
        masks = by_name(files(folder, f"{FRAME}_gt"), f"{FRAME}_gt", problems)
        pairs = paired(images, masks, problems)
        if wrong := _unlike_info(folder, [name for name, *_ in pairs]):
            problems.append(wrong)
        cases += [Case(image=image, mask=mask, group=folder.name) for _, image, mask in pairs]
    official = {part: FRAMES_OF_A_PATIENT * len(numbers) for part, numbers in PATIENTS.items()}
    parts = {part: _of(part, cases) for part in PATIENTS}
    return DatasetScan(parts=parts, official=official, classes=CLASSES, problems=tuple(problems))


def read_prepared(base: Path, options: DataOptions) -> DatasetScan:
    """Find the slices of the training patients and the volumes of the others."""
    problems: list[str] = []
    slices = by_name(files(_first(base, SLICES), SLICE), SLICE, problems)
    volumes = by_name(files(_first(base, VOLUMES), FRAME), FRAME, problems)
    of_slices, of_volumes = (
        [Case(image=path, mask=path, group=name[: len("patient001")]) for name, path in path_of.items()]
        for path_of in (slices, volumes)
    )
    patients = {case.group for case in of_slices}
    absent = [name for name in _names("train") if name not in patients]
    if absent and options.count == "official":
        problems.append(
            f"{len(absent)} of the {len(PATIENTS['train'])} training patients have no slice, for example {absent[0]}; "
            "to use them as they are: --set data.count=any"
        )
    return DatasetScan(
        parts={"train": _of("train", of_slices), "val": _of("val", of_volumes), "test": _of("test", of_volumes)},
        official={part: FRAMES_OF_A_PATIENT * len(PATIENTS[part]) for part in ("val", "test")},
        classes=CLASSES,
        window=SCALED,
        problems=tuple(problems),
    )


SLICES = ("acdc_training_slices", "slices")
VOLUMES = ("acdc_training_volumes", "")


def _of(part: str, cases: list[Case]) -> tuple[Case, ...]:
    names = _names(part)
    return tuple(case for case in cases if case.group in names)


def _names(part: str) -> list[str]:
    return [f"patient{number:03d}" for number in PATIENTS[part]]


def _first(base: Path, names: tuple[str, ...]) -> Path | None:
    candidates = (base if name == "" else below(base, name) for name in names)
    return next((folder for folder in candidates if folder is not None), None)


def _unlike_info(folder: Path, names: list[str]) -> str:
    """Report frames other than those of ``Info.cfg`` (``ED: 1`` and ``ES: 12``); empty: none."""
    path = folder / "Info.cfg"
    if not path.is_file():
        return f"{path} does not exist; if the archive was unzipped incompletely, unzip it again"
    if path.stat().st_size > MAX_INFO_BYTES:
        raise InputError(f"{path} is larger than {MAX_INFO_BYTES >> 10} KiB; it should have a few lines")
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    listed = {int(number) for number in re.findall(r"^E[DS]\s*:\s*(\d+)\s*$", text, re.MULTILINE)}
    existing = {int(name.rpartition("frame")[2]) for name in names}
    if listed != existing:
        return f"{path} names the frames {sorted(listed)}, but there are images and masks of {sorted(existing)}"
    return ""


def _locate_official(root: Path) -> Path | None:
    """Find the folder whose folders are patients with frames; ``testing/`` beside it is not the paper's."""
    for folder in folders(root):
        if folder.name.lower() != "testing" and any(
            re.fullmatch(PATIENT, patient.name) for patient in folder.iterdir() if patient.is_dir()
        ):
            return folder
    return None


def _locate_prepared(root: Path) -> Path | None:
    return locator("acdc_training_slices")(root) or next(
        (base for base in folders(root) if files(base, FRAME) and below(base, "slices")), None
    )


DATASET = Dataset(
    title="ACDC, heart",
    modality="MR",
    groups="patient",
    layouts=(
        Layout(description="slices and volumes of SSL4MIS (HDF5)", locate=_locate_prepared, read=read_prepared),
        Layout(description="patientNNN/ of database/training", locate=_locate_official, read=read_official),
    ),
)
