"""Run a graph with ONNX Runtime on a GPU, and see that every node of it is there.

ONNX Runtime goes on without a word on the CPU: where a provider cannot be loaded, where it has no kernel for a node,
and once more when a run fails. Here the first two are errors, found in the record of which provider took which node,
and the third is switched off.
Source: ONNX Runtime, ``onnxruntime_session_options_config_keys.h`` (``session.record_ep_graph_assignment_info``).
"""

import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy import ndarray

from medseg_trt.errors import ArtefactError, DeviceError, MissingExtraError, require
from medseg_trt.export.graph.interface import MASK_NODE, OUTPUT, size_inputs
from medseg_trt.gpu import not_enough_memory, require_gpu
from medseg_trt.kernels.device import Device, open_device
from medseg_trt.kernels.launch import CudaError
from medseg_trt.progress import LOG
from medseg_trt.sessions.backends import BACKENDS
from medseg_trt.sessions.device_times import UNTIMED, DeviceTimes, time_in_flight
from medseg_trt.sessions.engine_cache import ENGINES, KERNELS, EngineCache
from medseg_trt.sessions.onnxruntime import ERRORS_ONLY, OnnxRuntimeSession
from medseg_trt.sessions.stream_events import StreamEvents
from medseg_trt.spec import MAX_BATCH

RECORD = "session.record_ep_graph_assignment_info"
NODES_NAMED = 5  # in a message
CPU_PROVIDER, SIZES = "CPUExecutionProvider", "CPU (sizes)"  # see ``placement``
KEEP_IN_FLIGHT = "disable_synchronize_execution_providers"  # of a run: it returns before the GPU is done
MEMORY_WORDS = ("out of memory", "failed to allocate memory", "alloc_failed")  # of ONNX Runtime, CUDA and cuDNN
TF32_OVERRIDE = "NVIDIA_TF32_OVERRIDE"  # read by TensorRT and cuBLAS when they are loaded


@dataclass(frozen=True, kw_only=True, slots=True)
class Provider:
    """One of ONNX Runtime's execution providers."""

    name: str  # ONNX Runtime's
    title: str
    options: Mapping[str, str] = field(default_factory=dict[str, str])
    beside: tuple[str, ...] = ()  # others on the same GPU that may take what it leaves
    environment: Mapping[str, str] = field(default_factory=dict[str, str])  # set before its libraries are loaded
    cache: str = ""  # how its options for a cache begin; "": it builds nothing that is worth keeping
    needs: str = "the libraries of CUDA: pip install 'onnxruntime-gpu[cuda,cudnn]'"  # besides a GPU and its driver


