"""Images of one lesion in ``images/`` and their masks in ``masks/``, or UNeXt's ``masks/0/``, same names."""

from pathlib import Path

from medseg_trt.train.datasets.folder import Case
from medseg_trt.train.datasets.layout import ALL, DatasetScan, Layout, below, by_name, files, locator, paired
from medseg_trt.train.datasets.options import DataOptions
from medseg_trt.train.datasets.sequences import sequences


def image_mask_layout(official: int) -> Layout:
    """Return the layout of a data set with an official number of images."""

    def read(base: Path, _options: DataOptions) -> DatasetScan:
        problems: list[str] = []
        masks = below(base, "masks/0") or below(base, "masks")
        pairs = paired(
            by_name(files(below(base, "images")), "(.*)", problems), by_name(files(masks), "(.*)", problems), problems
        )
        problems += [
            f"{folder} holds the folder {below_it[0].name} ({len(below_it)} such), which is not read; move its files, "
            "or read all of them as your own data: --set data.dataset=folder"
            for folder in (below(base, "images"), masks)
            if folder is not None and (below_it := [path for path in folder.iterdir() if path.is_dir()])
        ]
        group_of = sequences(base)
        cases = (Case(image=image, mask=mask, is_binary=True, group=group_of.get(name)) for name, image, mask in pairs)
        return DatasetScan(parts={ALL: tuple(cases)}, official={ALL: official}, problems=tuple(problems))

    return Layout(
        description="images/ and masks/ with the same names",
        locate=locator("images", "masks"),
        read=read,
        identifies_dataset=False,
    )
