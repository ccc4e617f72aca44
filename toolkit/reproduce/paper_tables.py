"""The two tables of the paper: which data sets, how they were counted, and the figures that stand there.

Every figure is of a single run; none has a spread. Which way of counting the paper took is not stated: the first mode
of a table is the one to trust, the second is the one that the paper's figures most likely are in.
Source: Jiang & Liu 2024 (MIDL), Tables 1 and 2.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Figure = Literal["dice", "iou", "hd95"]
Configuration = Literal["transunet", "llm-transunet"]
CONFIGURATIONS: tuple[Configuration, Configuration] = ("transunet", "llm-transunet")


@dataclass(frozen=True, kw_only=True, slots=True)
class PaperTable:
    """A table of the paper."""

    title: str
    modes: tuple[str, str]  # keys of METRICS
    figures: tuple[Figure, ...]
    paper: Mapping[str, Mapping[Configuration, Mapping[Figure, float]]]  # by data set, a key of DATASETS


def _lesions(*figures: float) -> Mapping[Configuration, Mapping[Figure, float]]:
    iou, dice, llm_iou, llm_dice = figures
    return {"transunet": {"iou": iou, "dice": dice}, "llm-transunet": {"iou": llm_iou, "dice": llm_dice}}


def _organs(*figures: float) -> Mapping[Configuration, Mapping[Figure, float]]:
    dice, hd95, llm_dice, llm_hd95 = figures
    return {"transunet": {"dice": dice, "hd95": hd95}, "llm-transunet": {"dice": llm_dice, "hd95": llm_hd95}}


TABLES: Mapping[str, PaperTable] = {
    "table1": PaperTable(
        title="Table 1: lesions, one class",
        modes=("per_image", "unext_batch"),
        figures=("iou", "dice"),
        paper={
            "isic2017": _lesions(0.7355, 0.8442, 0.7532, 0.8560),
            "busi": _lesions(0.6323, 0.7634, 0.6436, 0.7742),
            "clinicdb": _lesions(0.8500, 0.9183, 0.8525, 0.9184),
            "colondb": _lesions(0.8526, 0.9182, 0.8728, 0.9311),
        },
    ),
    "table2": PaperTable(
        title="Table 2: organs, several classes",
        modes=("volume", "volume_transunet"),
        figures=("dice", "hd95"),
        paper={
            "synapse": _organs(0.7845, 30.4188, 0.7869, 25.7007),
            "acdc": _organs(0.8988, 2.6160, 0.9029, 1.2210),
        },
    ),
}
