"""The curve shows the rows of the history, and is a picture that can be opened."""

import math

import matplotlib.figure
import numpy as np
import PIL.Image
import pytest

from medseg_trt.train.curve import draw_curve
from medseg_trt.train.history import HistoryRow, Validation

UNTRAINED = Validation(dice=0.1, dice_of_class={"liver": 0.1, "spleen": None, "aorta": None})
TRAINED = Validation(dice=0.5, dice_of_class={"liver": 0.7, "spleen": 0.3, "aorta": None})
HISTORY = [
    HistoryRow(epoch=0, validation=UNTRAINED, seconds=1.0),
    HistoryRow(epoch=1, loss=1.5, seconds=1.0),
    HistoryRow(epoch=2, loss=0.75, validation=TRAINED, seconds=1.0),
]
UNVALIDATED = [HistoryRow(epoch=0, seconds=1.0), HistoryRow(epoch=1, loss=0.5, seconds=1.0)]


@pytest.fixture
def drawn(monkeypatch):
    """Return a list that collects every figure on its way to a file."""
    figures = []
    real = matplotlib.figure.Figure.savefig

    def savefig(figure, *arguments, **options):
        figures.append(figure)
        real(figure, *arguments, **options)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)
    return figures


def lines(axes):
    return {line.get_label(): list(zip(*line.get_data(orig=False), strict=True)) for line in axes.get_lines()}


def test_loss_and_dice_are_drawn_over_the_epochs_that_have_them(tmp_path, drawn):
    draw_curve(HISTORY, tmp_path / "curve.png")
    loss_axes, dice_axes = drawn[0].axes
    (loss,) = lines(loss_axes).values()
    assert loss == [(1, 1.5), (2, 0.75)]
    dice = lines(dice_axes)
    assert dice["mean"] == [(0, 0.1), (2, 0.5)]
    assert dice["liver"] == [(0, 0.1), (2, 0.7)]
    assert dice["spleen"][1] == (2, 0.3)
    assert math.isnan(dice["spleen"][0][1])  # absent is a gap, not a zero
    assert dice.keys() == {"mean", "liver", "spleen"}  # the aorta never occurred
    assert [text.get_text() for text in dice_axes.get_legend().get_texts()] == ["liver", "spleen", "mean"]
    assert dice_axes.get_ylim() == (0, 1)


@pytest.mark.parametrize("history", [HISTORY, HISTORY[:1], UNVALIDATED, []])
def test_the_file_is_a_real_png_at_every_stage_of_a_run(tmp_path, history):
    draw_curve(history, tmp_path / "curve.png")
    with PIL.Image.open(tmp_path / "curve.png") as image:
        image.load()
        assert image.format == "PNG"
        assert min(image.size) >= 300
        assert np.unique(np.asarray(image)).size > 2  # axes and text: more than an empty sheet
    assert [path.name for path in tmp_path.iterdir()] == ["curve.png"]


def test_a_class_name_is_never_read_as_a_formula(tmp_path, drawn):
    name = r"$\no such command$"
    validation = Validation(dice=0.5, dice_of_class={name: 0.5})
    draw_curve([HistoryRow(epoch=0, validation=validation, seconds=1.0)], tmp_path / "curve.png")
    assert drawn[0].axes[1].get_lines()[0].get_label() == r"\$\no such command\$"
