"""Train a model, from a recipe and a data folder to the best checkpoint; ``train`` tells the story."""

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from medseg_trt.errors import MedsegError, UsageError
from medseg_trt.imaging.segment import Run
from medseg_trt.progress import LOG, track
from medseg_trt.train.datasets.folder import DataFolder
from medseg_trt.train.datasets.prepared import PreparedSlices, mapped_slices, prepare_slices, source_slices
from medseg_trt.train.epoch_slices import EpochSlices
from medseg_trt.train.evaluate import evaluate
from medseg_trt.train.global_batch import BatchShard, assign_shard
from medseg_trt.train.losses import segmentation_loss
from medseg_trt.train.models.frozen import keep_frozen_in
from medseg_trt.train.models.model import runner
from medseg_trt.train.models.transunet import TransUNet
from medseg_trt.train.recipes.training_spec import Recipe, TrainSpec
from medseg_trt.train.run_lock import run_lock
from medseg_trt.train.runs import PARTIAL_SLICES, Progress, Row, RunState, begin, join, save, save_progress
from medseg_trt.train.schedules import learning_rate, scheduled_step
from medseg_trt.train.training_process import TrainingProcess


def train(
    recipe: Recipe, data: DataFolder, out: Path, *, block: Path | None = None, weights: Path | None = None,
    resume: bool = False,
) -> Path:  # fmt: skip
    """Train a model and return the path of its best checkpoint.

    Args:
        recipe: architecture, preprocessing, augmentation and the numbers of the run.
        data: a labelled folder.
        out: the run folder, see ``train.runs``.
        block: the frozen block's file, for an architecture that has one.
        weights: what the encoder starts from, for a recipe whose ``pretrained`` is "file".
        resume: go on from ``out/last.pt``; the recipe, the data and the block must be those of the run so far.

    Raises:
        UsageError: recipe, block and run folder do not fit together, or another training writes to the folder.
        InputError: the data cannot be used.
        ArtefactError: the block or the checkpoint cannot be used.
        MedsegError: the training has diverged.
    """
    process = TrainingProcess(recipe.train.autocast)
    with ExitStack() as held:
        process.run_on_first(lambda: held.enter_context(run_lock(out)))
        state = process.run_on_first(lambda: begin(recipe, data, out, block=block, weights=weights, resume=resume))
        state = state or join(recipe, data, out, block=block, weights=weights)
        if state.next_epoch > recipe.train.epochs:
            LOG.info("%s is complete; all %d epochs are done", out, recipe.train.epochs)
        else:
            _train(recipe, data, out, state, process, held)
    return out / "best.pt"


def _train(
    recipe: Recipe, data: DataFolder, out: Path, state: RunState, process: TrainingProcess, held: ExitStack
) -> None:
    checkpoint, spec = state.checkpoint, recipe.train
    model = checkpoint.model().to(process.device)
    keep_frozen_in(model, spec.frozen_dtype)
    optimizer = make_optimizer(model, spec)
    if checkpoint.training is not None:
        optimizer.load_state_dict(checkpoint.training["optimizer"])
        process.scaler.load_state_dict(checkpoint.training.get("scaler", {}))
    if not data.splits.get("val", ()) and spec.best != "last":
        LOG.warning("%s has no validation split, so best.pt is simply the latest epoch", data.name)
    slices = _prepared(recipe, data, state, out, process, held)
    LOG.info("train %s on %d slices of %s", recipe.architecture, len(slices.images), data.name)
    training = _Training(recipe=recipe, data=data, out=out, process=process, model=model, optimizer=optimizer)
    connected, progress = process.connect(model), state.progress
    for epoch in range(state.next_epoch, spec.epochs + 1):
        began = time.monotonic()
        row: dict[str, Any] = {"epoch": epoch}
        if epoch > 0:
            keep = partial(training.keep, state)
            row["loss"] = train_epoch(connected, optimizer, slices, recipe, epoch, process, progress, keep)
            progress = None
        state = process.run_on_first(partial(training.finish, state, row, began)) or state


@dataclass(frozen=True, kw_only=True, slots=True)
class _Training:
    """What stays the same from epoch to epoch, and what the first process does with it."""

    recipe: Recipe
    data: DataFolder
    out: Path
    process: TrainingProcess
    model: TransUNet
    optimizer: torch.optim.Optimizer

    def finish(self, state: RunState, row: Row, began: float) -> RunState:
        """Validate after an epoch where it is due, and save what it has brought."""
        epoch, spec, validation = row["epoch"], self.recipe.train, self.data.splits.get("val", ())
        self.model.eval()
        if validation and (epoch % spec.validate_every == 0 or epoch == spec.epochs):
            run = _finite_runner(self.model, spec)
            found = evaluate(
                run, validation, state.checkpoint.preprocessing, self.data.classes, spec.batch_size,
                metric=spec.validate_with,
            )  # fmt: skip
            of_class = {mean.name: mean.dice for mean in found.means}
            row = {**row, "dice": found.mean_dice, "iou": found.mean_iou, "dice_of_class": of_class}
        row = {**row, "seconds": round(time.monotonic() - began, 2)}
        state = save(state, self.model, self._beside_weights(), row, self.out, spec)
        _tell(row, spec)
        return state

    def keep(self, state: RunState, progress: Progress) -> None:
        """Save what the steps of an epoch have brought."""
        self.process.run_on_first(lambda: save_progress(state, self.model, self._beside_weights(), progress, self.out))

    def _beside_weights(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.process.scaler.state_dict()}


