"""Training on windows: cut and prepared as inference does it, drawn by the seed, and scored through windows."""

import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_changes, tiny_recipe, train_and_kill, write_pictures, write_volumes

from medseg_trt.errors import UsageError
from medseg_trt.imaging.images import Image
from medseg_trt.spec import Preprocessing
from medseg_trt.tiling.segment import tiled
from medseg_trt.tiling.windows import recorded_tiles, starts, window_size
from medseg_trt.train.checkpoint import load_checkpoint
from medseg_trt.train.datasets import prepared
from medseg_trt.train.datasets.folder import Case, open_folder
from medseg_trt.train.datasets.prepared import WindowedSlices, mapped_slices, source_slices
from medseg_trt.train.epoch_slices import EpochSlices
from medseg_trt.train.evaluate import evaluate
from medseg_trt.train.history import parse_history
from medseg_trt.train.loop import train
from medseg_trt.train.models.model import runner
from medseg_trt.train.recipes.recipes import recipe
from medseg_trt.window_spec import Windows

pytestmark = pytest.mark.usefixtures("no_curve")
CONTRACT = Preprocessing(image_size=(16, 24), mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), windows=Windows(overlap=0.5))
CHANGES = tiny_changes(
    "architecture=transunet-tiny", "preprocessing.windows={}", "train.slices_per_epoch=4", "train.balance_classes=true"
)
SIZE = (70, 61)  # of the pictures, whose windows are 32 x 32


class At(np.random.Generator):
    """Gives windows at these places."""

    def __init__(self, *places: int) -> None:
        super().__init__(np.random.PCG64(0))
        self._places = iter(places)

    def integers(self, number: int) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]  # all that is called
        place = next(self._places)
        assert place < number
        return place


def slices_of(pixels: np.ndarray, contract: Preprocessing, spacing_mm, folder: Path, monkeypatch) -> WindowedSlices:
    """Return the slices as training maps them from disk."""
    image = Image(path=Path("a"), pixels=pixels, spacing_mm=spacing_mm)
    labels = (pixels[..., 0] > pixels.mean()).astype(np.uint8)
    monkeypatch.setattr(prepared, "read_case", lambda _case, _num: (image, labels))
    written = source_slices([Case(image=Path("a"), mask=Path("a"))], contract, 2, folder)
    mapped = mapped_slices(folder, written.slices_of_class, contract)
    assert isinstance(mapped, WindowedSlices)
    return mapped


@pytest.mark.parametrize(
    ("size", "channels", "changes", "spacing_mm"),
    [
        ((40, 61), 3, {}, None),
        ((40, 61), 3, {"channel_order": "bgr", "windows": Windows(size=20, overlap=0.0)}, None),
        ((9, 61), 1, {}, None),  # padded above and below
        ((11, 15), 1, {"window": (-125.0, 275.0)}, None),  # padded on all sides
        ((50, 61), 1, {"spacing_mm": 2.0, "window": (-125.0, 275.0)}, (5.0, 1.0, 1.6)),
        ((50, 61), 1, {"own_window": True}, None),
    ],
)
def test_training_draws_the_pixels_that_inference_cuts(size, channels, changes, spacing_mm, tmp_path, monkeypatch):
    contract = replace(CONTRACT, **changes)
    low, high = (0, 256) if contract.window[0] == 0 else (-400, 600)
    kind = np.uint8 if low == 0 else np.int16
    pixels = np.random.default_rng(1).integers(low, high, (2, *size, channels)).astype(kind)
    image = Image(path=Path("a"), pixels=pixels, spacing_mm=spacing_mm)
    tiles, seen = recorded_tiles(contract), []
    assert tiles is not None

    def recorded(batch):
        seen.extend(batch)
        return batch[:, :1]

    tiled(recorded, image, contract, tiles)(pixels)
    window = window_size(tiles, contract, image.spacing_in_plane)
    slices = slices_of(pixels, contract, spacing_mm, tmp_path / "slices", monkeypatch)
    rows, columns = (
        starts(max(length, of_window), of_window, tiles.overlap) for length, of_window in zip(size, window, strict=True)
    )
    places = [(index, top, left) for index in range(2) for top in rows for left in columns]
    assert len(places) == len(seen) >= 2
    for (index, top, left), expected in zip(places, seen, strict=True):
        drawn, labels = slices.draw(index, None, At(top, left))
        np.testing.assert_array_equal(drawn, expected)
        assert labels.shape == drawn.shape[1:] == contract.image_size


@pytest.mark.parametrize("fault", ["one pixel off", "padded on one side"])
def test_window_cutting_fault_fails_the_pixel_comparison(fault, tmp_path, monkeypatch):
    monkeypatch.setattr(
        prepared,
        *{
            "one pixel off": (
                "_start",
                lambda length, window, pixel, rng, real=prepared._start: (
                    real(length, window, pixel, rng) + (length > window)
                ),
            ),
            "padded on one side": ("padding_before", lambda length, window: 0),
        }[fault],
    )
    with pytest.raises(AssertionError):
        test_training_draws_the_pixels_that_inference_cuts((11, 61), 1, {}, None, tmp_path, monkeypatch)


