"""On a GPU: a run trains, continues after an interrupt, and its checkpoint gives on the CPU what it gives there.

The CPU does the same, so that the test itself has run. Bounds that no GPU has confirmed yet say so.
"""

import json
import math

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tiny import tiny_recipe, write_block, write_volumes

from medseg_trt.cli import cli
from medseg_trt.devices import CPU, parse_device
from medseg_trt.sessions.pytorch import open_reference
from medseg_trt.train import loop
from medseg_trt.train.checkpoint import load_checkpoint
from medseg_trt.train.datasets.folder import open_folder
from medseg_trt.train.recipes.training_spec import AUTOCASTS

SLACK = 0.01  # share of pixels that the GPU may label otherwise; not confirmed yet
CASES = [("cpu", "no"), *(pytest.param("cuda", autocast, marks=pytest.mark.gpu) for autocast in AUTOCASTS)]


def losses_of(run):
    rows = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize(("kind", "autocast"), CASES)
def test_a_run_is_interrupted_continued_and_evaluated(kind, autocast, tmp_path, monkeypatch):
    device = parse_device(kind)
    if kind == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"PyTorch {torch.__version__} finds no GPU")
    folder, run = write_volumes(tmp_path / "data", count=3), tmp_path / "run"
    data, block = open_folder(folder), write_block(tmp_path)
    recipe = tiny_recipe(f"train.autocast={autocast}", "train.accumulate=2", "train.save_every_steps=1")
    real, steps = loop.segmentation_loss, iter(range(13))

    def interrupted(*arguments):
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "segmentation_loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            loop.train(recipe, data, run, block=block, device=device)
    loop.train(recipe, data, run, block=block, resume=True, device=device)
    losses = losses_of(run)
    assert len(losses) == recipe.train.epochs
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]

    checkpoint = load_checkpoint(run / "best.pt")
    assert all(weight.device.type == "cpu" for weight in checkpoint.weights.values())
    images = np.random.default_rng(0).normal(size=(4, 3, *checkpoint.preprocessing.image_size)).astype(np.float32)
    with open_reference(checkpoint, device) as there, open_reference(checkpoint, CPU) as here:
        assert (there.run(images).argmax(1) != here.run(images).argmax(1)).mean() <= SLACK
    assert dice_of(run, folder, kind) == pytest.approx(dice_of(run, folder, "cpu"), abs=SLACK)


def dice_of(run, folder, device: str) -> float:
    words = ["evaluate", "--ckpt", run / "best.pt", "--data", folder, "--split", "val", "--device", device, "--json"]
    ran = CliRunner().invoke(cli, [*map(str, words)], catch_exceptions=False)
    assert ran.exit_code == 0, ran.output
    (network,) = json.loads(ran.stdout)["splits"][0]["networks"].values()
    return network["mean_dice"]
