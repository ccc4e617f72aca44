"""CVC-ClinicDB: 612 frames of colonoscopy videos with a polyp.

The challenge's archive has ``Original/1.tif`` and ``Ground Truth/1.tif``. Kaggle's has both below ``TIF/`` and, with
other files, below ``PNG/``, and ``metadata.csv`` with the sequence of every frame.
"""

from pathlib import Path

from medseg_trt.train.datasets.folder import Case
from medseg_trt.train.datasets.image_mask_folders import image_mask_layout
from medseg_trt.train.datasets.layout import ALL, Dataset, DatasetScan, Layout, below, by_name, files, locator, paired
from medseg_trt.train.datasets.options import DataOptions
from medseg_trt.train.datasets.sequences import sequences

OFFICIAL = 612
NUMBER = r"(\d+)"


def read(base: Path, _options: DataOptions) -> DatasetScan:
    """Find the frames and their masks."""
    problems: list[str] = []
    images = by_name(files(below(base, "original"), NUMBER), NUMBER, problems)
    masks = by_name(files(below(base, "ground truth"), NUMBER), NUMBER, problems)
    group_of = sequences(base, base.parent)
    cases = (
        Case(image=image, mask=mask, is_binary=True, group=group_of.get(name))
        for name, image, mask in paired(images, masks, problems)
    )
    return DatasetScan(parts={ALL: tuple(cases)}, official={ALL: OFFICIAL}, problems=tuple(problems))


def _locate(root: Path) -> Path | None:
    """Prefer the original TIFF files to Kaggle's PNG files."""
    kaggle = locator("tif/original", "tif/ground truth")(root)
    return below(kaggle, "tif") if kaggle is not None else locator("original", "ground truth")(root)


DATASET = Dataset(
    title="CVC-ClinicDB, polyps",
    modality="endoscopy",
    groups="sequence",
    layouts=(
        Layout(description="Original/ and Ground Truth/", locate=_locate, read=read),
        image_mask_layout(OFFICIAL),
    ),
)
