"""ISIC 2017, task 1: photographs of skin lesions, with official training, validation and test splits.

The folders are those of the challenge's six archives. The training folder also contains superpixel images, which are
ignored; mask names end with ``_segmentation``, in the test archive with a capital.
"""

from pathlib import Path

from medseg_trt.train.datasets.folder import Case
from medseg_trt.train.datasets.layout import Dataset, DatasetScan, Layout, below, by_name, files, locator, paired
from medseg_trt.train.datasets.options import DataOptions

OFFICIAL = {"train": 2000, "val": 150, "test": 600}
ARCHIVES = {"train": "training", "val": "validation", "test": "test_v2"}
IMAGE, MASK = r"(ISIC_\d+)", r"(ISIC_\d+)_segmentation"


def read(base: Path, _options: DataOptions) -> DatasetScan:
    """Find the photographs and masks of the archives present."""
    problems: list[str] = []
    parts: dict[str, tuple[Case, ...]] = {}
    for part, archive in ARCHIVES.items():
        images = by_name(files(below(base, f"isic-2017_{archive}_data"), IMAGE), IMAGE, problems)
        masks = by_name(files(below(base, f"isic-2017_{archive}_part1_groundtruth"), MASK), MASK, problems)
        pairs = paired(images, masks, problems)
        parts[part] = tuple(Case(image=image, mask=mask, is_binary=True) for _, image, mask in pairs)
    return DatasetScan(parts=parts, official=OFFICIAL, problems=tuple(problems))


DATASET = Dataset(
    title="ISIC 2017, skin lesions",
    modality="photograph",
    layouts=(
        Layout(
            description="ISIC-2017_Training_Data/ and the folders of the other archives",
            locate=locator("isic-2017_training_data"),
            read=read,
        ),
    ),
)
