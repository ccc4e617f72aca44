"""Bounds of a network that a name describes: counted while it is built without memory, before anything is allocated."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as registration
from torch.utils._python_dispatch import TorchDispatchMode

from medseg_trt.errors import UsageError

MAX_PARAMETERS = 1 << 30  # with buffers; the largest network of this package has half of it
MAX_MODULES = 1 << 13
MAX_ACTIVATION_BYTES = 1 << 32  # of one tensor, for one image
SMALLER = "choose smaller arguments"


@contextmanager
def bounded_construction(name: str) -> Generator[None, None, None]:
    """Stop the construction of a network as soon as its modules hold too much.

    Modules, parameters and buffers are counted as they are registered; one that is registered twice counts twice.

    Args:
        name: of the network, for messages.

    Raises:
        UsageError: there are more than ``MAX_PARAMETERS`` or ``MAX_MODULES``.
    """
    count = _Count(name)
    handles = [
        registration.register_module_parameter_registration_hook(count.add_values),
        registration.register_module_buffer_registration_hook(count.add_values),
        registration.register_module_module_registration_hook(count.add_module),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class BoundedActivations(TorchDispatchMode):
    """Stop a run without memory at the first tensor that would take more than ``MAX_ACTIVATION_BYTES``."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        for result in results if isinstance(results, tuple | list) else (results,):
            num_bytes = result.untyped_storage().nbytes() if isinstance(result, Tensor) else 0
            if num_bytes > MAX_ACTIVATION_BYTES:
                raise UsageError(
                    f"{self._name} would need {num_bytes >> 30} GiB for one tensor of one image, more than "
                    f"{MAX_ACTIVATION_BYTES >> 30} GiB; {SMALLER}, or smaller images"
                )
        return results


class _Count:
    """Modules and values of a network so far."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._modules = 0
        self._values = 0

    def add_values(self, _: nn.Module, __: str, tensor: torch.Tensor | None) -> None:
        self._values += 0 if tensor is None else tensor.numel()
        if self._values > MAX_PARAMETERS:
            raise UsageError(f"{self._name} has more than {MAX_PARAMETERS / 1e6:.0f} million parameters; {SMALLER}")

    def add_module(self, _: nn.Module, __: str, ___: nn.Module | None) -> None:
        self._modules += 1
        if self._modules > MAX_MODULES:
            raise UsageError(f"{self._name} has more than {MAX_MODULES} modules; {SMALLER}")
