"""One of two processes, or the only one, that takes the steps of ``test_processes``; the first writes what it found.

Started with torchrun's variables in the environment, and the file to write. Every case begins with the same weights.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import torch
from tiny import TINY_LLAMA, tiny_recipe, tiny_spec
from torch import Tensor, nn

from medseg_trt.train.block.blocks import random_block
from medseg_trt.train.checkpoint import trained_weights
from medseg_trt.train.datasets.prepared import PreparedSlices
from medseg_trt.train.loop import make_optimizer, train_epoch
from medseg_trt.train.models.global_batch import BatchNorm2d, BatchShard, assign_shard
from medseg_trt.train.models.model import build_model
from medseg_trt.train.training_process import TrainingProcess

CASES: Mapping[str, tuple[int, tuple[str, ...]]] = {  # number of logits, and changes to the recipe
    "several classes": (3, ()),
    "one class": (1, ()),
    "uneven shares": (3, ("train.batch_size=5", "train.max_gradient_norm=0.1")),
    "accumulated": (3, ("train.accumulate=2",)),
}


def slices(num_labels: int) -> PreparedSlices:
    """Return sixteen noisy slices whose labels are spread unevenly, so that half a batch is unlike the other half."""
    random = np.random.default_rng(0)
    labels = (random.random((16, 32, 32)) < np.linspace(0.02, 0.9, 16)[:, None, None]).astype(np.uint8)
    labels[::3] *= num_labels - 1
    images = random.normal(size=(16, 3, 32, 32)).astype(np.float32) + labels[:, None]
    return PreparedSlices(images=images, labels=labels, slices_of_class=())


def take_steps(case: str) -> dict[str, object]:
    """Return the loss of an epoch of two steps or more, and every trained weight and statistic after it."""
    num_logits, changes = CASES[case]
    recipe = tiny_recipe("train.optimizer=sgd", "train.batch_size=8", "train.learning_rate=0.05", *changes)
    torch.manual_seed(0)
    model = build_model(tiny_spec(num_classes=num_logits), random_block(TINY_LLAMA, seed=0))
    process = TrainingProcess()
    optimizer = make_optimizer(model, recipe.train)
    loss = train_epoch(process.connect(model), optimizer, slices(max(num_logits, 2)), recipe, 1, process)
    return {"loss": loss, "weights": trained_weights(model)}


# Each fault forgets one of the things that look beyond a process's own rows.


@contextmanager
def own_statistics() -> Iterator[None]:
    with patch.object(BatchNorm2d, "forward", nn.BatchNorm2d.forward):
        yield


@contextmanager
def own_dice() -> Iterator[None]:
    def own_sum(
        shard: BatchShard, value: Tensor, real: Callable[[BatchShard, Tensor], Tensor] = BatchShard.sum
    ) -> Tensor:
        return value if value.shape == (3,) else real(shard, value)  # the sums of three classes

    with patch.object(BatchShard, "sum", own_sum):
        yield


@contextmanager
def own_masks() -> Iterator[None]:
    def compute(model: nn.Module, shard: BatchShard | None) -> None:
        assign_shard(model, shard)
        for layer in model.modules():
            if type(layer).__name__ == "Dropout":
                layer.shard = None  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]

    with patch("medseg_trt.train.loop.assign_shard", compute):
        yield


@contextmanager
def own_gradients() -> Iterator[None]:
    with patch.object(TrainingProcess, "connect", lambda process, model: model):
        yield


FAULTS = (own_statistics, own_dice, own_masks, own_gradients)


def main() -> None:
    """Take the steps of every case, and of the first one with every fault."""
    steps_of_case = {case: take_steps(case) for case in CASES}
    for fault in FAULTS:
        with fault():
            steps_of_case[fault.__name__] = take_steps("several classes")
    if TrainingProcess().rank == 0:
        torch.save(steps_of_case, sys.argv[1])


if __name__ == "__main__":
    main()
