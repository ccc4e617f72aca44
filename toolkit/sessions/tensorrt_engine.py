"""A deserialised TensorRT engine, of either library: what goes in, what comes out, and contexts to run it in.

A plan is executable code. Whoever makes an ``Engine`` has checked its digest before.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from medseg_trt.errors import ArtefactError
from medseg_trt.export.graph.interface import INPUT, OUTPUT
from medseg_trt.progress import LOG
from medseg_trt.spec import LIBRARY_NAMES

COMPILES_HERE = ("tensorrt-rtx",)  # libraries that compile kernels on their first use, into a cache
TYPES = ("float32", "float16")  # that our kernels read and write
MEMORY_WORDS = ("out of memory", "outofmemory", "memory allocation", "allocation failed", "failed_allocation")


class EngineError(Exception):
    """TensorRT did not do what it was asked; the message is its own."""

    @property
    def is_memory(self) -> bool:
        """Whether it had not enough memory."""
        return any(word in str(self).lower() for word in MEMORY_WORDS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensor:
    """An input or output, of one image."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]  # without the batch

    @property
    def nbytes(self) -> int:
        """Bytes of one image."""
        return int(np.prod(self.shape)) * self.dtype.itemsize


class Engine:
    """An engine that is ready to make contexts.

    Raises:
        EngineError: the library cannot load the plan.
        ArtefactError: it is an engine of something else than our networks.
    """

    def __init__(self, trt: Any, library: str, plan: bytes, *, host_code: bool = False) -> None:
        """Deserialise a plan.

        Args:
            trt: the library's module.
            library: which one it is, a key of ``LIBRARY_NAMES``.
            plan: the bytes whose digest was checked.
            host_code: whether the plan may bring code for the processor: a runtime or plugins of its own.
        """
        self._trt, self._title = trt, f"{LIBRARY_NAMES[library]} {trt.__version__}"
        self._heard: list[str] = []
        self._one_at_a_time = Lock()
        self._logger = _logger(trt, self._heard)
        self._runtime: Any = trt.Runtime(self._logger)
        if host_code:
            self._runtime.engine_host_code_allowed = True
        self._engine: Any = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise self.error(f"{self._title} cannot load the plan")
        self.input, self.output = self._tensors()
        self.least, self.usual, self.most = self._batches()
        self.activation_bytes = int(self._engine.device_memory_size_v2)
        self._config: Any = self._runtime_config() if library in COMPILES_HERE else None
        self._cache: Any = None if self._config is None else self._config.create_runtime_cache()
        self._cache_is_set = self._config is None

    @property
    def library(self) -> Any:
        """The library's module."""
        return self._trt

    def error(self, failure: str) -> EngineError:
        """Return the error that something failed, in the library's last words, which are forgotten then."""
        said, self._heard[:] = "; ".join(self._heard[-2:]), []
        return EngineError(f"{failure}: {said}" if said else f"{failure}, and says no reason")

    def context(self, activations: int) -> "Context":
        """Return a new context that works in memory at ``activations``, of ``activation_bytes``.

        Raises:
            EngineError: there is none to be had.
        """
        with self._one_at_a_time:
            if not self._cache_is_set:
                self._config.set_runtime_cache(self._cache)
                self._cache_is_set = True
            made = self._engine.create_execution_context(self._config or self._user_managed)
        if made is None:
            raise self.error("no execution context")
        made.set_device_memory(activations, self.activation_bytes)
        return Context(self, made)

    @property
    def _user_managed(self) -> Any:
        return self._trt.ExecutionContextAllocationStrategy.USER_MANAGED

    def refit(self, graph: Path) -> None:
        """Give an engine that was built without weights those of its graph.

        Raises:
            EngineError: they do not belong to it.
        """
        refitter = self._trt.Refitter(self._engine, self._logger)
        parser = self._trt.OnnxParserRefitter(refitter, self._logger)
        if not (parser.refit_from_file(str(graph)) and refitter.refit_cuda_engine()):
            raise self.error(f"the weights of {graph.name} do not fit the engine")

    def filled_up(self, images: int) -> int:
        """Return the size of batch that so many images run in: the next power of two that the engine takes."""
        return min(max(1 << (images - 1).bit_length(), self.least), self.most)

    def load_kernels(self, blob: bytes) -> bool:
        """Take kernels that were compiled before; the library refuses those of another GPU, driver or version.

        It comes before the first context, since a cache is filled before it is given to a configuration.
        Source: NVIDIA, TensorRT-RTX documentation, "Working with Runtime Cache".
        """
        return not self._cache_is_set and bool(self._cache.deserialize(blob))

    def compiled_kernels(self) -> bytes | None:
        """Return the kernels that were compiled so far; None where the library compiles none, or cannot store them."""
        stored = None if self._cache is None else self._cache.serialize()
        return None if stored is None else bytes(stored)

    def close(self) -> None:
        """Free the engine; its contexts are gone before."""
        self._cache = self._config = self._engine = self._runtime = None

    def _runtime_config(self) -> Any:
        """Return how TensorRT-RTX makes contexts: whole graphs are captured here, so it compiles all kernels before."""
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(self._user_managed)
        config.cuda_graph_strategy = self._trt.CudaGraphStrategy.DISABLED
        eager = self._trt.DynamicShapesKernelSpecializationStrategy.EAGER
        config.dynamic_shapes_kernel_specialization_strategy = eager
        return config

    def _tensors(self) -> tuple[Tensor, Tensor]:
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        if set(names) != {INPUT, OUTPUT}:
            raise ArtefactError(
                f"the engine has the tensors {', '.join(names)}; only {INPUT} and {OUTPUT} can be run. "
                "Build it again: medseg-trt build --ckpt run/best.pt --outputs logits"
            )
        source, target = (self._tensor(name) for name in (INPUT, OUTPUT))
        return source, target

    def _tensor(self, name: str) -> Tensor:
        dtype = self._trt.nptype(self._engine.get_tensor_dtype(name))
        if np.dtype(dtype).name not in TYPES:
            raise ArtefactError(f"the engine's {name} is {np.dtype(dtype).name}; it must be {' or '.join(TYPES)}")
        shape = tuple(int(length) for length in self._engine.get_tensor_shape(name))[1:]
        return Tensor(name=name, dtype=np.dtype(dtype), shape=shape)

    def _batches(self) -> tuple[int, int, int]:
        fixed = int(self._engine.get_tensor_shape(INPUT)[0])
        if fixed > 0:
            return fixed, fixed, fixed
        least, usual, most = (int(shape[0]) for shape in self._engine.get_tensor_profile_shape(INPUT, 0))
        return least, usual, most


