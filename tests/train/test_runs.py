"""A run folder says how a model was made; a run that was killed at any moment goes on as if nothing had happened."""

import json
import logging
import shutil
import signal
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from tiny import tiny_changes, tiny_recipe, train_and_kill, write_block

from medseg_trt.errors import ArtefactError, UsageError
from medseg_trt.files import sha256
from medseg_trt.spec import from_dict
from medseg_trt.train import loop, runs
from medseg_trt.train.checkpoint import load_checkpoint
from medseg_trt.train.datasets.folder import manifest_sha256, open_folder
from medseg_trt.train.datasets.official import open_dataset
from medseg_trt.train.evaluate import Evaluation, evaluate
from medseg_trt.train.loop import train
from medseg_trt.train.models.model import runner
from medseg_trt.train.recipes.training_spec import Recipe

pytestmark = pytest.mark.usefixtures("no_curve")
RECIPE = tiny_recipe()  # three epochs of two steps


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """The run that nobody interrupted; do not write to it."""
    data, block = source
    out = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "draw_curve", lambda history, path: path.write_bytes(b"a curve"))
        train(RECIPE, data, out, block=block)
    return out


def history_of(out):
    return [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]


def without_seconds(history):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in history]


def assert_same_run(out, whole):
    """The weights, the optimiser's state and the history are those of the other run, to the last bit."""
    for name in ("last.pt", "best.pt"):
        ours, theirs = load_checkpoint(out / name), load_checkpoint(whole / name)
        assert ours.weights.keys() == theirs.weights.keys()
        assert all(torch.equal(ours.weights[key], theirs.weights[key]) for key in theirs.weights), name
        assert ours.provenance.epoch == theirs.provenance.epoch, name
    ours, theirs = (load_checkpoint(path / "last.pt").training for path in (out, whole))
    assert ours is not None
    assert theirs is not None
    assert ours.epoch == theirs.epoch
    states = ours.optimizer_state.optimizer["state"]
    for index, state in theirs.optimizer_state.optimizer["state"].items():
        assert all(torch.equal(states[index][key], value) for key, value in state.items())
    assert without_seconds(history_of(out)) == without_seconds(history_of(whole))


class Killed(BaseException):
    """Stands for a kill: nothing in the program may catch it."""


def train_until(write, call, source, out):
    """Start a run that dies just before ``runs`` uses ``write`` for the ``call``-th time, from 0."""
    (data, block), real, calls = source, getattr(runs, write), iter(range(100))

    def dying(*arguments, **options):
        if next(calls) == call:
            raise Killed
        return real(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, write, dying)
        with pytest.raises(Killed):
            train(RECIPE, data, out, block=block)


@pytest.mark.parametrize(
    ("write", "call", "epochs_kept"),
    [
        ("save_checkpoint", 2, 1),  # epoch 1, before best.pt
        ("atomic_file", 1, 1),  # ... before history.jsonl: best.pt is of epoch 1, last.pt of epoch 0
        ("save_checkpoint", 3, 2),  # ... before last.pt: the history is longer than last.pt knows
        ("draw_curve", 1, 2),  # ... before curve.png
    ],
)
def test_a_run_killed_between_any_two_files_of_an_epoch_goes_on_as_if_nothing_had_been(
    source, whole, tmp_path, write, call, epochs_kept
):
    data, block = source
    out = tmp_path / "run"
    train_until(write, call, source, out)
    assert len(history_of(out)) == epochs_kept
    assert load_checkpoint(out / "best.pt").weights  # what is there can be used
    train(RECIPE, data, out, block=block, resume=True)
    assert_same_run(out, whole)


