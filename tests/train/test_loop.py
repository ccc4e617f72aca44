"""Training learns, touches nothing that is frozen, follows its schedule, repeats exactly, and stops without a loss."""

import json
import math
import signal

import numpy as np
import PIL.Image
import pytest
import torch
from tiny import (
    TINY_LLAMA,
    tiny_changes,
    tiny_recipe,
    tiny_spec,
    train_and_kill,
    write_description,
    write_volumes,
)

from medseg_trt.errors import InputError, MedsegError
from medseg_trt.train import loop
from medseg_trt.train.block.blocks import random_block
from medseg_trt.train.checkpoint import FROZEN_PREFIXES, load_checkpoint
from medseg_trt.train.datasets.folder import open_folder
from medseg_trt.train.datasets.prepared import PreparedSlices
from medseg_trt.train.evaluate import evaluate
from medseg_trt.train.loop import EpochSlices, make_optimizer, train, train_epoch
from medseg_trt.train.models.model import build_model, runner
from medseg_trt.train.recipes.training_spec import OPTIMIZERS

RUN_FILES = {"best.pt", "last.pt", "history.jsonl", "curve.png", "recipe.json", "data.json", "data_folder.json"}


@pytest.fixture(scope="module")
def slices():
    """Twelve noisy slices of three classes; class 2 is only in the last one, class 1 in four."""
    rng = np.random.default_rng(0)
    labels = np.zeros((12, 32, 32), np.uint8)
    labels[[1, 4, 6, 9], 8:16, 8:16] = 1
    labels[11, 20:28, 20:28] = 2
    images = rng.normal(size=(12, 3, 32, 32)).astype(np.float32) + labels[:, np.newaxis]
    holds = [np.flatnonzero((labels == label).any((1, 2))) for label in range(3)]
    return PreparedSlices(images=images, labels=labels, slices_of_class=tuple(holds))


def history_of(out):
    return [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]


def weights_of(out):
    return load_checkpoint(out / "last.pt").weights


def same(weights, others):
    assert weights.keys() == others.keys()
    return all(torch.equal(weights[name], others[name]) for name in weights)


def fresh_model():
    torch.manual_seed(0)
    return build_model(tiny_spec(), random_block(TINY_LLAMA, seed=0))


def test_training_lowers_the_loss_and_raises_dice(source, tmp_path, no_curve):
    data, block = source
    train(tiny_recipe("train.epochs=8"), data, tmp_path / "run", block=block)
    untrained, first, *_, last = history_of(tmp_path / "run")
    # A network that gives every pixel the same answer cannot halve the loss of the first epoch, 1.1: the discs cover at
    # most a fifth, so its Dice term alone stays above 1 - 2 * 0.2 / 1.2 = 0.67. Six seeds came to 0.14 … 0.24 of it.
    assert last["loss"] < 0.5 * first["loss"]
    # With everything marked, Dice is at most 2 * 0.2 / 1.2 = 0.33. Six seeds came to 0.76 … 0.94.
    assert last["dice"] > max(0.5, untrained["dice"] + 0.2)


def test_training_run_folder_has_exactly_the_expected_files(source, tmp_path):
    data, block = source
    out = tmp_path / "run"
    best = train(tiny_recipe("train.epochs=1"), data, out, block=block)
    (block_file,) = (path for path in out.iterdir() if path.suffix == ".safetensors")
    assert {path.name for path in out.iterdir()} == RUN_FILES | {block_file.name}
    assert block_file.read_bytes() == block.read_bytes()
    assert best == out / "best.pt"
    with PIL.Image.open(out / "curve.png") as curve:
        assert curve.format == "PNG"


def test_several_classes_are_learned_too(tmp_path, source, no_curve):
    data = open_folder(write_volumes(tmp_path / "data", 3, 4))
    recipe = tiny_recipe("train.epochs=8", "augmentation=[]")
    train(recipe, data, tmp_path / "run", block=source[1])
    untrained, *_, last = history_of(tmp_path / "run")
    assert last["dice_of_class"].keys() == {"disc", "bar"}
    assert min(last["dice_of_class"].values()) > 0.6  # both: a network that gives up on one class has 0 there
    assert last["dice"] > untrained["dice"] + 0.3


def frozen_of(model):
    return {name: value.clone() for name, value in model.state_dict().items() if name.startswith(FROZEN_PREFIXES)}


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_the_frozen_block_stays_as_it_is_to_the_last_bit(slices, optimizer_name):
    recipe = tiny_recipe(f"train.optimizer={optimizer_name}", "train.weight_decay=0.1")
    model = fresh_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    frozen = frozen_of(model)
    optimizer = make_optimizer(model, recipe.train)
    train_epoch(model, optimizer, slices, recipe, 1)
    assert frozen
    assert all(torch.equal(value, frozen[name]) for name, value in frozen_of(model).items())
    unchanged = {name for name, value in model.named_parameters() if torch.equal(value, before[name])}
    assert unchanged == set(frozen)  # everything else did move
    optimised = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    trainable = {id(value) for name, value in model.named_parameters() if not name.startswith(FROZEN_PREFIXES)}
    assert optimised == trainable


