"""Training on one global batch that is divided among processes and micro-batches.

Three operations in a training step depend on more than one image: BatchNorm's statistics, the Dice loss of several
classes, and dropout's random numbers. Processes sum the terms that the first two need, so that the loss and its
gradient equal those of one process except for rounding. Micro-batches run one after the other and share no sums: with
gradient accumulation, BatchNorm and the Dice loss of several classes are computed per micro-batch. Dropout always draws
its mask for the global batch, and each shard uses its own rows of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, distributed, nn


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchShard:
    """The rows of a global batch that one process computes at a time: ``start`` to ``stop``, half-open."""

    start: int
    stop: int
    global_batch_size: int
    micro_batch_size: int  # rows that all processes compute at this time
    processes: int = 1

    def sum(self, value: Tensor) -> Tensor:
        """Sum a tensor over the processes; the gradient flows to all of them."""
        return _Sum.apply(value) if self.processes > 1 else value  # pyright: ignore[reportReturnType]

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean over the micro-batch, given the mean over this shard."""
        return self.sum(value * ((self.stop - self.start) / self.micro_batch_size))

    @property
    def micro_batch_fraction(self) -> float:
        """The micro-batch's fraction of the global batch, 0 … 1."""
        return self.micro_batch_size / self.global_batch_size


def unsharded(size: int) -> BatchShard:
    """Return the single shard of a batch that is not divided."""
    return BatchShard(start=0, stop=size, global_batch_size=size, micro_batch_size=size)


def shards_for_rank(size: int, accumulate: int, processes: int, rank: int) -> tuple[BatchShard, ...]:
    """Divide a batch into micro-batches, and return the shard of each that the process ``rank`` computes.

    Shard sizes differ by at most one row. A batch with fewer rows than ``accumulate * processes`` is divided into fewer
    micro-batches.

    Raises:
        ValueError: there are more processes than rows.
    """
    if size < processes:
        raise ValueError(f"{size} row(s) cannot be divided among {processes} processes")
    shards: list[BatchShard] = []
    for start, stop in _even_ranges(0, size, min(accumulate, size // processes)):
        first, last = _even_ranges(start, stop, processes)[rank]
        shards.append(
            BatchShard(
                start=first,
                stop=last,
                global_batch_size=size,
                micro_batch_size=stop - start,
                processes=processes,
            )
        )
    return tuple(shards)


def assign_shard(model: nn.Module, shard: BatchShard | None) -> None:
    """Set the shard that the layers of a model compute next; None: the batch is not divided."""
    for layer in model.modules():
        if isinstance(layer, Dropout | BatchNorm2d):
            layer.shard = shard


class Dropout(nn.Module):
    """Dropout with PyTorch's own random numbers, whose mask is drawn for the global batch.

    The mask is stored as one byte per value.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability
        self.shard: BatchShard | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.probability == 0:
            return x
        shard = self.shard or unsharded(len(x))
        shape, order = (shard.global_batch_size, *x.shape[1:]), x.dim_order()  # numbers are drawn in memory order
        mask = torch.empty_permuted(shape, order, dtype=torch.bool, device=x.device)
        kept = mask.bernoulli_(1 - self.probability)[shard.start : shard.stop]
        kept = kept if len(kept) == shard.global_batch_size else kept.clone()  # a view would hold the whole mask
        return x * kept * torch.ones((), dtype=x.dtype, device=x.device).div_(1 - self.probability)


class BatchNorm2d(nn.BatchNorm2d):
    """BatchNorm whose training statistics cover the rows of all processes.

    PyTorch's SyncBatchNorm does the same, but on GPUs only.
    """

    shard: BatchShard | None = None

    def forward(self, x: Tensor) -> Tensor:
        shard = self.shard
        if not self.training or shard is None or shard.processes == 1:
            return super().forward(x)
        count = shard.micro_batch_size * x[0, 0].numel()
        values = x.float()
        mean = shard.sum(values.sum((0, 2, 3))) / count
        centred = values - mean[:, None, None]
        variance = shard.sum(centred.square().sum((0, 2, 3))) / count
        self._update_running_statistics(mean.detach(), variance.detach(), count)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)

    def _update_running_statistics(self, mean: Tensor, variance: Tensor, count: int) -> None:
        assert self.running_mean is not None  # this network never disables any of these
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        self.num_batches_tracked += 1


class _Sum(torch.autograd.Function):
    """The sum over the processes; all of them compute the same loss, so each gradient is that of the sum of losses."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, value: Tensor) -> Tensor:
        return _all_reduce_sum(value)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> Tensor:
        return _all_reduce_sum(gradients[0])


def _all_reduce_sum(value: Tensor) -> Tensor:
    total = value.detach().clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(total)
    return total


def _even_ranges(start: int, stop: int, count: int) -> Sequence[tuple[int, int]]:
    """Return ``count`` half-open ranges whose lengths differ by at most one, the longer ones first."""
    short, longer = divmod(stop - start, count)
    ends = [start + short * number + min(number, longer) for number in range(count + 1)]
    return list(pairwise(ends))
