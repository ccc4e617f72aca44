"""TensorRT on a ``FakeGpu``: the calls that a session makes, in the words of both libraries' bindings.

The engine's network is a function of NumPy. Contexts share what the real ones share, and check what those leave
undefined: work in another shape than was recorded, or in memory that is gone.
"""

from collections.abc import Callable, Sequence
from enum import Enum
from types import SimpleNamespace
from typing import Any

import numpy as np
from fakes.gpu import FakeGpu

Network = Callable[[np.ndarray], np.ndarray]  # (batch, 3, H, W) -> (batch, classes, H, W)


class Severity(Enum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class ILogger:
    Severity = Severity

    def __init__(self) -> None:
        pass


class IProfiler:
    def __init__(self) -> None:
        pass


class FakeTrt:
    """The module ``tensorrt_rtx`` or ``tensorrt``; ``plans`` holds every plan that was deserialised."""

    __version__ = "1.7.1.116"
    ILogger = ILogger
    IProfiler = IProfiler
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user managed")
    CudaGraphStrategy = SimpleNamespace(DISABLED="disabled")
    DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager")

    def __init__(
        self,
        gpu: FakeGpu,
        network: Network,
        input_shape: Sequence[int],
        output_shape: Sequence[int],
        batches: tuple[int, int, int] = (1, 2, 4),
        dtype: str = "float32",
        names: Sequence[str] = ("pixel_values", "logits"),
    ) -> None:
        self.gpu, self.network, self.batches, self.names = gpu, network, batches, list(names)
        self.shapes = {"pixel_values": tuple(input_shape), "logits": tuple(output_shape)}
        self.dtype = np.dtype(dtype)
        self.plans: list[bytes] = []
        self.host_code: list[bool] = []
        self.refuses = ""  # what the logger hears when something is refused
        self.refused: set[str] = set()  # names of methods that return failure
        self.capturable = True
        self.cache = b""
        self.compiled_later = 0  # kernels that images asked for
        self.contexts: list[FakeContext] = []
        self.refitted: list[str] = []
        self.layer_ms: dict[str, float] = {}  # what a profiler is told

    def Runtime(self, logger: ILogger) -> "FakeRuntime":  # noqa: N802  # the bindings' name
        return FakeRuntime(self, logger)

    def Refitter(self, engine: "FakeEngine", logger: Any) -> "FakeRefitter":  # noqa: N802
        return FakeRefitter(self, logger)

    def OnnxParserRefitter(self, refitter: "FakeRefitter", logger: Any) -> "FakeRefitter":  # noqa: N802
        return refitter

    def nptype(self, dtype: np.dtype[Any]) -> type:
        return dtype.type

    def fails(self, method: str, logger: Any) -> bool:
        self.gpu.note(method)
        if method not in self.refused:
            return False
        if self.refuses:
            logger.log(Severity.ERROR, self.refuses)
        return True


class FakeRuntime:
    def __init__(self, trt: FakeTrt, logger: Any) -> None:
        self._trt, self._logger = trt, logger
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, plan: bytes) -> "FakeEngine | None":
        self._trt.plans.append(plan)
        self._trt.host_code.append(self.engine_host_code_allowed)
        if self._trt.fails("deserialize_cuda_engine", self._logger):
            return None
        return FakeEngine(self._trt, self._logger)


class FakeRefitter:
    """The refitter, and the parser that feeds it."""

    def __init__(self, trt: FakeTrt, logger: Any) -> None:
        self._trt, self._logger = trt, logger

    def refit_from_file(self, graph: str) -> bool:
        self._trt.refitted.append(graph)
        return True

    def refit_cuda_engine(self) -> bool:
        return not self._trt.fails("refit_cuda_engine", self._logger)