def test_unfrozen_block_changes_in_training(slices):
    recipe = tiny_recipe()
    model = fresh_model().requires_grad_(True)
    frozen = frozen_of(model)
    train_epoch(model, make_optimizer(model, recipe.train), slices, recipe, 1)
    assert not any(torch.equal(value, frozen[name]) for name, value in frozen_of(model).items())


def test_an_epoch_trains_in_training_mode(slices):
    recipe = tiny_recipe("train.batch_size=4")
    model = fresh_model().eval()  # as a checkpoint and a validation leave it
    train_epoch(model, make_optimizer(model, recipe.train), slices, recipe, 1)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert norms
    assert {int(norm.num_batches_tracked or 0) for norm in norms} == {3}


def test_validation_scores_what_the_checkpoint_holds(source, tmp_path, no_curve):
    data, block = source
    train(tiny_recipe("train.epochs=2"), data, tmp_path / "run", block=block)
    checkpoint = load_checkpoint(tmp_path / "run" / "last.pt")
    # Dropout or BatchNorm left in training mode would give other answers than the file does.
    evaluation = evaluate(runner(checkpoint.model()), data.cases("val"), checkpoint.preprocessing, data.classes)
    assert history_of(tmp_path / "run")[-1]["dice_of_class"] == {mean.name: mean.dice for mean in evaluation.means}
    assert 0 < evaluation.mean_dice < 1


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("sgd", torch.optim.SGD, {"momentum": 0.5, "weight_decay": 0.25}),
        ("adam", torch.optim.Adam, {"weight_decay": 0.25}),
        ("adamw", torch.optim.AdamW, {"weight_decay": 0.25}),
    ],
)
def test_the_optimiser_is_the_recipes(name, kind, options):
    recipe = tiny_recipe(f"train.optimizer={name}", "train.momentum=0.5", "train.weight_decay=0.25")
    optimizer = make_optimizer(fresh_model(), recipe.train)
    assert type(optimizer) is kind
    (group,) = optimizer.param_groups
    assert {option: group[option] for option in options} == options


def rates(recipe, slices, monkeypatch):
    """Return the learning rate of every step that the optimiser really takes."""
    model = fresh_model()
    optimizer = make_optimizer(model, recipe.train)
    seen = []
    monkeypatch.setattr(optimizer, "step", lambda: seen.append([group["lr"] for group in optimizer.param_groups]))
    monkeypatch.setattr(loop, "segmentation_loss", lambda logits, *_: logits.mean())
    for epoch in range(1, recipe.train.epochs + 1):
        train_epoch(model, optimizer, slices, recipe, epoch)
    return np.array(seen)


def test_every_step_has_the_rate_of_the_schedule(slices, monkeypatch):
    recipe = tiny_recipe(
        "train.batch_size=5", "train.min_learning_rate=0.001", "train.warmup_steps=2", "train.schedule=cosine"
    )
    used_rates = rates(recipe, slices, monkeypatch)
    # Twelve slices make two whole batches of five; three epochs take six steps, the first two of them warm up.
    done = np.arange(4) / 4
    expected = [0.005, 0.01, *(0.001 + 0.009 * (1 + np.cos(np.pi * done)) / 2)]
    np.testing.assert_allclose(used_rates, np.array(expected)[:, np.newaxis], rtol=1e-12)  # both in float64
    # A schedule that begins anew with every epoch, or counts the dropped batch of two, is far from this.
    anew = np.tile(0.001 + 0.009 * (1 + np.cos(np.pi * np.arange(2) / 2)) / 2, 3)
    assert abs(used_rates.ravel() - anew).max() > 1e-3


def test_gradients_are_clipped_to_the_recipes_norm(slices, monkeypatch):
    def norm_at_the_step(max_norm):
        recipe = tiny_recipe("train.batch_size=12", f"train.max_gradient_norm={max_norm}")
        model = fresh_model()
        optimizer = make_optimizer(model, recipe.train)
        norms = []

        def step():
            gradients = [parameter.grad.double().flatten() for parameter in optimizer.param_groups[0]["params"]]
            norms.append(torch.cat(gradients).norm().item())

        monkeypatch.setattr(optimizer, "step", step)
        train_epoch(model, optimizer, slices, recipe, 1)
        return norms[0]

    free = norm_at_the_step("null")
    assert free > 0.01
    assert norm_at_the_step(free / 2) == pytest.approx(free / 2, rel=1e-4)  # float32 sums over 300 000 gradients
    assert norm_at_the_step(free * 2) == pytest.approx(free, rel=1e-4)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(source, tmp_path, no_curve):
    data, block = source
    for name, seed in (("one", 7), ("two", 7), ("three", 8)):
        train(tiny_recipe(f"train.seed={seed}", "train.epochs=1"), data, tmp_path / name, block=block)
        torch.rand(5)  # whatever used the global generator before must not matter
    assert same(weights_of(tmp_path / "one"), weights_of(tmp_path / "two"))
    assert not same(weights_of(tmp_path / "one"), weights_of(tmp_path / "three"))


