"""Plot the loss and the Dice of a training run over its epochs."""

from collections.abc import Sequence
from pathlib import Path

from medseg_trt.files import atomic_file
from medseg_trt.train.history import HistoryRow


def draw_curve(history: Sequence[HistoryRow], path: Path) -> None:
    """Write a PNG with the training loss and the validation Dice of every class.

    Args:
        history: one row per epoch.
        path: the file to write.
    """
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    trained = [row for row in history if row.loss is not None]
    left.plot([row.epoch for row in trained], [row.loss for row in trained], marker=".")
    left.set(xlabel="epoch", ylabel="training loss")
    validated = [(row.epoch, row.validation) for row in history if row.validation is not None]
    epochs = [epoch for epoch, _ in validated]
    for name in validated[0][1].dice_of_class if validated else ():
        values = [validation.dice_of_class[name] for _, validation in validated]
        if any(value is not None for value in values):
            right.plot(epochs, values, linewidth=1, label=name.replace("$", r"\$"))  # not a formula
    right.plot(epochs, [validation.dice for _, validation in validated], color="black", linewidth=2, label="mean")
    right.set(xlabel="epoch", ylabel="validation Dice", ylim=(0, 1))
    right.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))  # beside the curves, not over them
    for axes in (left, right):
        axes.grid(alpha=0.3)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=100)
