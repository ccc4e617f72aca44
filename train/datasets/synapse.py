"""BTCV, or "Synapse": abdominal CT with eight organs, as raw volumes or as TransUNet's slices and volumes.

Raw: ``RawData/Training/img/img0001.nii.gz`` with ``label/label0001.nii.gz``, 30 scans of 13 organs, eight of which are
used. The volumes are reoriented to LPS and not resampled; the window clips Hounsfield units to -125 … 275 and scales
them to 0 … 1. Prepared: ``train_npz/case0005_slice000.npz`` and ``test_vol_h5/case0001.npy.h5``, whose
values are already 0 … 1, in the orientation of the files.

TransUNet's files number the organs in another order than the scripts of EMCAD and CASCADE. ``data.organs`` selects the
order: for raw volumes that of the result, for prepared ones that of the files.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from medseg_trt.errors import InputError
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
from medseg_trt.train.datasets.options import DataOptions, OrganOrder

TRAIN = (
    "0005",
    "0006",
    "0007",
    "0009",
    "0010",
    "0021",
    "0023",
    "0024",
    "0026",
    "0027",
    "0028",
    "0030",
    "0031",
    "0033",
    "0034",
    "0037",
    "0039",
    "0040",
)
TEST = ("0008", "0022", "0038", "0036", "0032", "0002", "0029", "0003", "0001", "0004", "0025", "0035")
TRAIN_SLICES = 2211
MAX_LIST_BYTES = 1 << 20

RAW_LABELS = (
    "background",
    "spleen",
    "kidney_right",
    "kidney_left",
    "gallbladder",
    "esophagus",
    "liver",
    "stomach",
    "aorta",
    "vena_cava",
    "portal_and_splenic_veins",
    "pancreas",
    "adrenal_right",
    "adrenal_left",
)
ORGANS: Mapping[OrganOrder, tuple[str, ...]] = {
    "transunet": (
        "background",
        "aorta",
        "gallbladder",
        "kidney_left",
        "kidney_right",
        "liver",
        "pancreas",
        "spleen",
        "stomach",
    ),
    "emcad": (
        "background",
        "spleen",
        "kidney_right",
        "kidney_left",
        "gallbladder",
        "pancreas",
        "liver",
        "stomach",
        "aorta",
    ),
}
HOUNSFIELD, SCALED = (-125.0, 275.0), (0.0, 1.0)
SLICE = r"case(\d{4})_slice\d+"


def read_raw(base: Path, options: DataOptions) -> DatasetScan:
    """Find the 30 labelled scans, and give their 13 labels the numbers of the eight organs."""
    problems: list[str] = []
    images = by_name(files(below(base, "img"), r"img\d{4}"), r"img(\d{4})", problems)
    masks = by_name(files(below(base, "label"), r"label\d{4}"), r"label(\d{4})", problems)
    names = ORGANS[options.organs]
    relabel = tuple(names.index(name) if name in names else 0 for name in RAW_LABELS)
    case_of = {
        name: Case(image=image, mask=mask, relabel=relabel, group=f"case{name}")
        for name, image, mask in paired(images, masks, problems)
    }
    parts = {part: tuple(case_of[name] for name in ids if name in case_of) for part, ids in _IDS.items()}
    if unknown := [name for name in case_of if name not in TRAIN + TEST]:
        problems.append(f"{images[unknown[0]]} is none of the 30 cases of the list, with {len(unknown)} in all")
    official = {"train": len(TRAIN), "test": len(TEST)}
    return DatasetScan(
        parts=parts, official=official, classes=Classes(names=names), window=HOUNSFIELD, problems=tuple(problems)
    )


def read_prepared(base: Path, options: DataOptions) -> DatasetScan:
    """Find the training slices and the test volumes, in the order of TransUNet's lists if present."""
    problems: list[str] = []
    slices = by_name(files(below(base, "train_npz"), SLICE), r"(case\d{4}_slice\d+)", problems)
    volumes = by_name(files(below(base, "test_vol_h5"), r"case\d{4}"), r"(case\d{4})", problems)
    strangers = [name for name in slices if name[4:8] not in TRAIN]
    strangers += [name for name in volumes if name[4:8] not in TEST]
    if strangers:
        problems.append(f"{strangers[0]} is on the other side of TransUNet's lists of cases ({len(strangers)} in all)")
    names = {
        "train": _listed(base, "train.txt") or list(slices),
        "test": _listed(base, "test_vol.txt") or [f"case{name}" for name in TEST if f"case{name}" in volumes],
    }
    parts: dict[str, tuple[Case, ...]] = {}
    for part, path_of in (("train", slices), ("test", volumes)):
        if missing := [name for name in names[part] if name not in path_of]:
            problems.append(f"{missing[0]} is on the list, but not among the files ({len(missing)} such name(s))")
        parts[part] = tuple(
            Case(image=path_of[name], mask=path_of[name], group=name[:8]) for name in names[part] if name in path_of
        )
    return DatasetScan(
        parts=parts,
        official={"train": TRAIN_SLICES, "test": len(TEST)},
        classes=Classes(names=ORGANS[options.organs]),
        window=SCALED,
        problems=tuple(problems),
    )


_IDS: Mapping[str, Sequence[str]] = {"train": TRAIN, "test": TEST}


def _listed(base: Path, name: str) -> list[str]:
    """Return the lines of one of TransUNet's lists, in the data folder or up to two folders above it."""
    candidates = [*folders(base), *(above / "lists" / "lists_Synapse" for above in (base.parent, base.parent.parent))]
    path = next((candidate / name for candidate in candidates if (candidate / name).is_file()), None)
    if path is None:
        return []
    if path.stat().st_size > MAX_LIST_BYTES:
        raise InputError(f"{path} is larger than {MAX_LIST_BYTES >> 20} MiB; it should name a case a line")
    return path.read_text(encoding="utf-8-sig").split()


DATASET = Dataset(
    title="BTCV (Synapse), abdominal organs",
    modality="CT",
    groups="patient",
    layouts=(
        Layout(
            description="train_npz/ and test_vol_h5/ of TransUNet",
            locate=locator("train_npz", "test_vol_h5"),
            read=read_prepared,
        ),
        Layout(description="img/ and label/ of RawData/Training", locate=locator("img", "label"), read=read_raw),
    ),
    choices=("organs",),
)
