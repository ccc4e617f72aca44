"""The history of a training run: one row per epoch, as a line of JSON in ``history.jsonl``."""

import json
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Validation:
    """The scores of an epoch on the validation split, 0 … 1."""

    dice: float  # mean over the classes
    iou: float | None = None  # mean over the classes; None: the metric has no IoU, or no class occurs
    dice_of_class: Mapping[str, float | None]  # None: the class does not occur


@dataclass(frozen=True, kw_only=True, slots=True)
class HistoryRow:
    """The results of one epoch; epoch 0 is the untrained model."""

    epoch: int
    loss: float | None = None  # mean training loss; None: untrained
    validation: Validation | None = None  # None: not validated after this epoch
    seconds: float

    def score(self, name: str) -> float | None:
        """Return the validation's ``dice`` or ``iou``; None: the epoch has none."""
        if self.validation is None:
            return None
        return {"dice": self.validation.dice, "iou": self.validation.iou}[name]

    def to_line(self) -> str:
        """Return the row as a line of ``history.jsonl``; absent values have no key."""
        row: dict[str, object] = {"epoch": self.epoch}
        if self.loss is not None:
            row["loss"] = self.loss
        if self.validation is not None:
            row["dice"] = self.validation.dice
            row["iou"] = self.validation.iou
            row["dice_of_class"] = dict(self.validation.dice_of_class)
        return json.dumps({**row, "seconds": self.seconds}) + "\n"


def parse_history(text: str) -> tuple[HistoryRow, ...]:
    """Return the rows of a ``history.jsonl`` that ``to_line`` wrote."""
    return tuple(_parse_row(json.loads(line)) for line in text.splitlines())


def _parse_row(row: Mapping[str, object]) -> HistoryRow:
    validation = {name: row[name] for name in ("dice", "iou", "dice_of_class") if name in row}
    return HistoryRow(
        epoch=row["epoch"],  # pyright: ignore[reportArgumentType]  # this package wrote the file
        loss=row.get("loss"),  # pyright: ignore[reportArgumentType]
        validation=Validation(**validation) if validation else None,  # pyright: ignore[reportArgumentType]
        seconds=row["seconds"],  # pyright: ignore[reportArgumentType]
    )