class FakeEngine:
    device_memory_size_v2 = 4096

    def __init__(self, trt: FakeTrt, logger: Any) -> None:
        self.trt, self.logger = trt, logger
        self.num_io_tensors = len(trt.names)

    def get_tensor_name(self, index: int) -> str:
        return self.trt.names[index]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1 if self.trt.batches[0] < self.trt.batches[2] else self.trt.batches[0], *self.trt.shapes[name])

    def get_tensor_dtype(self, name: str) -> np.dtype[Any]:
        return self.trt.dtype

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        assert profile == 0
        return [(batch, *self.trt.shapes[name]) for batch in self.trt.batches]

    def create_runtime_config(self) -> "FakeConfig":
        return FakeConfig(self.trt)

    def create_execution_context(self, how: Any) -> "FakeContext | None":
        managed = how.strategy if isinstance(how, FakeConfig) else how
        assert managed == "user managed", "the context would allocate memory of its own"
        if self.trt.fails("create_execution_context", self.logger):
            return None
        return FakeContext(self)


class FakeConfig:
    cuda_graph_strategy = dynamic_shapes_kernel_specialization_strategy = ""

    def __init__(self, trt: FakeTrt) -> None:
        self.strategy, self._trt = "", trt

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> "FakeCache":
        return FakeCache(self._trt)

    def set_runtime_cache(self, cache: "FakeCache") -> bool:
        self._trt.gpu.note("set_runtime_cache")
        cache.is_set = True
        assert (self.cuda_graph_strategy, self.dynamic_shapes_kernel_specialization_strategy) == ("disabled", "eager")
        return True


class FakeCache:
    def __init__(self, trt: FakeTrt) -> None:
        self._trt, self.is_set = trt, False

    def deserialize(self, blob: bytes) -> bool:
        self._trt.gpu.note("deserialize")
        assert not self.is_set, "a cache is filled after it was given to a configuration"
        self._trt.cache = blob
        return blob.startswith(b"kernels")

    def serialize(self) -> bytes | None:
        if self._trt.fails("serialize", None):
            return None
        return b"kernels of a GPU" + b" and more" * self._trt.compiled_later


class FakeContext:
    """One execution context; a graph remembers the shape it was recorded with, and it must not have changed."""

    def __init__(self, engine: FakeEngine) -> None:
        self._engine, self._trt = engine, engine.trt
        self.memory = self.memory_bytes = self.batch = 0
        self.changes = 0  # what a graph that was recorded from this context must not see change
        self.settled = -1  # the last change after which it has run outside of a recording
        self.addresses: dict[str, int] = {}
        self.profiler: Any = None
        self._trt.contexts.append(self)

    def set_device_memory(self, memory: int, size: int) -> None:
        self.memory, self.memory_bytes = memory, size
        self.changes += 1

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert name == "pixel_values"
        assert shape[1:] == self._trt.shapes[name]
        if self._trt.fails("set_input_shape", self._engine.logger):
            return False
        self.batch = shape[0]
        self.changes += 1
        return self._trt.batches[0] <= self.batch <= self._trt.batches[2]

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.addresses[name] = memory
        self.changes += 1
        return True

    def is_stream_capturable(self, stream: int) -> bool:
        return self._trt.capturable

    def execute_async_v3(self, stream_handle: int) -> bool:
        if self._trt.fails("execute_async_v3", self._engine.logger):
            return False
        gpu, addresses, batch, changes = self._trt.gpu, dict(self.addresses), self.batch, self.changes
        recorded = stream_handle in gpu.capturing
        assert not recorded or self.settled == changes, "recorded before a run has settled the shape"

        def work() -> None:
            assert not recorded or self.changes == changes, "the context of a graph was changed"
            gpu.view(self.memory, self.memory_bytes)  # still allocated
            source, target = (self._view(addresses[name], name, batch) for name in ("pixel_values", "logits"))
            target[...] = self._trt.network(source)
            self.settled = max(self.settled, changes)
            if self.profiler is not None:
                for name, ms in self._trt.layer_ms.items():
                    self.profiler.report_layer_time(name, ms)

        gpu.enqueue(stream_handle, work, self.memory, *addresses.values())
        return True

    def _view(self, address: int, name: str, batch: int) -> np.ndarray:
        shape = (batch, *self._trt.shapes[name])
        nbytes = int(np.prod(shape)) * self._trt.dtype.itemsize
        return self._trt.gpu.view(address, nbytes).view(self._trt.dtype).reshape(shape)
