"""The published protocols, number by number, against the published code restated here."""

import math
import random

import numpy as np
import pytest
import torch
from scipy import ndimage
from tiny import tiny_recipe

from medseg_trt.errors import UsageError
from medseg_trt.spec import Preprocessing
from medseg_trt.train import loop
from medseg_trt.train.datasets.folder import Case
from medseg_trt.train.datasets.prepared import mapped_slices, source_slices
from medseg_trt.train.epoch_slices import EpochSlices
from medseg_trt.train.loop import make_optimizer
from medseg_trt.train.recipes.augment import Step, augment, rotate, turn_and_mirror, worker_steps
from medseg_trt.train.recipes.recipes import recipe
from medseg_trt.train.recipes.schedules import learning_rate, scheduled_step

LESIONS = ("isic2017", "busi", "clinicdb", "colondb")
VOLUMES = ("synapse", "acdc")
ITERATIONS = 13_950


def rate(spec, step, steps_per_epoch):
    """Return the learning rate of an optimiser step, counted from 0."""
    return learning_rate(
        scheduled_step(step, steps_per_epoch, spec.schedule_step),
        spec.epochs * steps_per_epoch,
        schedule=spec.schedule,
        peak=spec.learning_rate,
        floor=spec.min_learning_rate,
        warmup_steps=spec.warmup_steps,
    )


@pytest.mark.parametrize("name", LESIONS)
def test_lesions_are_trained_as_the_paper_and_unext_say(name):
    lesion_recipe = recipe(name)
    spec = lesion_recipe.train
    assert lesion_recipe.data.dataset == name
    assert (lesion_recipe.architecture, lesion_recipe.preprocessing.image_size) == ("transunet", (256, 256))
    assert (spec.epochs, spec.batch_size, spec.drop_last, spec.seed) == (200, 8, True, 1234)
    assert (spec.optimizer, spec.learning_rate, spec.min_learning_rate, spec.weight_decay) == ("adam", 1e-4, 1e-5, 1e-4)
    assert lesion_recipe.augmentation == (Step(name="rotate90", probability=0.5), Step(name="flip", probability=0.5))
    assert (spec.validate_with, spec.best, spec.first_of_equals) == ("unext_batch", "iou", True)
    assert (lesion_recipe.input_scale, lesion_recipe.preprocessing.channel_order, lesion_recipe.pretrained) == (
        "unext",
        "bgr",
        "file",
    )
    optimizer = make_optimizer(torch.nn.Linear(1, 1), spec)
    assert type(optimizer) is torch.optim.Adam  # AdamW's decay is another one
    assert (optimizer.defaults["weight_decay"], optimizer.defaults["betas"]) == (1e-4, (0.9, 0.999))
    assert recipe(name, ["architecture=llm-transunet", "preprocessing.image_size=[224, 224]"])


@pytest.mark.parametrize("name", VOLUMES)
def test_volumes_are_trained_as_transunet_says(name):
    volume_recipe = recipe(name)
    spec = volume_recipe.train
    assert (volume_recipe.data.dataset, volume_recipe.preprocessing.image_size) == (name, (256, 256))
    assert (spec.epochs, spec.batch_size, spec.drop_last, spec.seed) == (150, 24, False, 1234)
    assert (spec.optimizer, spec.learning_rate, spec.momentum, spec.weight_decay) == ("sgd", 0.01, 0.9, 1e-4)
    assert volume_recipe.preprocessing.resize == "spline3"
    assert (volume_recipe.augment_at, volume_recipe.training_resize) == (
        "source",
        {"synapse": None, "acdc": "spline0"}[name],
    )
    assert (spec.best, spec.keep_epochs) == {"synapse": ("last", (100,)), "acdc": ("dice", ())}[name]
    assert type(make_optimizer(torch.nn.Linear(1, 1), spec)) is torch.optim.SGD


def test_the_cosine_changes_once_an_epoch_from_1e4_to_1e5():
    spec, steps = recipe("busi").train, 51
    for epoch in range(200):  # CosineAnnealingLR(T_max=200, eta_min=1e-5), stepped after each epoch
        expected = 1e-5 + (1e-4 - 1e-5) * (1 + math.cos(math.pi * epoch / 200)) / 2
        for step in (0, 1, steps - 1):
            assert rate(spec, epoch * steps + step, steps) == pytest.approx(expected, rel=1e-12)
    assert rate(spec, 0, steps) == 1e-4
    assert rate(spec, 200 * steps, steps) == pytest.approx(1e-5)  # where the schedule would arrive
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.Adam([parameter], 1e-4)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200, 1e-5)
    for epoch in range(200):
        assert rate(spec, epoch * steps, steps) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        theirs.step()