def without_seconds(history):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in history]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")  # PyTorch's own way to start workers
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # on a machine with one core
def test_loader_workers_do_not_change_weights_or_history(source, tmp_path, no_curve):
    data, block = source
    for workers in (0, 2):
        recipe = tiny_recipe(f"train.workers={workers}", "train.epochs=2")
        train(recipe, data, tmp_path / str(workers), block=block)
    assert same(weights_of(tmp_path / "0"), weights_of(tmp_path / "2"))
    assert without_seconds(history_of(tmp_path / "0")) == without_seconds(history_of(tmp_path / "2"))


def test_no_epochs_give_the_untrained_model(source, tmp_path, no_curve):
    data, block = source
    best = train(tiny_recipe("train.epochs=0", "train.seed=5"), data, tmp_path / "run", block=block)
    torch.manual_seed(5)
    untrained = build_model(tiny_spec(num_classes=1), random_block(TINY_LLAMA, seed=0))
    state = {name: value for name, value in untrained.state_dict().items() if not name.startswith(FROZEN_PREFIXES)}
    assert same(load_checkpoint(best).weights, state)
    (row,) = history_of(tmp_path / "run")
    assert row.keys() == {"epoch", "dice", "iou", "dice_of_class", "seconds"}


def test_a_loss_that_is_no_number_stops_with_advice_and_keeps_the_last_epoch(source, tmp_path, monkeypatch, no_curve):
    data, block = source
    real, steps = loop.segmentation_loss, iter(range(100))

    def loss(*arguments):
        return real(*arguments) * (math.nan if next(steps) == 3 else 1)

    monkeypatch.setattr(loop, "segmentation_loss", loss)
    with pytest.raises(MedsegError, match=r"epoch 2, step 1 is nan.*--set train.learning_rate=0.001") as raised:
        train(tiny_recipe(), data, tmp_path / "run", block=block)
    assert type(raised.value) is MedsegError
    assert [row["epoch"] for row in history_of(tmp_path / "run")] == [0, 1]
    assert all(value.isfinite().all() for value in weights_of(tmp_path / "run").values())


def test_a_network_that_overflows_after_a_good_loss_is_noticed_at_validation(source, tmp_path, no_curve):
    data, block = source
    with pytest.raises(MedsegError, match=r"validation split are not finite.*--set train.learning_rate="):
        train(tiny_recipe("train.learning_rate=1e30", "train.batch_size=4"), data, tmp_path / "run", block=block)
    assert [row["epoch"] for row in history_of(tmp_path / "run")] == [0]


def test_a_bad_mask_stops_before_the_first_step_whichever_split_it_is_in(tmp_path, source, monkeypatch):
    monkeypatch.setattr(loop, "train_epoch", lambda *_: pytest.fail("a training step was taken"))
    for split in ("train", "val"):
        root = write_volumes(tmp_path / split, 4, 2)
        entries = [{"image": f"scan{index}"} for index in range(4)]
        write_description(root, {"train": entries[:3], "val": entries[3:]})
        bad = root / "masks" / {"train": "scan2.nii.gz", "val": "scan3.nii.gz"}[split]
        bad.write_bytes((root / "images" / "scan0.nii.gz").read_bytes())  # grey values
        with pytest.raises(InputError, match=f"{bad} holds the values"):
            train(tiny_recipe(), open_folder(root), tmp_path / "run" / split, block=source[1])
        assert {path.name for path in (tmp_path / "run" / split).glob("*")} <= {
            "recipe.json",
            "data.json",
            "data_folder.json",
        }


def test_a_folder_of_the_users_in_the_run_folder_is_left_alone(source, tmp_path, no_curve):
    data, block = source
    mine = tmp_path / "run" / "prepared" / "thesis.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("three years of work")
    train(tiny_recipe("train.epochs=0"), data, tmp_path / "run", block=block)
    assert mine.read_text() == "three years of work"


def test_without_validation_the_latest_epoch_is_the_best(tmp_path, source, no_curve, caplog):
    root = write_volumes(tmp_path / "data", 1, 4)
    write_description(root, {"train": [{"image": "scan0"}]})
    best = train(tiny_recipe("train.epochs=2"), open_folder(root), tmp_path / "run", block=source[1])
    assert "no validation split" in caplog.text
    assert all("dice" not in row for row in history_of(tmp_path / "run"))
    assert load_checkpoint(best).provenance.epoch == 2


