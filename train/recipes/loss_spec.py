"""The part of a recipe that selects and weights the losses."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class LossSpec:
    """The loss that training minimises."""

    binary: Literal["bce_dice", "structure"] = "bce_dice"  # of one class
    cross_entropy: float = 0.5  # share of the cross-entropy of several classes; the rest is Dice
    auxiliary: float = 0.2  # share of every auxiliary head, of a network that has any

    __pydantic_config__ = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if not 0 <= self.cross_entropy <= 1 or not 0 <= self.auxiliary < 0.5:
            raise ValueError("loss.cross_entropy must be 0 … 1, and loss.auxiliary 0 or more and less than 0.5")