def test_poly_follows_transunets_trainer_step_by_step():
    spec = recipe("synapse").train
    steps = math.ceil(2211 / spec.batch_size)
    assert (steps, spec.epochs * steps) == (93, ITERATIONS)
    current = 0.01
    for iteration in range(ITERATIONS):  # restated: the optimiser steps, then lr_ is set, then iter_num grows
        assert rate(spec, iteration, steps) == pytest.approx(current, rel=1e-12)
        current = 0.01 * (1 - iteration / ITERATIONS) ** 0.9
    assert [rate(spec, step, steps) for step in (0, 1)] == [0.01, 0.01]
    assert rate(spec, 2, steps) == pytest.approx(0.01 * (1 - 1 / ITERATIONS) ** 0.9, rel=1e-12)
    assert rate(spec, 13_949, steps) == pytest.approx(0.01 * (2 / ITERATIONS) ** 0.9, rel=1e-9)
    assert rate(spec, 13_950, steps) == pytest.approx(0.01 * (1 / ITERATIONS) ** 0.9, rel=1e-9)


def test_a_short_last_batch_is_left_out_or_trained_on(source, tmp_path, no_curve, monkeypatch):
    data, block = source  # five pictures, four for training
    steps, real = [], loop.segmentation_loss
    monkeypatch.setattr(
        loop, "segmentation_loss", lambda *arguments: steps.append(len(arguments[0])) or real(*arguments)
    )
    for changes in (("train.batch_size=3",), ("train.batch_size=3", "train.drop_last=false")):
        loop.train(tiny_recipe("train.epochs=1", *changes), data, tmp_path / str(len(steps)), block=block)
    assert steps == [3, 3, 1]


def test_input_scales_are_named_and_come_to_the_checkpoint_as_mean_and_std():
    for name, mean, std in (
        ("unit", (0, 0, 0), (1, 1, 1)),
        ("imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("unext", (0.485, 0.456, 0.406), (58.395, 57.12, 57.375)),
    ):
        preprocessing = recipe("busi", [f"input_scale={name}"]).contract
        assert preprocessing.mean == mean
        assert preprocessing.std == pytest.approx(std)
    own = recipe("busi", ["input_scale=own", "preprocessing.mean=[0.1, 0.2, 0.3]"]).contract
    assert (own.mean, own.std) == ((0.1, 0.2, 0.3), (1, 1, 1))


# --- augmentation


def random_generator(image, label, seed, size, order):
    """Restate TransUNet's ``RandomGenerator``, with its two generators seeded as a new worker's."""
    decide, amount = random.Random(seed), np.random.default_rng(seed)
    kind = "none"
    if decide.random() > 0.5:
        kind, k, axis = "turn", int(amount.integers(0, 4)), int(amount.integers(0, 2))
        image, label = np.rot90(image, k), np.rot90(label, k)
        image, label = np.flip(image, axis).copy(), np.flip(label, axis).copy()
    elif decide.random() > 0.5:
        kind, angle = "rotate", int(amount.integers(-20, 20))
        image = ndimage.rotate(image, angle, order=0, reshape=False)
        label = ndimage.rotate(label, angle, order=0, reshape=False)
    factors = [new / old for new, old in zip(size, np.shape(image), strict=True)]
    if factors != [1, 1]:
        image = ndimage.zoom(image, factors, order=order)
        label = ndimage.zoom(label, factors, order=0)
    return kind, image, label


@pytest.mark.parametrize(("resize", "order"), [("spline3", 3), ("spline0", 0)])
def test_a_training_slice_is_what_transunets_generator_makes(tmp_path, resize, order):
    rng = np.random.default_rng(0)
    image = rng.random((40, 44), dtype=np.float32)
    label = rng.integers(0, 3, (40, 44), dtype=np.uint8)
    np.savez(tmp_path / "slice.npz", image=image, label=label)
    case = Case(image=tmp_path / "slice.npz", mask=tmp_path / "slice.npz")
    p = Preprocessing(image_size=(32, 32), window=(0.0, 1.0), resize=resize)
    source_slices([case], p, 3, tmp_path / "kept")
    slices = mapped_slices(tmp_path / "kept", (), p)
    steps = {"turn": Step(name="turn_and_mirror"), "rotate": Step(name="rotate", options={"degrees": 20.0})}
    kinds = set()
    for seed in range(12):
        kind, expected, expected_label = random_generator(image, label, seed, (32, 32), order)
        kinds.add(kind)
        amount = np.random.default_rng(seed)
        image_and_labels = slices.images[0], slices.labels[0]
        if kind != "none":
            step = steps[kind]
            image_and_labels = {"turn_and_mirror": turn_and_mirror, "rotate": rotate}[step.name](
                *image_and_labels, amount, **step.options
            )
        finished_image, finished_label = slices.finish(*image_and_labels)
        np.testing.assert_allclose(finished_image, np.stack([np.asarray(expected)] * 3), atol=2**-22)
        np.testing.assert_array_equal(finished_label, expected_label)
    assert kinds == {"turn", "rotate", "none"}


def test_half_of_the_slices_are_turned_and_a_quarter_rotated_by_20_degrees_at_most():
    image = np.arange(64, dtype=np.float32).reshape(1, 8, 8)
    label = np.zeros((8, 8), np.uint8)
    step = Step(name="turn_or_rotate", options={"degrees": 20.0})
    same = sum(
        np.array_equal(augment(image, label, [step], np.random.default_rng(seed))[0], image) for seed in range(2000)
    )
    # Left alone: a quarter, and of the quarter that is rotated one in 40 by 0 degrees; 0.256 with a deviation of 0.01.
    assert 0.256 - 0.05 < same / 2000 < 0.256 + 0.05
    angles = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ndimage, "rotate", lambda array, angle, **_: angles.add(angle) or array)
        for seed in range(1000):
            rotate(image, label, np.random.default_rng(seed), degrees=20.0)
    assert angles == set(range(-20, 20))


