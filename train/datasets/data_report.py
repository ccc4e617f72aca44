"""The contents of a data set: facts of every case, and the tables and plain data derived from them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from medseg_trt.spec import Classes


@dataclass(frozen=True, kw_only=True, slots=True)
class CaseFacts:
    """The contents of one case."""

    name: str
    split: str
    group: str | None
    size: tuple[int, int]  # height, width
    slices: int
    channels: int
    numbers: str  # NumPy's name of the type
    low: float
    high: float
    spacing_mm: tuple[float, float, float] | None
    pixels_of_label: tuple[int, ...]
    empty_slices: int  # without any label
    is_grey_mask: bool  # whether a binary mask holds more than two values


@dataclass(frozen=True, kw_only=True, slots=True)
class DataReport:
    """The contents and faults of a data set."""

    name: str
    layout: str
    root: str
    classes: Classes | None
    how: Mapping[str, object]
    cases: tuple[CaseFacts, ...]
    digest: str | None  # of the manifest; None: a file cannot be read
    problems: tuple[str, ...]  # faults that make figures wrong or training impossible
    remarks: tuple[str, ...]  # facts that limit the figures

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-serialisable data."""
        return {
            "name": self.name,
            "layout": self.layout,
            "root": self.root,
            "how": dict(self.how),
            "classes": list(self.classes.names) if self.classes else [],
            "splits": self.splits(),
            "pixels_of_class": self.pixels_of_class(),
            "manifest_sha256": self.digest,
            "problems": list(self.problems),
            "remarks": list(self.remarks),
            "cases": [asdict(case) for case in self.cases],
        }

    def splits(self) -> dict[str, dict[str, Any]]:
        """Count cases and slices, and give the range of sizes, spacings and values, of every split."""
        return {split: _summary([case for case in self.cases if case.split == split]) for split in self.split_names()}

    def split_names(self) -> list[str]:
        """Return the splits in the order in which they were read."""
        return list(dict.fromkeys(case.split for case in self.cases))

    def pixels_of_class(self) -> dict[str, dict[str, int]]:
        """Count the pixels of every class in each split."""
        names = self.classes.names if self.classes else ()
        return {
            name: {
                split: sum(case.pixels_of_label[label] for case in self.cases if case.split == split)
                for split in self.split_names()
            }
            for label, name in enumerate(names)
        }

    def title(self) -> str:
        """Return the name of the data set and how it was divided."""
        how = ", ".join(f"{name}={value}" for name, value in self.how.items() if name != "dataset")
        return f"{self.name}{f' ({self.layout})' if self.layout else ''}{f', {how}' if how else ''}"

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return header and rows of the splits."""
        header = ["split", "cases", "slices", "groups", "empty masks", "height", "width", "spacing mm", "values"]
        rows = [
            [
                split,
                *(str(summary[name]) for name in ("cases", "slices", "groups", "empty_masks")),
                *(_text(summary[name]) for name in ("height", "width")),
                " x ".join(map(_text, summary["spacing_mm"])) if summary["spacing_mm"] else "–",
                _text(summary["values"]),
            ]
            for split, summary in self.splits().items()
        ]
        return header, rows

    def class_table(self) -> tuple[list[str], list[list[str]]]:
        """Return header and rows of the classes: their share of the pixels of each split, and the cases with them."""
        names = self.split_names()
        totals = {
            split: sum(sum(case.pixels_of_label) for case in self.cases if case.split == split) for split in names
        }
        rows: list[list[str]] = []
        for label, (name, counts) in enumerate(self.pixels_of_class().items()):
            with_it = {
                split: sum(case.split == split and case.pixels_of_label[label] > 0 for case in self.cases)
                for split in names
            }
            rows.append([name, *(f"{counts[s] / totals[s]:.2%} in {with_it[s]}" for s in names)])
        return ["class", *(f"{split}: share, cases" for split in names)], rows


def _text(values: Sequence[float]) -> str:
    low, high = values
    return f"{low:.4g}" if low == high else f"{low:.4g} … {high:.4g}"


def _summary(cases: Sequence[CaseFacts]) -> dict[str, Any]:
    spacings = [case.spacing_mm for case in cases if case.spacing_mm is not None]
    return {
        "cases": len(cases),
        "slices": sum(case.slices for case in cases),
        "groups": len({case.group for case in cases if case.group is not None}),
        "empty_masks": sum(case.empty_slices == case.slices for case in cases),
        "empty_slices": sum(case.empty_slices for case in cases),
        "height": _range(case.size[0] for case in cases),
        "width": _range(case.size[1] for case in cases),
        "spacing_mm": [_range(axis) for axis in zip(*spacings, strict=True)] if spacings else None,
        "values": [min(case.low for case in cases), max(case.high for case in cases)],
    }


def _range(values: Iterable[float]) -> list[float]:
    numbers = [float(value) for value in values]
    return [min(numbers), max(numbers)]