class Context:
    """An execution context: one shape at a time, in one stream."""

    def __init__(self, engine: Engine, context: Any) -> None:
        self._engine, self._context = engine, context

    def prepare(self, batch: int, source: int, target: int) -> None:
        """Say how many images there are, and at which addresses they and the outputs lie.

        Raises:
            EngineError: the engine does not take them.
        """
        engine = self._engine
        if not self._context.set_input_shape(engine.input.name, (batch, *engine.input.shape)):
            raise engine.error(f"a batch of {batch} is refused")
        for tensor, address in ((engine.input, source), (engine.output, target)):
            if not self._context.set_tensor_address(tensor.name, address):
                raise engine.error(f"the memory of {tensor.name} is refused")

    def enqueue(self, stream: int) -> None:
        """Put the network into a stream.

        Raises:
            EngineError: it is not.
        """
        if not self._context.execute_async_v3(stream):
            raise self._engine.error("the network was not run")

    def watch(self) -> dict[str, list[float]]:
        """Return a place where the milliseconds of every layer come, by its name, a figure each time it runs.

        From now on the layers wait for one another, so that the whole takes longer.
        """
        taken: dict[str, list[float]] = {}
        self._context.profiler = _profiler(self._engine.library, taken)
        return taken

    def is_capturable(self, stream: int) -> bool:
        """Say whether ``enqueue`` can be recorded; the classic library has no word for it and fails at the attempt."""
        known = getattr(self._context, "is_stream_capturable", None)
        return known is None or bool(known(stream))


def _profiler(trt: Any, taken: dict[str, list[float]]) -> Any:
    """Return what the library tells the times of layers."""

    class Watched(trt.IProfiler):
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)  # the bindings refuse super()

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            taken.setdefault(layer_name, []).append(float(ms))

    return Watched()


def _logger(trt: Any, heard: list[str]) -> Any:
    """Return a logger that keeps the library's errors and shows everything with ``-v``."""

    class Heard(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # the bindings refuse super()

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                heard.append(" ".join(msg.split()))
            LOG.log(logging.DEBUG, "TensorRT: %s", msg)

    return Heard()