def test_a_run_killed_by_the_system_in_the_middle_of_an_epoch_goes_on(source, whole, tmp_path):
    data, block = source
    out = tmp_path / "run"
    arguments = ["--recipe", "folder", "--data", str(data.root), "--block", str(block), "-o", str(out)]
    arguments += [part for change in tiny_changes() for part in ("--set", change)]
    done = train_and_kill(arguments, signal.SIGKILL, at_step=3)  # two steps an epoch: in the middle of the second one
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [row["epoch"] for row in history_of(out)] == [0, 1]
    visible = {path.name for path in out.iterdir() if not path.name.startswith(".")}
    (block_name,) = (name for name in visible if name.startswith("block-"))
    assert visible == {
        "best.pt",
        "last.pt",
        "history.jsonl",
        "recipe.json",
        "data.json",
        "data_folder.json",
        block_name,
    }
    assert list(out.glob(".partial-*"))  # nobody could remove the prepared slices
    (out / ".partial-abc.pt").write_bytes(b"half a checkpoint")

    train(RECIPE, data, out, block=block, resume=True)
    assert not list(out.glob(".*"))
    assert_same_run(out, whole)


def test_resume_without_optimizer_state_fails_the_run_comparison(source, whole, tmp_path, monkeypatch):
    data, block = source
    out = tmp_path / "run"
    train_until("save_checkpoint", 4, source, out)
    monkeypatch.setattr(torch.optim.Adam, "load_state_dict", lambda optimizer, state: None)
    train(RECIPE, data, out, block=block, resume=True)
    with pytest.raises(AssertionError):
        assert_same_run(out, whole)


def test_the_run_and_the_data_may_have_moved_in_between(source, whole, tmp_path):
    train_until("draw_curve", 1, source, tmp_path / "here")
    out = (tmp_path / "here").rename(tmp_path / "there")
    moved = open_folder(shutil.copytree(source[0].root, tmp_path / "moved"))
    train(RECIPE, moved, out, resume=True)  # the block lies beside last.pt
    assert_same_run(out, whole)


