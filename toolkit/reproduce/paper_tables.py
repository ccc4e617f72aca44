"""The two tables of the paper: which data sets, how they were counted, and the figures that stand there.

Every figure of the paper is of a single run; none has a spread. Which way of counting it took is not stated: the first
mode of a table is the one to trust, the second is the one that the paper's figures most likely are in. Figures of other
networks are from other publications, each with its protocol; a network that nobody published on a data set has none.
Sources: Jiang & Liu 2024 (MIDL), Tables 1 and 2; Cao et al. 2022 (Swin-UNet), Table 1; FengheTan9's
Medical-Image-Segmentation-Benchmarks for BUSI.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Figure = Literal["dice", "iou", "hd95"]
CONFIGURATIONS = ("transunet", "llm-transunet")  # the networks of the paper


@dataclass(frozen=True, kw_only=True, slots=True)
class PaperTable:
    """A table of the paper."""

    title: str
    modes: tuple[str, str]  # keys of METRICS
    figures: tuple[Figure, ...]
    paper: Mapping[str, Mapping[str, Mapping[Figure, float]]]  # by data set, a key of DATASETS, and network
    elsewhere: Mapping[str, Mapping[str, "Published"]]  # the same of networks that the paper does not have

    def published(self, dataset: str, network: str, figure: Figure) -> float | None:
        """Return a published figure; None: there is none."""
        if network in self.paper[dataset]:
            return self.paper[dataset][network].get(figure)
        published = self.elsewhere.get(dataset, {}).get(network)
        return None if published is None else published.figures.get(figure)


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """Figures of a network from a publication of its own, and how they were obtained."""

    figures: Mapping[Figure, float]
    protocol: str


BENCHMARK = "647 pictures, means of three random splits of 70 to 30, best epoch on the test part"


def _lesions(*figures: float) -> Mapping[str, Mapping[Figure, float]]:
    iou, dice, llm_iou, llm_dice = figures
    return {"transunet": {"iou": iou, "dice": dice}, "llm-transunet": {"iou": llm_iou, "dice": llm_dice}}


def _organs(*figures: float) -> Mapping[str, Mapping[Figure, float]]:
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
        elsewhere={
            "busi": {
                "unet": Published(figures={"iou": 0.6861, "dice": 0.7697}, protocol=f"at 256 pixels, {BENCHMARK}"),
                "swin-unet": Published(
                    figures={"iou": 0.5411, "dice": 0.6546},
                    protocol=f"at 224 pixels, without ImageNet weights, {BENCHMARK}",
                ),
            },
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
        elsewhere={
            "synapse": {
                "unet": Published(
                    figures={"dice": 0.7685, "hd95": 39.70},
                    protocol="12 volumes at 224 pixels; as Swin-UNet's paper has it",
                ),
                "swin-unet": Published(
                    figures={"dice": 0.7913, "hd95": 21.55},
                    protocol="12 volumes at 224 pixels, SGD with 0.05, from Swin-T (recipe swin-unet-synapse)",
                ),
            },
            "acdc": {
                "swin-unet": Published(figures={"dice": 0.9000}, protocol="its authors give no split and no settings"),
            },
        },
    ),
}
