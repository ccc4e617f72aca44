"""Random numbers of training depend on the seed, the epoch, the step and the row, and on nothing else.

Dropout's masks are recorded while an epoch is trained: by another seed, in another epoch or step they are others; in a
run that is resumed, shared by processes or computed in micro-batches, or after any use of the global generator, they
are the same.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import tiny_recipe
from torch import nn

from medseg_trt.train.datasets.prepared import PreparedSlices
from medseg_trt.train.epoch_slices import EpochSlices, dropout_seed
from medseg_trt.train.loop import make_optimizer, train_epoch
from medseg_trt.train.models import global_batch
from medseg_trt.train.models.global_batch import Dropout
from medseg_trt.train.training_process import TrainingProcess
from medseg_trt.train.training_state import Progress

SLICES, BATCH = 12, 4
STEPS = SLICES // BATCH


class Recorder(nn.Module):
    """A network of one layer, which keeps the mask that its dropout has drawn for every batch it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 1, 1)
        self.dropout = Dropout(0.5)
        self.masks: list[torch.Tensor] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        dropped_out = self.dropout(torch.ones_like(images))
        self.masks.append(dropped_out.detach() > 0)
        return self.layer(images * dropped_out)


@pytest.fixture(scope="module")
def slices() -> PreparedSlices:
    rng = np.random.default_rng(0)
    images, labels = rng.normal(size=(SLICES, 3, 8, 8)).astype(np.float32), np.zeros((SLICES, 8, 8), np.uint8)
    labels[:, 2:6, 2:6] = 1
    return PreparedSlices(images=images, labels=labels, slices_of_class=(np.arange(SLICES), np.arange(SLICES)))


def recipe_of(seed: int, *changes: str):
    return tiny_recipe(f"train.seed={seed}", f"train.batch_size={BATCH}", "train.epochs=9", *changes)


def masks_of(slices, seed=7, epoch=1, *changes, process=None, progress=None, keep=None) -> list[bytes]:
    """Train an epoch and return the mask of every forward pass."""
    recipe, model = recipe_of(seed, *changes), Recorder()
    train_epoch(model, make_optimizer(model, recipe.train), slices, recipe, epoch, process, progress, keep)
    return [mask.numpy().tobytes() for mask in model.masks]


def test_every_seed_epoch_and_step_has_masks_of_its_own(slices):
    runs = {(seed, epoch): masks_of(slices, seed, epoch) for seed in (100, 101) for epoch in (1, 2, 3)}
    all_masks = [mask for masks in runs.values() for mask in masks]
    assert len(all_masks) == 6 * STEPS
    assert len(set(all_masks)) == len(all_masks)


def test_no_two_pairs_of_seed_and_epoch_share_a_stream():
    """``seed + epoch`` has 69 values on this grid, and ``[seed, epoch]`` padded or swapped would repeat some, too."""
    pairs = [(seed, epoch) for seed in range(50) for epoch in range(1, 21)]
    assert len({seed + epoch for seed, epoch in pairs}) == 69
    generators = [torch.Generator().manual_seed(dropout_seed(seed, epoch)) for seed, epoch in pairs]
    streams = {torch.rand(4, generator=generator).numpy().tobytes() for generator in generators}
    assert len(streams) == len(pairs) == 1000


def test_rows_of_a_batch_have_masks_of_their_own(slices):
    model, recipe = Recorder(), recipe_of(7)
    train_epoch(model, make_optimizer(model, recipe.train), slices, recipe, 1)
    rows = [row.numpy().tobytes() for mask in model.masks for row in mask]
    assert len(set(rows)) == len(rows) == SLICES


@pytest.mark.parametrize("used_before", [0, 1, 12345])
def test_dropout_masks_are_independent_of_earlier_use_of_the_global_rng(slices, used_before):
    torch.manual_seed(used_before)
    torch.rand(used_before % 100)
    assert masks_of(slices) == masks_of(slices)
    torch.manual_seed(3)
    assert masks_of(slices, epoch=2) == masks_of(slices, epoch=2)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")  # PyTorch's own way to start workers
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # on a machine with one core
def test_dropout_masks_are_independent_of_loader_workers(slices):
    assert masks_of(slices, 7, 1, "train.workers=1") == masks_of(slices)


@pytest.mark.parametrize("done", range(1, STEPS))
def test_an_epoch_that_is_resumed_goes_on_with_the_masks_that_it_would_have_had(slices, done):
    saved: list[Progress] = []
    whole = masks_of(slices, 7, 2, "train.save_every_steps=1", keep=saved.append)
    assert [len(progress.losses) for progress in saved] == list(range(1, STEPS))
    torch.rand(17)
    assert masks_of(slices, 7, 2, progress=saved[done - 1]) == whole[done:]


@pytest.mark.parametrize("accumulate", [2, 4])
def test_micro_batches_have_the_rows_of_the_batchs_mask(slices, accumulate):
    whole_batch, micro_batches = masks_of(slices), masks_of(slices, 7, 1, f"train.accumulate={accumulate}")
    assert len(micro_batches) == accumulate * STEPS
    assert b"".join(micro_batches) == b"".join(whole_batch)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_processes_have_the_rows_of_the_batchs_mask(slices, accumulate, monkeypatch):
    """The sums over the processes are left out: the masks do not depend on them."""
    monkeypatch.setattr(global_batch, "_all_reduce_sum", lambda value: value)
    shares = []
    for rank in range(2):
        process = TrainingProcess()
        process.processes, process.rank = 2, rank
        monkeypatch.setattr(process, "skip_averaging", lambda model, more_follow: torch.enable_grad())
        shares.append(masks_of(slices, 7, 1, f"train.accumulate={accumulate}", process=process))
    merged = [share for pair in zip(*shares, strict=True) for share in pair]  # by micro-batch, then by process
    assert b"".join(merged) == b"".join(masks_of(slices))
    assert set(shares[0]).isdisjoint(shares[1])


NOISE = 'augmentation=[{"name": "noise", "options": {"deviation": 1}}]'


def test_every_item_of_every_epoch_and_seed_is_augmented_by_numbers_of_its_own(slices):
    """All slices are the same here, so that two items are alike only where their random numbers are."""
    alike = replace(slices, images=np.repeat(slices.images[:1], SLICES, axis=0))
    seen = [
        dataset[item][0].tobytes()
        for seed in (7, 8)
        for epoch in (1, 2)
        for dataset in [EpochSlices(alike, recipe_of(seed, NOISE, "train.slices_per_epoch=20"), epoch)]
        for item in range(len(dataset))
    ]
    assert len(set(seen)) == len(seen) == 80


def test_the_order_of_slices_takes_other_numbers_than_their_augmentation(slices):
    """NumPy pads a seed with zeros: an item numbered from 0 would repeat the draws of the epoch's order."""
    recipe = recipe_of(7, NOISE)
    item, _ = EpochSlices(slices, recipe, 1)[0]
    index = int(EpochSlices(slices, recipe, 1).order[0])
    rng = np.random.default_rng([7, 1])
    rng.random()  # whether the step happens
    amount = rng.uniform(0, 1) * float(slices.images[index].std())
    repeated = slices.images[index] + rng.normal(0, amount, item.shape).astype(np.float32)
    assert not np.array_equal(item, repeated)
