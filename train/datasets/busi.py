"""BUSI: breast ultrasound, with several masks for images of several lesions.

``Dataset_BUSI_with_GT/benign/benign (1).png`` has the mask ``benign (1)_mask.png``, and ``benign (1)_mask_1.png`` for a
second lesion. The paper does not state which masks count, nor whether images without a lesion are included; see
``data.masks`` and ``data.normals``.
"""

import re
from collections import defaultdict
from pathlib import Path

from medseg_trt.imaging.images import output_stem
from medseg_trt.train.datasets.folder import Case
from medseg_trt.train.datasets.image_mask_folders import image_mask_layout
from medseg_trt.train.datasets.layout import ALL, Dataset, DatasetScan, Layout, below, by_name, files, locator, paired
from medseg_trt.train.datasets.options import DataOptions

WITH_LESION, WITHOUT_LESION = ("benign", "malignant"), ("normal",)
OFFICIAL = {"benign": 437, "malignant": 210, "normal": 133}
MASK, FURTHER = r"(.*)_mask", r"(.*)_mask_\d+"
IMAGE = r"((?:(?!_mask).)*)"


def read(base: Path, options: DataOptions) -> DatasetScan:
    """Find the images of the selected kinds and their masks."""
    problems: list[str] = []
    cases: list[Case] = []
    kinds = WITH_LESION + (WITHOUT_LESION if options.normals == "include" else ())
    for kind in kinds:
        folder = below(base, kind)
        further: defaultdict[str, list[Path]] = defaultdict(list)
        for path in files(folder, FURTHER):
            further[re.sub(r"_mask_\d+$", "", output_stem(path))].append(path)
        masks = by_name(files(folder, MASK), MASK, problems)
        problems += [f"{further[name][0]} has no first mask {name}_mask" for name in further if name not in masks]
        for name, image, mask in paired(by_name(files(folder, IMAGE), IMAGE, problems), masks, problems):
            more = tuple(further.get(name, ())) if options.masks == "or" else ()
            cases.append(Case(image=image, mask=mask, more_masks=more, is_binary=True))
    several = sum(bool(case.more_masks) for case in cases)
    remarks = [f"{several} picture(s) have several masks, which are merged"] * bool(several)
    return DatasetScan(
        parts={ALL: tuple(cases)},
        official={ALL: sum(OFFICIAL[kind] for kind in kinds)},
        problems=tuple(problems),
        remarks=tuple(remarks),
    )


DATASET = Dataset(
    title="BUSI, breast ultrasound",
    modality="ultrasound",
    layouts=(
        Layout(
            description="benign/, malignant/ and normal/ of Dataset_BUSI_with_GT",
            locate=locator("benign", "malignant"),
            read=read,
        ),
        image_mask_layout(OFFICIAL["benign"] + OFFICIAL["malignant"]),
    ),
    choices=("masks", "normals"),
)
