"""Train a model, from a recipe and a data folder to the best checkpoint; ``train`` tells the story."""

import math
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from medseg_trt.errors import MedsegError
from medseg_trt.progress import LOG, track
from medseg_trt.segment import Run
from medseg_trt.train.augment import augment
from medseg_trt.train.datasets.folder import DataFolder
from medseg_trt.train.datasets.prepared import PreparedSlices, prepare_slices
from medseg_trt.train.evaluate import evaluate
from medseg_trt.train.losses import segmentation_loss
from medseg_trt.train.model import runner
from medseg_trt.train.recipes import Recipe, TrainSpec
from medseg_trt.train.run_lock import run_lock
from medseg_trt.train.runs import PARTIAL_SLICES, Row, begin, save
from medseg_trt.train.schedules import learning_rate


def train(recipe: Recipe, data: DataFolder, out: Path, *, block: Path | None = None, resume: bool = False) -> Path:
    """Train a model and return the path of its best checkpoint.

    Args:
        recipe: architecture, preprocessing, augmentation and the numbers of the run.
        data: a labelled folder.
        out: the run folder, see ``train.runs``.
        block: the frozen block's file, for an architecture that has one.
        resume: go on from ``out/last.pt``; the recipe, the data and the block must be those of the run so far.

    Raises:
        UsageError: recipe, block and run folder do not fit together, or another training writes to the folder.
        InputError: the data cannot be used.
        ArtefactError: the block or the checkpoint cannot be used.
        MedsegError: the training has diverged.
    """
    with run_lock(out):
        return _train(recipe, data, out, block, resume)


def _train(recipe: Recipe, data: DataFolder, out: Path, block: Path | None, resume: bool) -> Path:
    state = begin(recipe, data, out, block=block, resume=resume)
    if state.next_epoch > recipe.train.epochs:
        LOG.info("%s is complete; all %d epochs are done", out, recipe.train.epochs)
        return out / "best.pt"
    checkpoint = state.checkpoint
    model = checkpoint.model().to("cuda" if torch.cuda.is_available() else "cpu")
    optimizer = make_optimizer(model, recipe.train)
    if checkpoint.training is not None:
        optimizer.load_state_dict(checkpoint.training["optimizer"])
    validation = data.splits.get("val", ())
    if not validation:
        LOG.warning("%s has no validation split, so best.pt is simply the latest epoch", data.name)
    with tempfile.TemporaryDirectory(dir=out, prefix=PARTIAL_SLICES, ignore_cleanup_errors=True) as prepared:
        slices = prepare_slices(data.cases("train"), checkpoint.preprocessing, len(data.classes.names), Path(prepared))
        LOG.info("train %s on %d slices of %s", recipe.architecture, len(slices.images), data.name)
        for epoch in range(state.next_epoch, recipe.train.epochs + 1):
            began = time.monotonic()
            row: dict[str, Any] = {"epoch": epoch}
            if epoch > 0:
                row["loss"] = train_epoch(model, optimizer, slices, recipe, epoch)
            model.eval()
            if validation and (epoch % recipe.train.validate_every == 0 or epoch == recipe.train.epochs):
                run = _finite_runner(model, recipe.train)
                found = evaluate(run, validation, checkpoint.preprocessing, data.classes, recipe.train.batch_size)
                row |= {"dice": found.mean_dice, "dice_of_class": {mean.name: mean.dice for mean in found.means}}
            row["seconds"] = round(time.monotonic() - began, 2)
            state = save(state, model, optimizer, row, out)
            _tell(row, recipe.train.epochs)
    return out / "best.pt"