def test_the_faithful_loader_repeats_its_choices_every_epoch_and_by_worker():
    steps = recipe("synapse").augmentation
    names = [[step.name for step in slice_steps] for slice_steps in worker_steps(steps, 1234, 24 * 8 * 2 + 5, 24)]
    expected = {}
    for worker in range(8):
        draw = random.Random(1234 + worker)
        chosen = expected[worker] = []
        for _ in range(60):
            first = draw.random() > 0.5
            chosen.append(["turn_and_mirror"] if first else ["rotate"] if draw.random() > 0.5 else [])
    seen = dict.fromkeys(range(8), 0)
    for item, kind in enumerate(names):
        worker = item // 24 % 8
        assert kind == expected[worker][seen[worker]]
        seen[worker] += 1
    assert worker_steps(steps, 1, 50, 24) != worker_steps(steps, 1234, 50, 24)


@pytest.mark.parametrize("rng", ["per-sample", "faithful"])
def test_an_epoch_of_slices_at_their_source_is_of_the_networks_size(tmp_path, rng):
    generator = np.random.default_rng(0)
    cases = []
    for index, size in enumerate([(40, 44), (50, 36), (32, 32)]):  # ACDC's slices differ in size
        path = tmp_path / f"{index}.npz"
        np.savez(path, image=generator.random(size, np.float32), label=generator.integers(0, 4, size, np.uint8))
        cases.append(Case(image=path, mask=path))
    changes = ["preprocessing.image_size=[32, 32]", "preprocessing.window=[0, 1]", f"train.rng={rng}"]
    chosen = recipe("acdc", [*changes, "preprocessing.own_window=false", "train.batch_size=2"])
    slices = source_slices(cases, chosen.contract, 4, tmp_path / "kept")
    epochs = [EpochSlices(slices, chosen, epoch) for epoch in (1, 2)]
    items = [[epoch[item] for item in range(3)] for epoch in epochs]
    for image, labels in (pair for epoch in items for pair in epoch):
        assert (image.shape, labels.shape, image.dtype, labels.dtype) == ((3, 32, 32), (32, 32), np.float32, np.int64)
    assert any(not np.array_equal(one[0], other[0]) for one, other in zip(*items, strict=True))
    assert epochs[0].steps == epochs[1].steps
    assert len(epochs[0].steps) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["preprocessing.image_size=[224, 256]", "augment_at=network"], "must be square"),
        (["augmentation=[]", "train.rng=faithful"], "turn_or_rotate alone"),
        (["augment_at=network", "training_resize=spline0"], "augment_at=source"),
        (["preprocessing.resize=linear", "preprocessing.spacing_mm=1.0"], "spacing_mm must be unset"),
        (["train.best=iou", "train.validate_with=volume_transunet"], "has no IoU"),
        (["train.validate_with=mean"], "choose one of: volume, per_image"),
        (["input_scale=zscore"], "input_scale"),
        (["preprocessing.mean=[0.5, 0.5, 0.5]"], "to give others: input_scale=own"),
    ],
)
def test_fields_that_do_not_fit_one_another_are_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        recipe("synapse", changes)


def test_an_images_own_window_is_that_of_the_whole_volume():
    from pathlib import Path

    from medseg_trt.imaging.images import Image
    from medseg_trt.imaging.segment import prepared_slices

    pixels = np.arange(3 * 16 * 16, dtype=np.int16).reshape(3, 16, 16, 1) + 100
    slices = prepared_slices(
        Image(path=Path("generated"), pixels=pixels), Preprocessing(image_size=(16, 16), own_window=True)
    )
    expected = (pixels[..., 0] - 100) / (3 * 16 * 16 - 1)  # SSL4MIS: (image - min) / (max - min) of the volume
    np.testing.assert_allclose(slices[:, 0], expected, atol=1e-6)
    uniform = Image(path=Path("generated"), pixels=np.full((1, 16, 16, 1), 7, np.int16))
    assert not prepared_slices(uniform, Preprocessing(image_size=(16, 16), own_window=True)).any()