def items(slices, recipe, epoch, order):
    dataset = EpochSlices(slices, recipe, epoch)
    return {index: dataset[index] for index in order}


def test_an_item_is_the_same_in_any_order_of_access(slices):
    recipe = tiny_recipe('augmentation=[{"name": "flip"}, {"name": "noise", "options": {"deviation": 1}}]')
    forward, backward = items(slices, recipe, 3, range(12)), items(slices, recipe, 3, reversed(range(12)))
    for index, (image, labels) in forward.items():
        np.testing.assert_array_equal(image, backward[index][0])
        np.testing.assert_array_equal(labels, backward[index][1])
    next_epoch = items(slices, recipe, 4, range(12))
    assert not any(np.array_equal(image, next_epoch[index][0]) for index, (image, _) in forward.items())


def test_two_items_of_one_slice_are_augmented_differently(slices):
    recipe = tiny_recipe('augmentation=[{"name": "noise", "options": {"deviation": 1}}]', "train.slices_per_epoch=48")
    dataset = EpochSlices(slices, recipe, 1)
    images = [dataset[index][0] for index in np.flatnonzero(dataset.order == 5).tolist()]
    assert len(images) == 4
    assert not any(np.array_equal(one, other) for i, one in enumerate(images) for other in images[:i])


def test_the_prepared_slices_are_never_changed(slices):
    before = slices.images.copy()
    recipe = tiny_recipe("augmentation=[]")
    image, labels = EpochSlices(slices, recipe, 1)[0]
    image += 1
    labels += 1
    np.testing.assert_array_equal(slices.images, before)
    assert slices.labels.max() == 2


@pytest.mark.parametrize(("count", "times"), [("null", {1}), (24, {2}), (30, {2, 3}), (5, {0, 1})])
def test_without_balance_every_slice_comes_as_often_as_any_other(slices, count, times):
    dataset = EpochSlices(slices, tiny_recipe(f"train.slices_per_epoch={count}"), 1)
    assert len(dataset) == (12 if count == "null" else count)
    assert set(np.bincount(dataset.order, minlength=12)) == times


@pytest.mark.parametrize("balance", ["true", "false"])
def test_every_epoch_and_every_seed_has_an_order_of_its_own(slices, balance):
    orders = {
        tuple(EpochSlices(slices, tiny_recipe(f"train.balance_classes={balance}", f"train.seed={seed}"), epoch).order)
        for seed in (1, 2)
        for epoch in (1, 2)
    }
    assert len(orders) == 4


def test_with_balance_a_rare_class_is_drawn_as_often_as_any_other(slices):
    count = 3000
    recipe = tiny_recipe("train.balance_classes=true", f"train.slices_per_epoch={count}")
    drawn = np.bincount(EpochSlices(slices, recipe, 1).order, minlength=12) / count
    # Each class is drawn with 1/3, then one of its slices: the share of slice 11 is 1/3 for its own class and 1/36 for
    # the background that it holds too. Five standard deviations of a binomial: one seed in a million would fail.
    expected = np.full(12, 1 / 36)
    expected[[1, 4, 6, 9]] += 1 / 12
    expected[11] += 1 / 3
    bound = 5 * np.sqrt(expected * (1 - expected) / count)
    assert (abs(drawn - expected) < bound).all()
    without = np.bincount(EpochSlices(slices, tiny_recipe(f"train.slices_per_epoch={count}"), 1).order) / count
    assert abs(without[11] - expected[11]) > bound[11]  # drawing slices evenly, without the classes, is caught


def test_ctrl_c_keeps_the_epochs_that_are_done_and_the_run_can_go_on(source, tmp_path, no_curve):
    data, block = source
    out = tmp_path / "run"
    changes = tiny_changes("train.epochs=2")
    arguments = ["--recipe", "folder", "--data", str(data.root), "--block", str(block), "-o", str(out)]
    arguments += [part for change in changes for part in ("--set", change)]
    done = train_and_kill(arguments, signal.SIGINT, at_step=3)  # two steps an epoch: in the middle of the second one
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    assert "interrupted" in done.stderr
    assert [row["epoch"] for row in history_of(out)] == [0, 1]
    assert not list(out.glob(".*"))  # what was half done is gone
    recipe = tiny_recipe("train.epochs=2")
    train(recipe, data, out, block=block, resume=True)
    train(recipe, data, tmp_path / "whole", block=block)
    assert same(weights_of(out), weights_of(tmp_path / "whole"))
    assert without_seconds(history_of(out)) == without_seconds(history_of(tmp_path / "whole"))
