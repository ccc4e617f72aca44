"""``--tile`` in ``infer`` and ``evaluate``."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from tiny import write_pictures, write_volumes

from medseg_trt.bundles.bundle import load_bundle
from medseg_trt.cli import cli
from medseg_trt.errors import UsageError
from medseg_trt.evaluate import evaluate_all
from medseg_trt.imaging.images import read_image, read_labels
from medseg_trt.imaging.segment import segment
from medseg_trt.pipeline import infer
from medseg_trt.sessions.open import open_session
from medseg_trt.tiling.segment import tiled
from medseg_trt.tiling.windows import Tiles


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_volumes(tmp_path_factory.mktemp("data"), size=(50, 45))


def dice(prediction: np.ndarray, truth: np.ndarray, label: int) -> float:
    true, predicted = truth == label, prediction == label
    return 2 * (true & predicted).sum() / (true.sum() + predicted.sum())


def test_an_image_of_one_window_gets_the_mask_of_the_whole(tiny_bundle, tmp_path):
    (plain, *_), (windows, *_) = (
        list(infer([write_pictures(tmp_path, count=1) / "images"], tiny_bundle, tiles=tiles))
        for tiles in (None, Tiles())
    )
    np.testing.assert_array_equal(windows.labels, plain.labels)


def test_infer_and_evaluate_make_the_same_masks(tiny_bundle, data):
    scan, tiles = data / "images" / "scan1.nii.gz", Tiles(overlap=0.5)
    (mask,) = infer([scan], tiny_bundle, tiles=tiles)
    image = read_image(scan)
    bundle = load_bundle(tiny_bundle)
    with open_session(bundle, threads=1) as session:
        pixel_run = tiled(session.run, image, bundle.preprocessing, tiles)
        expected = segment(session.run, image, bundle.preprocessing, 4, pixels_to_masks=pixel_run)
    assert (mask.labels != expected).mean() < 1e-3  # a tie may fall the other way with other threads
    (board,) = evaluate_all([], [tiny_bundle], data, ["val"], "auto", tiles=tiles)
    ((name, evaluation),) = board.evaluations.items()
    assert name.endswith("windows of auto pixels, overlap 0.5")
    truth = read_labels(data / "masks" / "scan1.nii.gz", image, 3)
    for label, score in zip((1, 2), evaluation.means, strict=True):
        assert score.dice == pytest.approx(dice(mask.labels, truth, label), abs=1e-3)
    with pytest.raises(UsageError, match="choose --metric volume, or whole slices: --tile off"):
        evaluate_all([], [tiny_bundle], data, ["val"], "auto", tiles=tiles, metric="per_image")


def test_continue_redoes_masks_of_another_tile_or_overlap(tiny_bundle, data, tmp_path):
    def kept(*options: str) -> int:
        command = ["infer", str(data / "images"), "--bundle", str(tiny_bundle), "-o", str(tmp_path / "masks")]
        result = CliRunner().invoke(cli, [*command, "--continue", "--json", *options])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)["kept"]

    assert kept() == 0
    assert kept("--tile", "auto") == 0
    assert kept("--tile", "auto") == 2
    assert kept("--tile", "auto", "--overlap", "0.5") == 0
    assert kept("--tile", "40", "--overlap", "0.5") == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tile", "large"], "give auto or a number of pixels"),
        (["--tile", "0"], "give auto or a number of pixels"),
        (["--overlap", "0.5"], "give --tile auto too"),
    ],
)
def test_infer_refuses_invalid_tile_options(tiny_bundle, data, tmp_path, options, words):
    command = ["infer", str(data / "images"), "--bundle", str(tiny_bundle), "-o", str(tmp_path / "masks"), *options]
    result = CliRunner().invoke(cli, command)
    assert result.exit_code != 0
    assert words in f"{result.output}{result.exception}"
