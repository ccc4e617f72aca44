"""Train a model, from a recipe and a data folder to the best checkpoint; ``train`` is the entry point."""

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from medseg_trt.devices import AUTO, ComputeDevice
from medseg_trt.errors import MedsegError, UsageError
from medseg_trt.imaging.segment import Run
from medseg_trt.progress import LOG, duration_text, plural, track
from medseg_trt.spec import Preprocessing
from medseg_trt.tiling.windows import recorded_tiles
from medseg_trt.train.datasets.folder import DataFolder
from medseg_trt.train.datasets.prepared import PreparedSlices, mapped_slices, prepare_slices, source_slices
from medseg_trt.train.epoch_slices import EpochSlices, dropout_seed
from medseg_trt.train.evaluate import evaluate
from medseg_trt.train.history import HistoryRow, Validation
from medseg_trt.train.losses import segmentation_loss
from medseg_trt.train.models.frozen import keep_frozen_in
from medseg_trt.train.models.global_batch import BatchShard, assign_shard
from medseg_trt.train.models.model import MODELS, count_parameters, runner
from medseg_trt.train.models.segmentation_model import SegmentationModel
from medseg_trt.train.recipes.schedules import learning_rate, scheduled_step
from medseg_trt.train.recipes.training_spec import Recipe, TrainSpec
from medseg_trt.train.run_lock import run_lock
from medseg_trt.train.runs import PARTIAL_SLICES, RunState, begin, join, save, save_progress
from medseg_trt.train.torch_device import memory_errors
from medseg_trt.train.training_process import TrainingProcess
from medseg_trt.train.training_state import OptimizerState, Progress

LONG_S = 2 * 3600  # of training on a CPU; then a smaller network is suggested


@memory_errors("training", "compute each batch in parts: --set train.accumulate=4")
def train(
    recipe: Recipe,
    data: DataFolder,
    out: Path,
    *,
    block: Path | None = None,
    weights: Path | Sequence[Path] | None = None,
    resume: bool = False,
    device: ComputeDevice = AUTO,
) -> Path:
    """Train a model and return the path of its best checkpoint.

    Args:
        recipe: architecture, preprocessing, augmentation and hyperparameters.
        data: a labelled data set.
        out: the run folder, see ``train.runs``.
        block: the frozen block's file, for an architecture that has one.
        weights: the initial weights of the encoder or of the encoders, for a recipe whose ``pretrained`` is "file".
        resume: continue from ``out/last.pt``; the recipe, the data and the block must be those of the existing run.
        device: where it computes; ``auto`` takes the GPU where PyTorch has one.

    Raises:
        DeviceError: PyTorch has no such device, or too little memory on it.
        UsageError: recipe, block and run folder do not match, or another training writes to the folder.
        InputError: the data cannot be used.
        ArtefactError: the block or the checkpoint cannot be used.
        MedsegError: the training has diverged.
    """
    process = TrainingProcess(recipe.train.autocast, device)
    initial = (weights,) if isinstance(weights, Path) else tuple(weights or ())
    with ExitStack() as cleanup:
        process.run_on_first(lambda: cleanup.enter_context(run_lock(out)))
        state = process.run_on_first(lambda: begin(recipe, data, out, block=block, weights=initial, resume=resume))
        state = state or join(recipe, data, out, block=block, weights=initial)
        if state.next_epoch > recipe.train.epochs:
            LOG.info("%s is complete; all %d epochs are done", out, recipe.train.epochs)
        else:
            _train(recipe, data, out, state, process, cleanup)
    return out / "best.pt"


def _train(
    recipe: Recipe, data: DataFolder, out: Path, state: RunState, process: TrainingProcess, cleanup: ExitStack
) -> None:
    checkpoint, spec = state.checkpoint, recipe.train
    model = checkpoint.model().to(process.device)
    keep_frozen_in(model, spec.frozen_dtype)
    optimizer = make_optimizer(model, spec)
    if checkpoint.training is not None:
        saved = checkpoint.training.optimizer_state
        optimizer.load_state_dict(dict(saved.optimizer))
        process.scaler.load_state_dict(dict(saved.scaler))
    if not data.splits.get("val", ()) and spec.best != "last":
        LOG.warning("%s has no validation split, so best.pt is always the latest epoch", data.name)
    slices = _prepared(recipe, data, state, out, process, cleanup)
    counts, (height, width) = count_parameters(model), checkpoint.preprocessing.image_size
    LOG.info(
        "train %s, %.1f million parameters, %d x %d pixels, for %s on %d slices of %s",
        *(recipe.architecture, counts["total"] / 1e6, height, width),
        *(plural(spec.epochs, "epoch"), len(slices.images), data.name),
    )
    if (tiles := recorded_tiles(checkpoint.preprocessing)) is not None:
        LOG.info("slices are cut into random %s", tiles)
    training = _Training(recipe=recipe, data=data, out=out, process=process, model=model, optimizer=optimizer)
    connected, progress = process.connect(model), state.progress
    for epoch in range(state.next_epoch, spec.epochs + 1):
        began = time.monotonic()
        loss = None
        if epoch > 0:
            keep = partial(training.keep, state)
            loss = train_epoch(connected, optimizer, slices, recipe, epoch, process, progress, keep)
            progress = None
        state = process.run_on_first(partial(training.finish, state, epoch, loss, began)) or state


