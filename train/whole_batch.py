"""A batch that processes and micro-batches share, computed as if it were in one place.

Three things in a training step look beyond one picture: BatchNorm's statistics, the Dice of several classes, and the
random numbers of dropout. Processes add up the sums that the first two need, so that the loss and its gradient are
those of one process but for rounding. Micro-batches come one after the other and cannot: under accumulation BatchNorm
and that Dice see one micro-batch at a time. Dropout draws for the whole batch everywhere and takes its own rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, distributed, nn


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """The rows of a batch that one process computes at a time."""

    start: int
    stop: int
    size: int  # rows of the whole batch
    together: int  # rows that all processes compute at this time: a micro-batch
    processes: int = 1

    def sum(self, value: Tensor) -> Tensor:
        """Add up what the processes have; the gradient reaches all of them."""
        return _Sum.apply(value) if self.processes > 1 else value  # pyright: ignore[reportReturnType]

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean over the micro-batch of what is a mean over this part."""
        return self.sum(value * ((self.stop - self.start) / self.together))

    @property
    def share(self) -> float:
        """How much of the whole batch its micro-batch is."""
        return self.together / self.size


def whole(size: int) -> Part:
    """Return a batch that nobody shares."""
    return Part(start=0, stop=size, size=size, together=size)


def parts_of(size: int, accumulate: int, processes: int, rank: int) -> tuple[Part, ...]:
    """Divide a batch into micro-batches, and return the part of each that the process ``rank`` computes.

    Sizes differ by one row at the most. Where there are fewer rows than ``accumulate * processes``, there are fewer
    micro-batches.

    Raises:
        ValueError: there are more processes than rows.
    """
    if size < processes:
        raise ValueError(f"{size} row(s) cannot be shared by {processes} processes")
    found: list[Part] = []
    for start, stop in _divided(0, size, min(accumulate, size // processes)):
        first, last = _divided(start, stop, processes)[rank]
        found.append(Part(start=first, stop=last, size=size, together=stop - start, processes=processes))
    return tuple(found)


def compute_part(model: nn.Module, part: Part | None) -> None:
    """Tell the layers of a model which part of a batch they are about to see; None: a batch that nobody shares."""
    for layer in model.modules():
        if isinstance(layer, Dropout | BatchNorm2d):
            layer.part = part


class Dropout(nn.Module):
    """Set a share of the values to zero in training and scale the others up; the numbers are PyTorch's own dropout's.

    The mask is drawn for the whole batch, and kept as one byte a value.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability
        self.part: Part | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.probability == 0:
            return x
        part = self.part or whole(len(x))
        shape, order = (part.size, *x.shape[1:]), x.dim_order()  # numbers are drawn in the order of the memory
        mask = torch.empty_permuted(shape, order, dtype=torch.bool, device=x.device)
        kept = mask.bernoulli_(1 - self.probability)[part.start : part.stop]
        kept = kept if len(kept) == part.size else kept.clone()  # a view would keep the whole mask
        return x * kept * torch.ones((), dtype=x.dtype, device=x.device).div_(1 - self.probability)


class BatchNorm2d(nn.BatchNorm2d):
    """BatchNorm whose statistics in training are those of all processes' rows.

    PyTorch's SyncBatchNorm does the same on GPUs alone.
    """

    part: Part | None = None

    def forward(self, x: Tensor) -> Tensor:
        part = self.part
        if not self.training or part is None or part.processes == 1:
            return super().forward(x)
        count = part.together * x[0, 0].numel()
        values = x.float()
        mean = part.sum(values.sum((0, 2, 3))) / count
        centred = values - mean[:, None, None]
        variance = part.sum(centred.square().sum((0, 2, 3))) / count
        self._remember(mean.detach(), variance.detach(), count)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)

    def _remember(self, mean: Tensor, variance: Tensor, count: int) -> None:
        assert self.running_mean is not None  # none of these is ever switched off here
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        self.num_batches_tracked += 1


class _Sum(torch.autograd.Function):
    """The sum over the processes. With a loss that all of them compute, each one's gradient is that of their sum."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, value: Tensor) -> Tensor:
        return _summed(value)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> Tensor:
        return _summed(gradients[0])


def _summed(value: Tensor) -> Tensor:
    total = value.detach().clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(total)
    return total


def _divided(start: int, stop: int, parts: int) -> Sequence[tuple[int, int]]:
    """Return half-open ranges, the longer ones first."""
    short, longer = divmod(stop - start, parts)
    ends = [start + short * number + min(number, longer) for number in range(parts + 1)]
    return list(pairwise(ends))
