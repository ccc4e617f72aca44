"""A recipe that trains on windows: by its name alone, from the pictures to the masks."""

import numpy as np
import PIL.Image
from click.testing import CliRunner
from tiny import write_pictures

from medseg_trt.cli import cli
from medseg_trt.pipeline import infer
from medseg_trt.tiling.windows import Tiles
from medseg_trt.train.checkpoint import load_checkpoint
from medseg_trt.train.recipes.recipes import recipe
from medseg_trt.window_spec import Windows

TINY = (
    "architecture=transunet-tiny",
    "preprocessing.image_size=[32, 32]",
    "train.epochs=1",
    "train.slices_per_epoch=8",
    "train.batch_size=4",
)


def test_the_recipe_for_cells_keeps_the_pictures_own_pixels():
    """Resized as a whole to the network's input, a picture of 1100 x 700 pixels has three pixels for a nucleus."""
    cells = recipe("cells-demo")
    assert cells.preprocessing.windows == Windows()
    assert recipe("cells-demo", ["preprocessing.windows=null"]).preprocessing.windows is None
    assert [name for name in ("folder", "isic2017", "ds-transunet-polyps") if recipe(name).preprocessing.windows] == []


def test_what_a_recipe_of_windows_trains_and_builds_cuts_windows_without_an_option(tmp_path):
    data, run, bundle = write_pictures(tmp_path / "data", size=(70, 61)), tmp_path / "run", tmp_path / "net.medseg"
    changes = [word for change in TINY for word in ("--set", change)]
    for command in (
        ["train", "--recipe", "cells-demo", "--data", data, "-o", run, *changes],
        ["build", "--ckpt", run / "best.pt", "--data", data, "-o", bundle, "--backend", "onnxruntime"],
    ):
        done = CliRunner().invoke(cli, [*map(str, command)])
        assert done.exit_code == 0, done.output
    assert load_checkpoint(run / "best.pt").preprocessing.windows == Windows()
    image = data / "images" / "case0.png"
    (mask,) = infer([image], bundle)
    (asked,) = infer([image], bundle, tiles=Tiles())
    assert mask.labels.shape[1:] == np.array(PIL.Image.open(image)).shape[:2]
    np.testing.assert_array_equal(mask.labels, asked.labels)