CUDA = "onnxruntime-cuda"
PROVIDERS: Mapping[str, Provider] = {  # by back-end
    CUDA: Provider(
        name="CUDAExecutionProvider",
        title="CUDA",
        options={"use_tf32": "0"},  # else float32 is multiplied with 10 bits of fraction where the GPU can
    ),
    "onnxruntime-tensorrt": Provider(
        name="TensorrtExecutionProvider",
        title="TensorRT",
        beside=("CUDAExecutionProvider",),
        environment={TF32_OVERRIDE: "0"},  # it has no option for it
        needs="the libraries of CUDA and TensorRT: pip install 'onnxruntime-gpu[cuda,cudnn]' tensorrt",
        cache=ENGINES,
    ),
    "onnxruntime-tensorrt-rtx": Provider(name="NvTensorRTRTXExecutionProvider", title="TensorRT-RTX", cache=KERNELS),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnStream:
    """A stream of ours that ONNX Runtime computes in, so that events can be put around a run."""

    device: Device
    handle: int

    def close(self) -> None:
        """Destroy the stream."""
        self.device.activate()
        self.device.free_stream(self.handle)


class OnnxRuntimeGpuSession(OnnxRuntimeSession):
    """An open ONNX Runtime session whose nodes are all on a GPU; an error in a run stays one."""

    def __init__(
        self,
        session: Any,
        backend: str,
        description: str,
        cuda: int = 0,
        stream: OwnStream | None = None,
        most: int | None = None,
    ) -> None:
        """Take a session.

        Args:
            session: ONNX Runtime's.
            backend: a key of ``PROVIDERS``.
            description: for a table.
            cuda: the number of its GPU.
            stream: that it computes in; None: one of its own, so that the device's time cannot be taken.
            most: images that it takes at once; None: any number.
        """
        super().__init__(session, description)
        self._most = most
        self.backend, self._cuda, self._stream = backend, cuda, stream
        self.device = f"GPU {require_gpu(cuda).name}"

    def time_on_device(self, batch: ndarray, duration_s: float, min_runs: int) -> DeviceTimes | None:
        """Time the network alone, its input and output bound to memory of the GPU; see ``Session``."""
        if self._stream is None or (self._most is not None and len(batch) > self._most):
            return None
        runtime, stream = require("onnxruntime", "gpu"), self._stream
        logits = self.run(batch)
        device = "cuda", self._cuda
        binding = self._session.io_binding()
        source = runtime.OrtValue.ortvalue_from_numpy(batch, *device)
        target = runtime.OrtValue.ortvalue_from_shape_and_type(list(logits.shape), np.float32, *device)
        binding.bind_ortvalue_input(self._input.name, source)
        for name, value in size_inputs(self._sizes, batch.shape[2:], batch.shape[2:]).items():
            binding.bind_cpu_input(name, value)
        binding.bind_ortvalue_output(OUTPUT, target)
        options = runtime.RunOptions()
        options.add_run_config_entry(KEEP_IN_FLIGHT, "1")
        try:
            stream.device.activate()
            for _ in range(UNTIMED):
                self._session.run_with_iobinding(binding, options)
            stream.device.synchronize(stream.handle)
            with StreamEvents(stream.device, stream.handle) as clock:
                return time_in_flight(
                    lambda: self._session.run_with_iobinding(binding, options), clock, duration_s, min_runs
                )
        except Exception as error:  # of ours, or of ONNX Runtime as in ``_run``
            raise _device_error(self.description, error) from error

    def close(self) -> None:
        """Free the network, and then its stream."""
        super().close()
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _run(self, output: str, batch: ndarray, size: Sequence[int], resampled: Sequence[int]) -> ndarray:
        most = self._most or max(len(batch), 1)
        parts = [batch[start : start + most] for start in range(0, max(len(batch), 1), most)]
        run = super()._run
        try:
            return np.concatenate([run(output, part, size, resampled) for part in parts])
        except Exception as error:  # its errors have no common base but Exception
            raise _device_error(self.description, error) from error


def open_cuda(
    path: Path,
    precision: str,
    threads: int | None,
    compute_dtype: str,
    cuda: int = 0,
    cache: EngineCache | None = None,
) -> OnnxRuntimeGpuSession:
    """Open an ONNX file with the CUDA provider; see ``_open``."""
    return _open(CUDA, path, precision, cuda, cache)


def open_tensorrt(
    path: Path,
    precision: str,
    threads: int | None,
    compute_dtype: str,
    cuda: int = 0,
    cache: EngineCache | None = None,
) -> OnnxRuntimeGpuSession:
    """Open an ONNX file with the TensorRT provider; see ``_open``."""
    return _open("onnxruntime-tensorrt", path, precision, cuda, cache)


def open_tensorrt_rtx(
    path: Path,
    precision: str,
    threads: int | None,
    compute_dtype: str,
    cuda: int = 0,
    cache: EngineCache | None = None,
) -> OnnxRuntimeGpuSession:
    """Open an ONNX file with the TensorRT-RTX provider, which is a package of its own; see ``_open``."""
    return _open("onnxruntime-tensorrt-rtx", path, precision, cuda, cache)


def _open(backend: str, path: Path, precision: str, cuda: int, cache: EngineCache | None) -> OnnxRuntimeGpuSession:
    """Open an ONNX file on a GPU, by its number; ``cache`` is what the provider may keep for the next session.

    Raises:
        MissingExtraError: the provider is not installed.
        DeviceError: there is no such GPU, or the provider does not run here or leaves nodes to the CPU.
        ArtefactError: ONNX Runtime refuses the graph.
    """
    runtime, provider = require("onnxruntime", "gpu"), PROVIDERS[backend]
    gpu = require_gpu(cuda)  # the providers do not say that it is missing
    options = runtime.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    options.add_session_config_entry(RECORD, "1")
    os.environ.update(provider.environment)
    # A provider in a package of its own computes in a stream of its own.
    stream = _own_stream(cuda) if BACKENDS[backend].package == "onnxruntime" else None
    kept: dict[str, str] = {}
    if cache is not None and provider.cache:
        kept = cache.options(provider.cache, f"{gpu.name}, {gpu.driver}, ONNX Runtime {runtime.__version__}")
    try:
        session = _session(runtime, path, options, _choose(runtime, backend, options, cuda, stream, kept), provider)
        placed = placement(session)
        require_placed(placed, provider)
    except BaseException:
        if stream is not None:
            stream.close()
        raise
    shares = ", ".join(
        f"{len(nodes)} nodes in {name.removesuffix('ExecutionProvider')}" for name, nodes in placed.items()
    )
    description = f"ONNX Runtime {runtime.__version__} {precision}, {provider.title}: {shares}"
    return OnnxRuntimeGpuSession(session, backend, description, cuda, stream, MAX_BATCH if kept else None)


def _own_stream(cuda: int) -> OwnStream | None:
    """Return a new stream of a GPU; None where cuda-bindings or the GPU is missing, which ONNX Runtime says itself."""
    try:
        device = open_device(cuda)
        return OwnStream(device=device, handle=device.new_stream())
    except (DeviceError, CudaError) as error:
        LOG.debug("the device's own time cannot be taken: %s", error)
        return None


def _session(runtime: ModuleType, path: Path, options: Any, chosen: Mapping[str, Any], provider: Provider) -> Any:
    try:
        return runtime.InferenceSession(str(path), options, **chosen, enable_fallback=0)
    except Exception as error:  # its errors have no common base but Exception
        name = f"ONNX Runtime {runtime.__version__} with {provider.title}"
        if _is_memory(error):
            raise _device_error(name, error) from error
        raise ArtefactError(f"{name} refuses {path}: {_first_line(error)}") from error


def _device_error(name: str, error: Exception) -> DeviceError:
    first = _first_line(error)
    return not_enough_memory(name, first) if _is_memory(error) else DeviceError(f"{name}: {first}")


def _is_memory(error: Exception) -> bool:
    return any(word in str(error).lower() for word in MEMORY_WORDS)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def placement(session: Any) -> dict[str, list[str]]:
    """Return the operators of a session's nodes by the provider that each one was given to.

    A graph that makes masks joins the size of the images, four integers, from its inputs. ONNX Runtime leaves that to
    the CPU, where the numbers are, whatever the provider can do: such nodes are listed under ``SIZES``.
    Source: ONNX Runtime, ``fallback_cpu_capability.cc``.
    """
    operators: dict[str, list[str]] = {}
    for part in session.get_provider_graph_assignment_info():
        for node in part.get_nodes():
            is_size = part.ep_name == CPU_PROVIDER and node.op_type == "Concat" and node.name.startswith(MASK_NODE)
            operators.setdefault(SIZES if is_size else part.ep_name, []).append(node.op_type)
    return operators


def require_placed(placed: Mapping[str, list[str]], provider: Provider) -> None:
    """See that a provider, or one beside it on the same GPU, has every node.

    Raises:
        DeviceError: some are elsewhere.
    """
    elsewhere = {name: nodes for name, nodes in placed.items() if name not in (provider.name, *provider.beside, SIZES)}
    if provider.name not in placed:
        raise DeviceError(
            f"ONNX Runtime's {provider.title} provider took no node: it does not run on this machine. It needs an "
            f"NVIDIA GPU, its driver, and {provider.needs}"
        )
    if elsewhere:
        strays = Counter(node for nodes in elsewhere.values() for node in nodes)
        named = ", ".join(f"{count} {name}" for name, count in strays.most_common(NODES_NAMED))
        raise DeviceError(
            f"ONNX Runtime's {provider.title} provider leaves {strays.total()} of {sum(map(len, placed.values()))} "
            f"nodes to {', '.join(elsewhere)} ({named}), which would be slower and unmeasured; choose another --backend"
        )


def _choose(
    runtime: ModuleType,
    backend: str,
    options: Any,
    cuda: int,
    stream: OwnStream | None,
    kept: Mapping[str, str],
) -> dict[str, Any]:
    """Return the arguments of a session that name the provider; one in a package of its own goes into the options.

    Raises:
        MissingExtraError: it is not installed.
        DeviceError: it finds no GPU.
    """
    provider, package = PROVIDERS[backend], BACKENDS[backend].package
    if package == "onnxruntime":
        if provider.name not in runtime.get_available_providers():
            raise MissingExtraError(
                f"this ONNX Runtime has no {provider.title} provider. Install one that has it: "
                f"pip uninstall onnxruntime; pip install 'medseg-trt[{BACKENDS[backend].extra}]'"
            )
        with redirect_stdout(sys.stderr):  # it prints what it cannot find
            runtime.preload_dlls()
        provider_options = {"device_id": str(cuda)} | ({"user_compute_stream": str(stream.handle)} if stream else {})
        beside = [(name, {**PROVIDERS[CUDA].options, **provider_options}) for name in provider.beside]
        return {"providers": [(provider.name, {**provider.options, **kept, **provider_options}), *beside]}
    library = require(package, BACKENDS[backend].extra)
    if provider.name not in runtime.get_available_providers():
        runtime.register_execution_provider_library(library.get_ep_name(), library.get_library_path())
    devices = [device for device in runtime.get_ep_devices() if device.ep_name == library.get_ep_name()]
    if not devices:
        raise DeviceError(
            f"ONNX Runtime's {provider.title} provider finds no device; it needs an NVIDIA GPU and its driver. "
            "On the CPU: --backend onnxruntime"
        )
    if cuda >= len(devices):
        raise DeviceError(f"ONNX Runtime's {provider.title} provider finds {len(devices)} device(s), not cuda:{cuda}")
    options.add_provider_for_devices([devices[cuda]], {**provider.options, **kept})
    return {}
