"""What a bundle stores of post-processing: the steps of every class, and the gain that each was chosen for."""

from dataclasses import dataclass
from math import isfinite
from typing import Literal

Kind = Literal["volume", "image"]  # what it was learnt on: components of volumes, or of single slices
Unit = Literal["mm3", "mm2", "share"]  # share: of the pixels of one slice, where a spacing is unknown
SIZE_TEXT = {"mm3": "{:g} mm³", "mm2": "{:g} mm²", "share": "{:.3g} of a slice"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Gain:
    """How much higher Dice is with a step than without, on the same validation cases."""

    before: float  # 0 … 1
    after: float
    low: float  # the interval of ``after - before``
    high: float
    units: str  # resampled for the interval: "cases", or "slices" where there are too few cases

    __pydantic_config__ = {"extra": "forbid"}

    def __str__(self) -> str:
        """Return the gain with its interval."""
        gain = self.after - self.before
        return f"Dice {self.before:.4f} → {self.after:.4f}, {gain:+.4f} ({self.low:+.4f} … {self.high:+.4f})"


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassSteps:
    """The steps of one class, in the order of the fields. Pixels that are removed become background."""

    name: str  # of the class
    largest: bool = False  # keep the largest connected component alone
    min_size: float = 0.0  # remove components smaller than this; 0 removes none
    fill_holes: bool = False  # label the background that the class encloses in a slice
    gain: Gain

    __pydantic_config__ = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if not (isfinite(self.min_size) and self.min_size >= 0):
            raise ValueError(f"min_size is {self.min_size}; it must be a finite number from 0")
        if not (self.largest or self.min_size or self.fill_holes):
            raise ValueError(f"the class {self.name!r} has no step; leave it out")

    def text(self, unit: Unit) -> str:
        """Say in words what the steps do."""
        steps = (
            "largest component" if self.largest else "",
            f"at least {SIZE_TEXT[unit].format(self.min_size)}" if self.min_size else "",
            "holes filled" if self.fill_holes else "",
        )
        return ", ".join(filter(None, steps))


@dataclass(frozen=True, kw_only=True, slots=True)
class Postprocessing:
    """The steps of a bundle; classes without a step are not listed."""

    kind: Kind
    unit: Unit  # of every ``min_size``
    classes: tuple[ClassSteps, ...]
    gain: Gain  # of all steps together, over all classes
    cases: int  # of the validation split that the steps were chosen on
    slices: int
    description: str  # of these cases

    __pydantic_config__ = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if (self.unit == "mm3") > (self.kind == "volume") or (self.unit == "mm2") > (self.kind == "image"):
            raise ValueError(f"{self.unit} is no size of an object in a {self.kind}")
        names = [steps.name for steps in self.classes]
        if not names or len(set(names)) < len(names):
            raise ValueError("post-processing lists every class with a step once, and at least one")

    def text(self) -> str:
        """Say in one line what is done to the masks."""
        return "; ".join(f"{steps.name}: {steps.text(self.unit)}" for steps in self.classes)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return the steps as a header and rows of text."""
        rows = [[steps.name, steps.text(self.unit), *_cells(steps.gain)] for steps in self.classes]
        return ["class", "steps", "Dice without", "Dice with", "gain, 90 % interval"], [
            *rows,
            ["all", "", *_cells(self.gain)],
        ]


def _cells(gain: Gain) -> list[str]:
    return [
        f"{gain.before:.4f}",
        f"{gain.after:.4f}",
        f"{gain.low:+.4f} … {gain.high:+.4f} by {gain.units}",
    ]
