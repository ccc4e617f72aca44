"""CVC-ColonDB: frames of colonoscopy videos with a polyp, 300 from the CVC, 380 in the copies in use.

The CVC's folder has ``1.bmp`` and its polyp's mask ``p1.bmp``; ``c1.bmp`` (contours) and ``s1.bmp`` (specular lights)
are ignored. The copies in use have ``images/1.png`` and ``masks/1.png``. The paper gives no number; 380 is assumed.
"""

from pathlib import Path

from medseg_trt.train.datasets.folder import Case
from medseg_trt.train.datasets.image_mask_folders import image_mask_layout
from medseg_trt.train.datasets.layout import ALL, Dataset, DatasetScan, Layout, by_name, files, folders, paired
from medseg_trt.train.datasets.options import DataOptions
from medseg_trt.train.datasets.sequences import sequences

OFFICIAL = 380
OF_THE_CVC = 300
IMAGE, MASK = r"(\d+)", r"p(\d+)"


def read(base: Path, _options: DataOptions) -> DatasetScan:
    """Find the frames and their masks."""
    problems: list[str] = []
    images, masks = (by_name(files(base, pattern), pattern, problems) for pattern in (IMAGE, MASK))
    group_of = sequences(base, base.parent)
    cases = (
        Case(image=image, mask=mask, is_binary=True, group=group_of.get(name))
        for name, image, mask in paired(images, masks, problems)
    )
    return DatasetScan(parts={ALL: tuple(cases)}, official={ALL: OFFICIAL}, problems=tuple(problems))


def _locate(root: Path) -> Path | None:
    return next((folder for folder in folders(root) if files(folder, MASK)), None)


DATASET = Dataset(
    title="CVC-ColonDB, polyps",
    modality="endoscopy",
    groups="sequence",
    layouts=(
        Layout(description="N.bmp and pN.bmp of the CVC", locate=_locate, read=read),
        image_mask_layout(OFFICIAL),
    ),
    other_counts={OF_THE_CVC: "the CVC's own number, of 15 sequences; 380 is the community's"},
)