def _prepared(
    recipe: Recipe, data: DataFolder, state: RunState, out: Path, process: TrainingProcess, held: ExitStack
) -> PreparedSlices:
    """Prepare the slices of the training split once on every machine, in a folder that ``held`` removes."""
    contract = state.checkpoint.preprocessing
    at_source = recipe.augment_at == "source"
    in_training = replace(contract, resize=recipe.training_resize or contract.resize)

    def prepare() -> tuple[Path, tuple[np.ndarray, ...]]:
        partial = tempfile.TemporaryDirectory(dir=out, prefix=PARTIAL_SLICES, ignore_cleanup_errors=True)
        folder = Path(held.enter_context(partial))
        keep = source_slices if at_source else prepare_slices
        return folder, keep(data.cases("train"), in_training, len(data.classes.names), folder).slices_of_class

    return mapped_slices(*process.run_once_per_machine(prepare), in_training if at_source else None)


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    slices: PreparedSlices,
    recipe: Recipe,
    epoch: int,
    process: TrainingProcess | None = None,
    progress: Progress | None = None,
    keep: Callable[[Progress], None] | None = None,
) -> float:
    """Train for one epoch, counted from 1, and return the mean loss.

    All randomness comes from the seed and the epoch's number, so that a resumed run takes the same steps.

    Args:
        model: the network, as ``process.connect`` returned it.
        optimizer: over everything in it that is not frozen.
        slices: the training split.
        recipe: of the run.
        epoch: from 1.
        process: what computes; None is this process alone.
        progress: where an earlier process stopped in the middle of this epoch.
        keep: called with the progress every ``train.save_every_steps`` steps.

    Raises:
        MedsegError: the loss is no longer a number.
        UsageError: there are more processes than slices in a batch.
    """
    spec, process = recipe.train, process or TrainingProcess(recipe.train.autocast)
    torch.manual_seed(spec.seed + epoch)  # of dropout
    dataset = EpochSlices(slices, recipe, epoch)
    batches = _batches(len(dataset), spec, process)
    losses = list(progress.losses) if progress is not None else []
    left = batches[len(losses) :]
    share = [list(range(start + shard.start, start + shard.stop)) for start, shards in left for shard in shards]
    fed = iter(DataLoader(dataset, batch_sampler=share, num_workers=spec.workers))
    if progress is not None:
        process.set_random_state(progress.random_state)
    model.train()
    for step in track(range(len(losses), len(batches)), f"epoch {epoch} of {spec.epochs}"):
        rate = learning_rate(
            scheduled_step((epoch - 1) * len(batches) + step, len(batches), spec.schedule_step),
            spec.epochs * len(batches),
            schedule=spec.schedule, peak=spec.learning_rate, floor=spec.min_learning_rate,
            warmup_steps=spec.warmup_steps,
        )  # fmt: skip
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        losses.append(_loss_and_gradients(model, fed, batches[step][1], process))
        if not math.isfinite(losses[-1]):
            raise _diverged(f"the loss of epoch {epoch}, step {step} is {losses[-1]}", spec)
        process.step(optimizer, spec.max_gradient_norm)
        done = step + 1
        if keep is not None and spec.save_every_steps and done % spec.save_every_steps == 0 and done < len(batches):
            keep(Progress(epoch=epoch, losses=tuple(losses), random_state=process.random_state()))
    assign_shard(model, None)
    return sum(losses) / len(losses)


def _batches(count: int, spec: TrainSpec, process: TrainingProcess) -> list[tuple[int, tuple[BatchShard, ...]]]:
    """Return where each batch of an epoch begins, and this process's shards of it.

    A short last batch is left out where ``spec.drop_last`` says so and it is not the only one.
    """
    size = min(spec.batch_size, count)
    rest = 0 if spec.drop_last else count % size
    smallest = rest or size
    if smallest < process.processes:
        raise UsageError(
            f"a batch of {smallest} slice(s) cannot be shared by {process.processes} processes; start fewer, "
            f"or choose --set train.batch_size={process.processes}"
        )
    whole = [(start, process.shards(size, spec.accumulate)) for start in range(0, count - size + 1, size)]
    return [*whole, (count - rest, process.shards(rest, spec.accumulate))] if rest else whole


def _loss_and_gradients(
    model: nn.Module,
    fed: Iterator[tuple[torch.Tensor, torch.Tensor]],
    shards: tuple[BatchShard, ...],
    process: TrainingProcess,
) -> float:
    """Compute one batch, micro-batch by micro-batch, and return its loss."""
    begin, whole_loss = process.random_state() if len(shards) > 1 else None, 0.0
    for number, shard in enumerate(shards, 1):
        images, labels = next(fed)
        if begin is not None:
            process.set_random_state(begin)  # every micro-batch draws for the whole batch and takes its rows
        assign_shard(model, shard)
        with process.no_average(model, number < len(shards)):
            with process.autocast():
                logits = model(images.to(process.device))
            loss = segmentation_loss(logits.float(), labels.to(process.device), shard) * shard.micro_batch_fraction
            process.backward(loss)
        whole_loss += loss.item()
    return whole_loss


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


def _tell(row: Row, spec: TrainSpec) -> None:
    loss = f"loss {row['loss']:.3f}, " if "loss" in row else "untrained, "
    dice = ""
    if "dice" in row:
        classes = ", ".join(
            f"{name} {'absent' if value is None else f'{value:.2f}'}" for name, value in row["dice_of_class"].items()
        )
        iou = f", IoU {row['iou']:.3f}" if spec.best == "iou" and row["iou"] is not None else ""
        dice = f"validation Dice {row['dice']:.3f} ({classes}){iou}, "
    left = f", about {row['seconds'] * (spec.epochs - row['epoch']):.0f} s left" if "loss" in row else ""
    LOG.info("epoch %d of %d: %s%s%.0f s%s", row["epoch"], spec.epochs, loss, dice, row["seconds"], left)