def content(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_a_second_start_without_resume_is_refused_and_changes_nothing(source, whole):
    data, block = source
    before = content(whole)
    with pytest.raises(UsageError, match=r"holds a run already\. Add --resume"):
        train(RECIPE, data, whole, block=block)
    assert content(whole) == before


def test_a_run_that_is_complete_is_left_as_it_is(source, whole, monkeypatch):
    data, block = source
    before = content(whole)
    monkeypatch.setattr(loop, "prepare_slices", lambda *_: pytest.fail("the slices were prepared for nothing"))
    assert train(RECIPE, data, whole, block=block, resume=True) == whole / "best.pt"
    assert content(whole) == before


def same_data(data, tmp_path):
    return data


def changed_mask(data, tmp_path):
    root = shutil.copytree(data.root, tmp_path / "data")
    mask = np.array(PIL.Image.open(root / "masks" / "case3.png"))
    mask[20, 20] ^= 255
    PIL.Image.fromarray(mask).save(root / "masks" / "case3.png")
    return open_folder(root)


def changed_window(data, tmp_path):
    root = shutil.copytree(data.root, tmp_path / "data")
    (root / "dataset.json").write_text('{"window": [0, 200]}')
    return open_folder(root)


@pytest.mark.parametrize(
    ("change", "change_data", "block_seed", "named"),
    [
        ("train.learning_rate=0.02", same_data, 0, "another recipe: "),
        ("augmentation=[]", same_data, 0, "another recipe: "),
        (None, changed_mask, 0, "another data;"),
        (None, changed_window, 0, "another data;"),
        (None, same_data, 1, "another block;"),
        ("train.seed=1", changed_mask, 1, r"another recipe: train\.seed was "),
    ],
)
def test_another_recipe_data_or_block_is_refused_by_name(
    source, whole, tmp_path, change, change_data, block_seed, named
):
    before = content(whole)
    recipe, data = tiny_recipe(*([change] if change else [])), change_data(source[0], tmp_path)
    block = write_block(tmp_path, block_seed)
    with pytest.raises(UsageError, match=named):
        train(recipe, data, whole, block=block, resume=True)
    assert content(whole) == before


def test_resume_without_a_run_says_so_and_begins_one(source, tmp_path, caplog):
    data, block = source
    caplog.set_level(logging.WARNING, "medseg_trt")
    train(tiny_recipe("train.epochs=0"), data, tmp_path / "run", block=block, resume=True)
    assert f"{tmp_path / 'run'} holds no run to resume" in caplog.text
    assert len(history_of(tmp_path / "run")) == 1


@pytest.mark.parametrize("block", [None, "missing.safetensors"])
def test_a_missing_block_leaves_no_run_folder(source, tmp_path, block):
    data, _ = source
    with pytest.raises((UsageError, ArtefactError), match="medseg-trt block extract"):
        train(RECIPE, data, tmp_path / "run", block=block and tmp_path / block)
    assert not (tmp_path / "run").exists()


def test_run_folder_records_recipe_data_and_provenance(source, whole):
    assert from_dict(Recipe, json.loads((whole / "recipe.json").read_text()), "recipe.json") == RECIPE
    manifest = json.loads((whole / "data.json").read_text())
    assert manifest["files"].keys() == {f"{part}/case{i}.png" for part in ("images", "masks") for i in range(5)}
    assert manifest["splits"].keys() == {"train", "val"}
    for name in ("best.pt", "last.pt"):
        checkpoint = load_checkpoint(whole / name)
        recorded = checkpoint.provenance
        assert recorded.recipe == json.loads((whole / "recipe.json").read_text())
        assert recorded.data is not None
        assert recorded.data.sha256 == manifest_sha256(manifest)
        assert recorded.epoch is not None
        row = history_of(whole)[recorded.epoch]
        assert recorded.metrics == {"val": row["dice_of_class"]}
        assert checkpoint.block_sha256 == sha256(source[1])
        assert not any(key.startswith("insert.block.") for key in checkpoint.weights)
    assert load_checkpoint(whole / "best.pt").training is None  # who uses a model needs no optimiser's state


def test_the_data_are_found_again_from_any_folder(source, tmp_path, monkeypatch):
    data, block = source
    monkeypatch.chdir(data.root.parent)
    train(tiny_recipe("train.epochs=0"), open_folder(data.root.relative_to(data.root.parent)), tmp_path, block=block)
    assert load_checkpoint(tmp_path / "last.pt").data_folder == data.root


def test_checkpoints_contain_no_file_system_paths(source, tmp_path):
    data, block = source
    train(tiny_recipe("train.epochs=0"), data, tmp_path / "run", block=block)
    manifest = tmp_path / "run" / "data.json"
    changes = ("train.epochs=1", f"data.manifest={manifest}")
    again = open_dataset(None, data.root, tiny_recipe(*changes).data)
    train(tiny_recipe(*changes), again, tmp_path / "again", block=block)
    for path in (tmp_path / "run" / "best.pt", tmp_path / "again" / "best.pt", tmp_path / "again" / "last.pt"):
        content = path.read_bytes()
        for folder in (data.root, tmp_path, Path.cwd()):
            assert str(folder).encode() not in content
    recorded = load_checkpoint(tmp_path / "again" / "best.pt")
    assert recorded.provenance.recipe is not None
    assert recorded.provenance.recipe["data"]["manifest"] == "data.json"
    train(tiny_recipe(*changes), again, tmp_path / "again", block=block, resume=True)
    (tmp_path / "alone").mkdir()
    copied = shutil.copy(tmp_path / "again" / "best.pt", tmp_path / "alone" / "best.pt")
    shutil.copy(tmp_path / "again" / f"block-{sha256(block)[:16]}.safetensors", tmp_path / "alone")
    assert load_checkpoint(Path(copied)).data_folder is None


def best_epoch(monkeypatch, source, out, dice, *changes):
    """Return the epoch of best.pt when validation finds ``dice`` (one figure a validation)."""
    data, block = source
    figures = iter(dice)

    class PlannedEvaluation(Evaluation):
        mean_dice = property(lambda self: next(figures))

    monkeypatch.setattr(loop, "evaluate", lambda *_, **__: PlannedEvaluation(cases=(), means=()))
    monkeypatch.setattr(loop, "train_epoch", lambda *_: 1.0)
    best = train(tiny_recipe(f"train.epochs={len(dice) - 1}", *changes), data, out, block=block)
    assert next(figures, None) is None
    return load_checkpoint(best).provenance.epoch


@pytest.mark.parametrize(
    ("dice", "epoch"),
    [
        ([0.1, 0.5, 0.3], 1),
        ([0.1, 0.2, 0.3], 2),
        ([0.4, 0.2, 0.3], 0),
        ([0.0, 0.5, 0.5], 2),  # of equals the later has seen more
        ([0.0, 0.0, 0.0], 2),  # no class occurs: the untrained model is not the best
    ],
)
def test_best_is_the_epoch_with_the_highest_dice(source, tmp_path, monkeypatch, dice, epoch):
    assert best_epoch(monkeypatch, source, tmp_path / "run", dice) == epoch


def test_an_epoch_that_was_not_validated_is_never_the_best(source, tmp_path, monkeypatch):
    changes = ("train.epochs=5", "train.validate_every=2")  # validated: 0, 2, 4 and the last
    assert best_epoch(monkeypatch, source, tmp_path / "run", [0.6, 0.7, 0.5, 0.4], *changes) == 2
    assert [row["epoch"] for row in history_of(tmp_path / "run") if "dice" in row] == [0, 2, 4, 5]


@pytest.mark.parametrize(
    ("dice", "changes", "epoch"),
    [
        ([0.9, 0.5, 0.5], ("train.first_of_equals=true",), 1),  # strictly higher, and never the untrained model
        ([0.0, 0.0, 0.0], ("train.first_of_equals=true",), 1),
        ([0.1, 0.5, 0.6], ("train.first_of_equals=true",), 2),
        ([0.1, 0.5, 0.3], ("train.best=last",), 2),
    ],
)
def test_protocols_choose_their_best_epoch_in_other_ways(source, tmp_path, monkeypatch, dice, changes, epoch):
    assert best_epoch(monkeypatch, source, tmp_path / "run", dice, *changes) == epoch


def test_the_best_may_be_that_of_the_highest_iou_in_unexts_way(source, tmp_path, no_curve):
    data, block = source
    changes = ("train.best=iou", "train.first_of_equals=true", "train.validate_with=unext_batch", "train.epochs=4")
    best = train(tiny_recipe(*changes, "train.keep_epochs=[2]"), data, tmp_path / "run", block=block)
    rows = history_of(tmp_path / "run")[1:]
    highest = max(row["iou"] for row in rows)
    first = next(row["epoch"] for row in rows if row["iou"] == highest)
    checkpoint = load_checkpoint(best)
    assert checkpoint.provenance.epoch == first
    evaluation = evaluate(
        runner(checkpoint.model()), data.cases("val"), checkpoint.preprocessing, data.classes, 2, metric="unext_batch"
    )
    assert evaluation.mean_iou == highest
    assert load_checkpoint(tmp_path / "run" / "epoch-2.pt").provenance.epoch == 2


def test_a_run_begun_before_there_were_protocols_goes_on(source, whole, tmp_path):
    """What its recipe and its checkpoint do not hold has the meaning that it had then."""
    data, block = source
    out = tmp_path / "run"
    train_until("save_checkpoint", 4, source, out)
    content = torch.load(out / "last.pt", weights_only=True)
    header = content["medseg_trt"]
    for name in ("channel_order", "own_window"):
        del header["preprocessing"][name]
        del header["provenance"]["recipe"]["preprocessing"][name]
    recorded = header["provenance"]["recipe"]
    for name in ("input_scale", "augment_at", "training_resize", "pretrained"):
        del recorded[name]
    new = ("schedule_step", "drop_last", "validate_with", "best", "first_of_equals", "keep_epochs", "rng")
    for name in new:
        del recorded["train"][name]
    torch.save(content, out / "last.pt")
    train(RECIPE, data, out, block=block, resume=True)
    ours, theirs = (load_checkpoint(path / "last.pt").weights for path in (out, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