def test_a_window_holds_a_pixel_of_the_class_that_was_drawn(tmp_path, monkeypatch):
    pixels = np.zeros((1, 60, 70, 1), np.uint8)
    slices = slices_of(pixels, CONTRACT, None, tmp_path / "slices", monkeypatch)
    labels = np.zeros((1, 60, 70), np.uint8)
    labels[0, 59, 0], labels[0, 20, 33] = 2, 1
    slices = replace(slices, labels=labels)
    rng = np.random.default_rng(0)
    for label in (0, 1, 2):
        assert all((slices.draw(0, label, rng)[1] == label).any() for _ in range(50))
    without = [(slices.draw(0, None, rng)[1] == 2).any() for _ in range(50)]
    assert sum(without) < 25  # the corner is in few windows unless it is asked for
    tops = {int(np.flatnonzero((slices.draw(0, 1, rng)[1] == 1).any(axis=1))[0]) for _ in range(400)}
    assert tops == set(range(16))  # it lies anywhere in its window


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return open_folder(write_pictures(tmp_path_factory.mktemp("data"), count=5, size=SIZE))


def slices_in(folder, data, contract, labels=2):
    return mapped_slices(folder, source_slices(data.cases("train"), contract, labels, folder).slices_of_class, contract)


def test_windows_depend_on_the_seed_and_the_epoch_alone(data, tmp_path):
    chosen = tiny_recipe(*CHANGES)
    slices = slices_in(tmp_path / "slices", data, chosen.contract)
    first, again = (EpochSlices(slices, chosen, 1) for _ in range(2))
    for item in range(len(first)):
        for ours, theirs in zip(first[item], again[item], strict=True):
            np.testing.assert_array_equal(ours, theirs)
    other = EpochSlices(slices, chosen, 2)
    assert not any(np.array_equal(first[item][0], other[item][0]) for item in range(len(first)))


def test_training_scores_through_windows_and_records_them(data, tmp_path):
    chosen = recipe("folder", CHANGES)
    best = load_checkpoint(train(chosen, data, tmp_path / "run"))
    assert best.preprocessing.windows == Windows()
    last = load_checkpoint(tmp_path / "run" / "last.pt")
    row = parse_history((tmp_path / "run" / "history.jsonl").read_text(encoding="utf-8"))[-1]
    run, contract, classes = runner(last.model()), last.preprocessing, data.classes
    through_windows, whole = (
        evaluate(run, data.cases("val"), contract, classes, 2, tiles=tiles).mean_dice
        for tiles in (recorded_tiles(contract), None)
    )
    assert row.validation is not None
    assert row.validation.dice == pytest.approx(through_windows, abs=1e-6)
    assert abs(row.validation.dice - whole) > 1e-3  # a score of whole resized slices is another number


def test_a_killed_run_goes_on_with_the_same_windows(data, tmp_path):
    chosen = recipe("folder", CHANGES)
    train(chosen, data, tmp_path / "whole")
    out = tmp_path / "killed"
    arguments = ["--recipe", "folder", "--data", str(data.root), "-o", str(out)]
    arguments += [part for change in CHANGES for part in ("--set", change)]
    done = train_and_kill(arguments, signal.SIGKILL, at_step=3)  # two steps an epoch: in the middle of the second one
    assert done.returncode == -signal.SIGKILL, done.stderr
    train(chosen, data, out, resume=True)
    ours, theirs = (load_checkpoint(folder / "last.pt").weights for folder in (out, tmp_path / "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_volumes_with_a_spacing_are_trained_in_the_field_of_view(tmp_path):
    volumes = open_folder(write_volumes(tmp_path / "data", size=(60, 50)))  # rows of 1.5 mm, columns of 2 mm
    changes = [*CHANGES, "preprocessing.spacing_mm=1.0", "train.epochs=1"]
    slices = slices_in(tmp_path / "slices", volumes, recipe("folder", changes).contract, 3)
    assert isinstance(slices, WindowedSlices)
    assert slices.window_sizes.tolist() == [[21, 16]] * 5
    train(recipe("folder", changes), volumes, tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["preprocessing.resize=spline3"], "windows must be unset"),
        (["augment_at=source"], "preprocessing.windows must be unset"),
        (["train.validate_with=per_image"], "choose train.validate_with=volume"),
        (['preprocessing.windows={"size":0}'], "windows of 0 pixels are impossible"),
        (['preprocessing.windows={"overlap":1}'], "must be from 0 to less than 1"),
    ],
)
def test_impossible_windows_are_refused(changes, words):
    with pytest.raises(UsageError, match=words):
        recipe("folder", ["preprocessing.windows={}", *changes])