def train_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, slices: PreparedSlices, recipe: Recipe, epoch: int
) -> float:
    """Train for one epoch, counted from 1, and return the mean loss.

    All randomness comes from the seed and the epoch's number, so that a resumed run takes the same steps.

    Raises:
        MedsegError: the loss is no longer a number.
    """
    spec = recipe.train
    torch.manual_seed(spec.seed + epoch)  # of dropout
    dataset = EpochSlices(slices, recipe, epoch)
    drop_last = len(dataset) >= spec.batch_size
    loader = DataLoader(dataset, spec.batch_size, num_workers=spec.workers, drop_last=drop_last)
    device = next(model.parameters()).device
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.train()
    losses: list[float] = []
    for index, (images, labels) in enumerate(track(loader, f"epoch {epoch} of {spec.epochs}")):
        rate = learning_rate(
            (epoch - 1) * len(loader) + index, spec.epochs * len(loader),
            schedule=spec.schedule, peak=spec.learning_rate, floor=spec.min_learning_rate,
            warmup_steps=spec.warmup_steps,
        )  # fmt: skip
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = segmentation_loss(model(images.to(device)), labels.to(device))
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise _diverged(f"the loss of epoch {epoch}, step {index} is {losses[-1]}", spec)
        optimizer.zero_grad()
        loss.backward()
        if spec.max_gradient_norm is not None:
            nn.utils.clip_grad_norm_(trainable, spec.max_gradient_norm)
        optimizer.step()
    return sum(losses) / len(losses)


class EpochSlices(Dataset[tuple[np.ndarray, np.ndarray]]):
    """The augmented slices of one epoch; item ``i`` is the same whenever, and in whichever process, it is asked for."""

    def __init__(self, slices: PreparedSlices, recipe: Recipe, epoch: int) -> None:
        self.slices = slices
        self.recipe = recipe
        self.epoch = epoch
        rng = np.random.default_rng([recipe.train.seed, epoch])
        count = recipe.train.slices_per_epoch or len(slices.images)
        if recipe.train.balance_classes:
            classes = rng.integers(len(slices.slices_of_class), size=count)
            self.order = np.array([rng.choice(slices.slices_of_class[label]) for label in classes])
        else:
            laps = -(-count // len(slices.images))
            self.order = np.concatenate([rng.permutation(len(slices.images)) for _ in range(laps)])[:count]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, item: int) -> tuple[np.ndarray, np.ndarray]:
        seed = [self.recipe.train.seed, self.epoch, item + 1]  # NumPy pads with zeros: [s, e, 0] would repeat [s, e]
        rng = np.random.default_rng(seed)
        index = self.order[item]
        image, labels = np.array(self.slices.images[index]), np.array(self.slices.labels[index])
        image, labels = augment(image, labels, self.recipe.augmentation, rng)
        return image, labels.astype(np.int64)


def make_optimizer(model: nn.Module, spec: TrainSpec) -> torch.optim.Optimizer:
    """Return the optimiser of a recipe over everything that is not frozen."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rate, decay = spec.learning_rate, spec.weight_decay
    if spec.optimizer == "sgd":
        return torch.optim.SGD(parameters, rate, spec.momentum, weight_decay=decay)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[spec.optimizer]
    return kind(parameters, rate, weight_decay=decay)


def _finite_runner(model: nn.Module, spec: TrainSpec) -> Run:
    """Return the model as a function, which refuses to go on once its answers are no longer numbers."""
    run = runner(model)

    def checked(batch: np.ndarray) -> np.ndarray:
        logits = run(batch)
        if not np.isfinite(logits).all():
            raise _diverged("the network's answers on the validation split are no longer numbers", spec)
        return logits

    return checked


def _diverged(what: str, spec: TrainSpec) -> MedsegError:
    smaller = f"--set train.learning_rate={spec.learning_rate / 10:g}"
    return MedsegError(f"{what}. Try a smaller rate in another run folder: {smaller}")


def _tell(row: Row, epochs: int) -> None:
    loss = f"loss {row['loss']:.3f}, " if "loss" in row else "untrained, "
    dice = ""
    if "dice" in row:
        classes = ", ".join(
            f"{name} {'absent' if value is None else f'{value:.2f}'}" for name, value in row["dice_of_class"].items()
        )
        dice = f"validation Dice {row['dice']:.3f} ({classes}), "
    left = f", about {row['seconds'] * (epochs - row['epoch']):.0f} s left" if "loss" in row else ""
    LOG.info("epoch %d of %d: %s%s%.0f s%s", row["epoch"], epochs, loss, dice, row["seconds"], left)
