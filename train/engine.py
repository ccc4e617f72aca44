"""What computes the training steps: the device, the number type, and the processes that torchrun or a cluster started.

One process alone takes the same path. Accelerate finds out where we are, connects the processes and lets them average
their gradients; what a loss over the whole batch needs besides is in ``global_batch``. The first process alone reads the
run so far, validates and writes.
"""

import atexit
import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, distributed, nn

from medseg_trt.errors import MedsegError
from medseg_trt.progress import LOG
from medseg_trt.train.global_batch import BatchShard, shards_for_rank

Result = TypeVar("Result")

AUTOCASTS: Mapping[str, torch.dtype | None] = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
PATIENCE = timedelta(hours=12)  # of those who wait for the first process; the launcher ends all when one dies
INTERRUPTED = 130


class Engine:
    """One of the processes of a training, perhaps the only one.

    Args:
        autocast: a key of ``AUTOCASTS``: what matrix products and convolutions of a training step are computed in. The
            weights, the optimiser, the loss, validation and everything after training are float32.
    """

    def __init__(self, autocast: str = "no") -> None:
        connection = InitProcessGroupKwargs(timeout=PATIENCE)
        self._accelerator = Accelerator(
            cpu=not torch.cuda.is_available(), mixed_precision="no", kwargs_handlers=[connection]
        )
        self.device: torch.device = self._accelerator.device
        self.processes: int = self._accelerator.num_processes
        self.rank: int = self._accelerator.process_index
        self._local_rank: int = self._accelerator.local_process_index
        self._type = AUTOCASTS[autocast]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self._type == torch.float16)
        if self.processes > 1:
            atexit.register(_disconnect)
        if self.rank > 0:
            LOG.setLevel(max(LOG.level, logging.ERROR))  # one speaks for all

    def connect(self, model: nn.Module) -> nn.Module:
        """Return the model, already on the device, such that its gradients are the mean of those of all processes."""
        return self._accelerator.prepare_model(model, device_placement=False)

    def first(self, action: Callable[[], Result]) -> Result | None:
        """Let the first process do something while the others wait; they get None, and leave where it fails.

        Raises:
            SystemExit: in the others, with the first one's exit code; its message is enough.
        """
        if self.processes == 1:
            return action()
        found, outcome = None, [0]
        try:
            found = action() if self.rank == 0 else None
        except BaseException as error:
            outcome = [error.exit_code if isinstance(error, MedsegError) else INTERRUPTED]
            raise
        finally:
            distributed.broadcast_object_list(outcome)
        if outcome[0]:
            raise SystemExit(outcome[0])
        return found

    def first_of_machine(self, action: Callable[[], Result]) -> Result:
        """Let one process of every machine do something, and give its answer, which must be picklable, to all there."""
        if self.processes == 1:
            return action()
        machine = self.rank - self._local_rank  # the number of its first process
        mine = action() if self._local_rank == 0 else None
        answers: list[Any] = [None] * self.processes
        distributed.all_gather_object(answers, mine)
        return answers[machine]

    def shards(self, size: int, accumulate: int) -> tuple[BatchShard, ...]:
        """Return what this process computes of a batch, one micro-batch after the other."""
        return shards_for_rank(size, accumulate, self.processes, self.rank)

    def autocast(self) -> AbstractContextManager[object]:
        """Compute what is inside in the number type of the recipe."""
        return torch.autocast(self.device.type, self._type) if self._type is not None else nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss to those there are, scaled where float16 needs it."""
        self.scaler.scale(loss).backward()

    def no_average(self, model: nn.Module, wanted: bool) -> AbstractContextManager[object]:
        """Where ``wanted``, leave the gradients of this process's own: more of the batch is to come."""
        return self._accelerator.no_sync(model) if wanted and self.processes > 1 else nullcontext()

    def step(self, optimizer: torch.optim.Optimizer, max_gradient_norm: float | None) -> None:
        """Take a step along the gradients, clipped to a norm; with float16, not where they have overflowed."""
        if max_gradient_norm is not None:
            self.scaler.unscale_(optimizer)
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            nn.utils.clip_grad_norm_(parameters, max_gradient_norm)
        self.scaler.step(optimizer)
        self.scaler.update()

    def random_state(self) -> dict[str, Tensor]:
        """Return the state of PyTorch's random numbers, which is the same in all processes."""
        state = {"cpu": torch.get_rng_state()}
        return state | ({"cuda": torch.cuda.get_rng_state(self.device)} if self.device.type == "cuda" else {})

    def set_random_state(self, state: Mapping[str, Tensor]) -> None:
        """Go back to a state that ``random_state`` returned."""
        torch.set_rng_state(state["cpu"].cpu())
        if self.device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"].cpu(), self.device)


def _disconnect() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()
