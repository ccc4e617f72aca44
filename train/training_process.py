"""One process of a training run: its device, its number type, and the other processes of torchrun or a cluster.

A single process takes the same path. Accelerate detects the environment, connects the processes and averages their
gradients. ``global_batch`` computes the parts of the loss that need the whole batch. The first process alone reads the
existing run, validates and writes.
"""

import atexit
import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, distributed, nn

from medseg_trt.devices import AUTO, ComputeDevice
from medseg_trt.errors import MedsegError, UsageError
from medseg_trt.progress import LOG
from medseg_trt.train.models.global_batch import BatchShard, shards_for_rank
from medseg_trt.train.recipes.training_spec import AUTOCASTS
from medseg_trt.train.torch_device import torch_device

Result = TypeVar("Result")

TIMEOUT = timedelta(hours=12)  # for the first process's work; the launcher stops all processes when one dies
INTERRUPTED = 130


class TrainingProcess:
    """This process of a training run, which may be the only one.

    Args:
        autocast: a key of ``AUTOCASTS``: the type of matrix products and convolutions in a training step. The weights,
            the optimiser, the loss, validation and everything after training are float32.
        device: where it computes. Of several processes on a machine, each takes a GPU of its own.

    Raises:
        DeviceError: PyTorch has no such device.
        UsageError: several processes are to share one GPU.
    """

    def __init__(self, autocast: str = "no", device: ComputeDevice = AUTO) -> None:
        connection = InitProcessGroupKwargs(timeout=TIMEOUT)
        chosen = torch_device(device)
        if chosen.type == "cuda" and device.number:
            torch.cuda.set_device(chosen)  # which a process that is alone computes on
        self._accelerator = Accelerator(cpu=chosen.type == "cpu", mixed_precision="no", kwargs_handlers=[connection])
        self.device: torch.device = self._accelerator.device
        self.processes: int = self._accelerator.num_processes
        if self.processes > 1 and device.number:
            raise UsageError(f"--device {device} is one GPU for {self.processes} processes; leave it out")
        self.rank: int = self._accelerator.process_index
        self._local_rank: int = self._accelerator.local_process_index
        self._type = AUTOCASTS[autocast]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self._type == torch.float16)
        if self.processes > 1:
            atexit.register(_disconnect)
        if self.rank > 0:
            LOG.setLevel(max(LOG.level, logging.ERROR))  # the first process logs for all

    def connect(self, model: nn.Module) -> nn.Module:
        """Return the model, already on the device, wrapped so that gradients are averaged over all processes."""
        return self._accelerator.prepare_model(model, device_placement=False)

    def run_on_first(self, action: Callable[[], Result]) -> Result | None:
        """Run an action in the first process while the others wait; the others get None, and exit where it fails.

        Raises:
            SystemExit: in the other processes, with the exit code of the first, which alone prints the message.
        """
        if self.processes == 1:
            return action()
        result, exit_code = None, [0]
        try:
            result = action() if self.rank == 0 else None
        except BaseException as error:
            exit_code = [error.exit_code if isinstance(error, MedsegError) else INTERRUPTED]
            raise
        finally:
            distributed.broadcast_object_list(exit_code)
        if exit_code[0]:
            raise SystemExit(exit_code[0])
        return result

    def run_once_per_machine(self, action: Callable[[], Result]) -> Result:
        """Run an action in one process of every machine; all there get its result, which must be picklable."""
        if self.processes == 1:
            return action()
        first_rank_of_machine = self.rank - self._local_rank
        local_result = action() if self._local_rank == 0 else None
        results: list[Result] = [local_result] * self.processes  # pyright: ignore[reportAssignmentType]
        distributed.all_gather_object(results, local_result)
        return results[first_rank_of_machine]

    def shards(self, size: int, accumulate: int) -> tuple[BatchShard, ...]:
        """Return this process's shard of each micro-batch of a batch."""
        return shards_for_rank(size, accumulate, self.processes, self.rank)

    def autocast(self) -> AbstractContextManager[object]:
        """Return a context that computes in the number type of the recipe."""
        return torch.autocast(self.device.type, self._type) if self._type is not None else nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of a loss, scaled where float16 needs it."""
        self.scaler.scale(loss).backward()

    def skip_averaging(self, model: nn.Module, more_follow: bool) -> AbstractContextManager[object]:
        """Return a context that does not average gradients where ``more_follow``: the batch has more micro-batches."""
        return self._accelerator.no_sync(model) if more_follow and self.processes > 1 else nullcontext()

    def step(
        self, optimizer: torch.optim.Optimizer, max_gradient_norm: float | None, max_gradient: float | None = None
    ) -> None:
        """Take an optimiser step with gradients clipped to a norm, or each to a size.

        float16 skips it where gradients have overflowed.
        """
        if max_gradient_norm is not None or max_gradient is not None:
            self.scaler.unscale_(optimizer)
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            if max_gradient is not None:
                nn.utils.clip_grad_value_(parameters, max_gradient)
            if max_gradient_norm is not None:
                nn.utils.clip_grad_norm_(parameters, max_gradient_norm)
        self.scaler.step(optimizer)
        self.scaler.update()

    def random_state(self) -> dict[str, Tensor]:
        """Return the state of PyTorch's random generators, which is the same in all processes."""
        state = {"cpu": torch.get_rng_state()}
        return state | ({"cuda": torch.cuda.get_rng_state(self.device)} if self.device.type == "cuda" else {})

    def set_random_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore a state that ``random_state`` returned."""
        torch.set_rng_state(state["cpu"].cpu())
        if self.device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"].cpu(), self.device)


def _disconnect() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()