@dataclass(frozen=True, kw_only=True, slots=True)
class _Training:
    """The constants of a training run, and the work of the first process after an epoch or within one."""

    recipe: Recipe
    data: DataFolder
    out: Path
    process: TrainingProcess
    model: SegmentationModel
    optimizer: torch.optim.Optimizer

    def finish(self, state: RunState, epoch: int, loss: float | None, began: float) -> RunState:
        """Validate after an epoch where it is due, and save the results of the epoch."""
        spec = self.recipe.train
        self.model.eval()
        is_due = epoch % spec.validate_every == 0 or epoch == spec.epochs
        validation = self._validate(state.checkpoint.preprocessing) if is_due else None
        seconds = round(time.monotonic() - began, 2)
        row = HistoryRow(epoch=epoch, loss=loss, validation=validation, seconds=seconds)
        state = save(state, self.model, self._optimizer_state(), row, self.out, spec)
        _log_epoch(row, spec)
        if epoch == 1 and self.process.device.type == "cpu":
            self._suggest_smaller(row.seconds * (spec.epochs - epoch))
        return state

    def _suggest_smaller(self, remaining_s: float) -> None:
        small = f"{self.recipe.architecture}-small"
        if remaining_s > LONG_S and small in MODELS:
            LOG.info(
                "without a GPU a small network is trained much sooner, in another run folder: "
                "--set architecture=%s --set 'preprocessing.image_size=[128,128]'",
                small,
            )

    def _validate(self, preprocessing: Preprocessing) -> Validation | None:
        spec, cases = self.recipe.train, self.data.splits.get("val", ())
        if not cases:
            return None
        run, classes, metric = _finite_runner(self.model, spec), self.data.classes, spec.validate_with
        evaluation = evaluate(run, cases, preprocessing, classes, spec.batch_size, metric=metric)
        dice_of_class = {mean.name: mean.dice for mean in evaluation.means}
        return Validation(dice=evaluation.mean_dice, iou=evaluation.mean_iou, dice_of_class=dice_of_class)

    def keep(self, state: RunState, progress: Progress) -> None:
        """Save the progress within an epoch."""
        self.process.run_on_first(lambda: save_progress(state, self.model, self._optimizer_state(), progress, self.out))

    def _optimizer_state(self) -> OptimizerState:
        return OptimizerState(optimizer=self.optimizer.state_dict(), scaler=self.process.scaler.state_dict())


