"""Run a graph with ONNX Runtime on a GPU, and see that every node of it is there.

ONNX Runtime goes on without a word on the CPU: where a provider cannot be loaded, where it has no kernel for a node,
and once more when a run fails. Here the first two are errors, found in the record of which provider took which node,
and the third is switched off.
Source: ONNX Runtime, ``onnxruntime_session_options_config_keys.h`` (``session.record_ep_graph_assignment_info``).
"""

import sys
from collections import Counter
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from numpy import ndarray

from medseg_trt.errors import ArtefactError, DeviceError, MissingExtraError, require
from medseg_trt.sessions.backends import BACKENDS
from medseg_trt.sessions.onnxruntime import ERRORS_ONLY, OnnxRuntimeSession

RECORD = "session.record_ep_graph_assignment_info"
NODES_NAMED = 5  # in a message


@dataclass(frozen=True, kw_only=True, slots=True)
class Provider:
    """One of ONNX Runtime's execution providers."""

    name: str  # ONNX Runtime's
    title: str
    options: Mapping[str, str] = field(default_factory=dict[str, str])
    beside: tuple[str, ...] = ()  # others on the same GPU that may take what it leaves


CUDA = "onnxruntime-cuda"
PROVIDERS: Mapping[str, Provider] = {  # by back-end
    CUDA: Provider(
        name="CUDAExecutionProvider",
        title="CUDA",
        options={"use_tf32": "0"},  # else float32 is multiplied with 10 bits of fraction where the GPU can
    ),
    "onnxruntime-tensorrt": Provider(
        name="TensorrtExecutionProvider", title="TensorRT", beside=("CUDAExecutionProvider",)
    ),
    "onnxruntime-tensorrt-rtx": Provider(name="NvTensorRTRTXExecutionProvider", title="TensorRT-RTX"),
}


class OnnxRuntimeGpuSession(OnnxRuntimeSession):
    """An open ONNX Runtime session whose nodes are all on a GPU; an error in a run stays one."""

    device = "GPU"

    def __init__(self, session: Any, backend: str, description: str) -> None:
        super().__init__(session, description)
        self.backend = backend

    def _answer(self, *arguments: Any) -> ndarray:
        try:
            return super()._answer(*arguments)
        except Exception as error:  # its errors have no common base but Exception
            raise DeviceError(f"{self.description}: {str(error).splitlines()[0]}") from error


def open_cuda(path: Path, precision: str, threads: int | None, compute: str) -> OnnxRuntimeGpuSession:
    """Open an ONNX file with the CUDA provider; see ``_open``."""
    return _open(CUDA, path, precision)


def open_tensorrt(path: Path, precision: str, threads: int | None, compute: str) -> OnnxRuntimeGpuSession:
    """Open an ONNX file with the TensorRT provider; see ``_open``."""
    return _open("onnxruntime-tensorrt", path, precision)


def open_tensorrt_rtx(path: Path, precision: str, threads: int | None, compute: str) -> OnnxRuntimeGpuSession:
    """Open an ONNX file with the TensorRT-RTX provider, which is a package of its own; see ``_open``."""
    return _open("onnxruntime-tensorrt-rtx", path, precision)


def _open(backend: str, path: Path, precision: str) -> OnnxRuntimeGpuSession:
    """Open an ONNX file on the GPU.

    Raises:
        MissingExtraError: the provider is not installed.
        DeviceError: it does not run here, or leaves nodes to the CPU.
        ArtefactError: ONNX Runtime refuses the graph.
    """
    runtime, provider = require("onnxruntime", "gpu"), PROVIDERS[backend]
    options = runtime.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    options.add_session_config_entry(RECORD, "1")
    chosen = _choose(runtime, backend, options)
    try:
        session = runtime.InferenceSession(str(path), options, **chosen, enable_fallback=0)
    except Exception as error:  # its errors have no common base but Exception
        first = str(error).splitlines()[0]
        raise ArtefactError(
            f"ONNX Runtime {runtime.__version__} with {provider.title} refuses {path}: {first}"
        ) from error
    placed = placement(session)
    require_placed(placed, provider)
    shares = ", ".join(
        f"{len(nodes)} nodes in {name.removesuffix('ExecutionProvider')}" for name, nodes in placed.items()
    )
    return OnnxRuntimeGpuSession(
        session, backend, f"ONNX Runtime {runtime.__version__} {precision}, {provider.title}: {shares}"
    )


def placement(session: Any) -> dict[str, list[str]]:
    """Return the operators of a session's nodes by the provider that each one was given to."""
    found: dict[str, list[str]] = {}
    for part in session.get_provider_graph_assignment_info():
        found.setdefault(part.ep_name, []).extend(node.op_type for node in part.get_nodes())
    return found


def require_placed(placed: Mapping[str, list[str]], provider: Provider) -> None:
    """See that a provider, or one beside it on the same GPU, has every node.

    Raises:
        DeviceError: some are elsewhere.
    """
    elsewhere = {name: nodes for name, nodes in placed.items() if name not in (provider.name, *provider.beside)}
    if provider.name not in placed:
        raise DeviceError(
            f"ONNX Runtime's {provider.title} provider took no node: it does not run on this machine. It needs an "
            "NVIDIA GPU, its driver, and the libraries of CUDA: pip install 'onnxruntime-gpu[cuda,cudnn]'"
        )
    if elsewhere:
        strays = Counter(node for nodes in elsewhere.values() for node in nodes)
        named = ", ".join(f"{count} {name}" for name, count in strays.most_common(NODES_NAMED))
        raise DeviceError(
            f"ONNX Runtime's {provider.title} provider leaves {strays.total()} of {sum(map(len, placed.values()))} "
            f"nodes to {', '.join(elsewhere)} ({named}), which would be slower and unmeasured; choose another --backend"
        )


def _choose(runtime: ModuleType, backend: str, options: Any) -> dict[str, Any]:
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
        beside = [(name, dict(PROVIDERS[CUDA].options)) for name in provider.beside]
        return {"providers": [(provider.name, dict(provider.options)), *beside]}
    library = require(package, BACKENDS[backend].extra)
    if provider.name not in runtime.get_available_providers():
        runtime.register_execution_provider_library(library.get_ep_name(), library.get_library_path())
    devices = [device for device in runtime.get_ep_devices() if device.ep_name == library.get_ep_name()]
    if not devices:
        raise DeviceError(
            f"ONNX Runtime's {provider.title} provider finds no device; it needs an NVIDIA GPU and its driver. "
            "On the CPU: --backend onnxruntime"
        )
    options.add_provider_for_devices(devices[:1], dict(provider.options))
    return {}
