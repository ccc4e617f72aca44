"""Draw how loss and Dice went over a training run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medseg_trt.files import atomic_file


def draw_curve(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a PNG with the training loss and the validation Dice of every class.

    Args:
        history: the rows of ``history.jsonl``.
        path: where to write.
    """
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    trained = [row for row in history if "loss" in row]
    left.plot([row["epoch"] for row in trained], [row["loss"] for row in trained], marker=".")
    left.set(xlabel="epoch", ylabel="training loss")
    validated = [row for row in history if "dice" in row]
    epochs = [row["epoch"] for row in validated]
    for name in validated[0]["dice_of_class"] if validated else ():
        values = [row["dice_of_class"][name] for row in validated]
        if any(value is not None for value in values):
            right.plot(epochs, values, linewidth=1, label=name.replace("$", r"\$"))  # not a formula
    right.plot(epochs, [row["dice"] for row in validated], color="black", linewidth=2, label="mean")
    right.set(xlabel="epoch", ylabel="validation Dice", ylim=(0, 1))
    right.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))  # beside the curves, not over them
    for axes in (left, right):
        axes.grid(alpha=0.3)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=100)