def _prepared(
    recipe: Recipe, data: DataFolder, state: RunState, out: Path, process: TrainingProcess, cleanup: ExitStack
) -> PreparedSlices:
    """Prepare the slices of the training split once on every machine, in a folder that ``cleanup`` removes."""
    preprocessing = state.checkpoint.preprocessing
    at_source = recipe.augment_at == "source" or preprocessing.windows is not None
    in_training = replace(preprocessing, resize=recipe.training_resize or preprocessing.resize)

    def prepare() -> tuple[Path, tuple[np.ndarray, ...]]:
        partial = tempfile.TemporaryDirectory(dir=out, prefix=PARTIAL_SLICES, ignore_cleanup_errors=True)
        folder = Path(cleanup.enter_context(partial))
        prepare_split = source_slices if at_source else prepare_slices
        return folder, prepare_split(data.cases("train"), in_training, len(data.classes.names), folder).slices_of_class

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

    All random numbers derive from the seed and the epoch's number, so that a resumed run repeats the same steps.

    Args:
        model: the network, as ``process.connect`` returned it.
        optimizer: of all parameters that are not frozen.
        slices: the training split.
        recipe: of the run.
        epoch: from 1.
        process: one of the processes of the run; None: the only one.
        progress: of this epoch in an interrupted run.
        keep: is called with the progress every ``train.save_every_steps`` steps.

    Raises:
        MedsegError: the loss is not finite.
        UsageError: there are more processes than slices in a batch.
    """
    spec, process = recipe.train, process or TrainingProcess(recipe.train.autocast)
    torch.manual_seed(dropout_seed(spec.seed, epoch))
    dataset = EpochSlices(slices, recipe, epoch)
    batches = _batches(len(dataset), spec, process)
    losses = list(progress.losses) if progress is not None else []
    remaining = batches[len(losses) :]
    rows = [list(range(start + shard.start, start + shard.stop)) for start, shards in remaining for shard in shards]
    pinned = process.device.type == "cuda"  # from there, copies to the GPU need not be waited for
    fed = iter(DataLoader(dataset, batch_sampler=rows, num_workers=spec.workers, pin_memory=pinned))
    if progress is not None:
        process.set_random_state(progress.random_state)
    model.train()
    for step in track(range(len(losses), len(batches)), f"epoch {epoch} of {spec.epochs}"):
        rate = learning_rate(
            scheduled_step((epoch - 1) * len(batches) + step, len(batches), spec.schedule_step),
            spec.epochs * len(batches),
            schedule=spec.schedule,
            peak=spec.learning_rate,
            floor=spec.min_learning_rate,
            warmup_steps=spec.warmup_steps,
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        losses.append(_loss_and_gradients(model, fed, batches[step][1], process, spec))
        if not math.isfinite(losses[-1]):
            raise _diverged(f"the loss of epoch {epoch}, step {step} is {losses[-1]}", spec)
        process.step(optimizer, spec.max_gradient_norm, spec.max_gradient)
        done = step + 1
        if keep is not None and spec.save_every_steps and done % spec.save_every_steps == 0 and done < len(batches):
            keep(Progress(epoch=epoch, losses=tuple(losses), random_state=process.random_state()))
    assign_shard(model, None)
    return sum(losses) / len(losses)


def _batches(count: int, spec: TrainSpec, process: TrainingProcess) -> list[tuple[int, tuple[BatchShard, ...]]]:
    """Return where each batch of an epoch begins, and this process's shards of it.

    ``spec.drop_last`` drops a short last batch unless it is the only one.
    """
    size = min(spec.batch_size, count)
    rest = 0 if spec.drop_last else count % size
    smallest = rest or size
    if smallest < process.processes:
        raise UsageError(
            f"a batch of {smallest} slice(s) cannot be divided among {process.processes} processes; start fewer, "
            f"or choose --set train.batch_size={process.processes}"
        )
    whole = [(start, process.shards(size, spec.accumulate)) for start in range(0, count - size + 1, size)]
    return [*whole, (count - rest, process.shards(rest, spec.accumulate))] if rest else whole


def _loss_and_gradients(
    model: nn.Module,
    fed: Iterator[tuple[torch.Tensor, torch.Tensor]],
    shards: tuple[BatchShard, ...],
    process: TrainingProcess,
    spec: TrainSpec,
) -> float:
    """Compute one batch, micro-batch by micro-batch, and return its loss, for which a GPU is waited for once."""
    random_state = process.random_state() if len(shards) > 1 else None
    batch_loss = torch.zeros((), dtype=torch.float64, device=process.device)
    for number, shard in enumerate(shards, 1):
        images, labels = next(fed)
        if random_state is not None:
            process.set_random_state(random_state)  # every micro-batch draws for the whole batch and uses its rows
        assign_shard(model, shard)
        with process.skip_averaging(model, number < len(shards)):
            with process.autocast():
                outputs = model(images.to(process.device, non_blocking=True))
            labels = labels.to(process.device, non_blocking=True)
            loss = segmentation_loss(outputs, labels, shard, spec.loss) * shard.micro_batch_fraction
            process.backward(loss)
        batch_loss += loss.detach()
    return batch_loss.item()


def make_optimizer(model: nn.Module, spec: TrainSpec) -> torch.optim.Optimizer:
    """Return the optimiser of a recipe for all parameters that are not frozen."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rate, decay = spec.learning_rate, spec.weight_decay
    if spec.optimizer == "sgd":
        return torch.optim.SGD(parameters, rate, spec.momentum, weight_decay=decay)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[spec.optimizer]
    return kind(parameters, rate, weight_decay=decay)


def _finite_runner(model: nn.Module, spec: TrainSpec) -> Run:
    """Return the model as a function that raises an error where its logits are not finite."""
    run = runner(model)

    def checked(batch: np.ndarray) -> np.ndarray:
        logits = run(batch)
        if not np.isfinite(logits).all():
            raise _diverged("the logits on the validation split are not finite", spec)
        return logits

    return checked


def _diverged(symptom: str, spec: TrainSpec) -> MedsegError:
    smaller = f"--set train.learning_rate={spec.learning_rate / 10:g}"
    return MedsegError(f"{symptom}. Try a smaller learning rate in another run folder: {smaller}")


def _log_epoch(row: HistoryRow, spec: TrainSpec) -> None:
    loss = "untrained" if row.loss is None else f"loss {row.loss:.3f}"
    remaining_s = row.seconds * (spec.epochs - row.epoch)
    remaining = "" if row.loss is None else f", about {duration_text(remaining_s)} left"
    scores = _scores_text(row.validation, spec) if row.validation is not None else ""
    LOG.info("epoch %d of %d: %s, %s%.0f s%s", row.epoch, spec.epochs, loss, scores, row.seconds, remaining)


def _scores_text(validation: Validation, spec: TrainSpec) -> str:
    classes = ", ".join(
        f"{name} {'absent' if dice is None else f'{dice:.2f}'}" for name, dice in validation.dice_of_class.items()
    )
    iou = f", IoU {validation.iou:.3f}" if spec.best == "iou" and validation.iou is not None else ""
    return f"validation Dice {validation.dice:.3f} ({classes}){iou}, "
