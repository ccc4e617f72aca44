"""The table of back-ends: what can run a graph, and which package each one needs."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec


@dataclass(frozen=True, kw_only=True, slots=True)
class Backend:
    """What can run a graph."""

    module: str  # of ours; it has ``open_graph``
    package: str  # that it imports
    extra: str  # of medseg-trt, which installs the package
    flavours: tuple[str, ...]  # of the graphs it is given, the one that it likes best first
    computes: tuple[str, ...]  # what it can compute float parts in
    function: str = "open_graph"  # of the module
    gpu: bool = False  # not tried at the build: it is given what others were verified with, and the golden input
    engines: bool = False  # runs an engine that was built from the graph, not the graph


BACKENDS: Mapping[str, Backend] = {
    "onnxruntime": Backend(
        module="medseg_trt.sessions.onnxruntime",
        package="onnxruntime",
        extra="cpu",
        flavours=("canonical", "uint8"),
        computes=("fp32",),
    ),
    "openvino": Backend(
        module="medseg_trt.sessions.openvino",
        package="openvino",
        extra="openvino",
        flavours=("plain",),
        computes=("fp32", "bf16"),
    ),
    "onnxruntime-cuda": Backend(
        module="medseg_trt.sessions.onnxruntime_gpu",
        function="open_cuda",
        package="onnxruntime",
        extra="gpu",
        flavours=("plain", "canonical"),  # it has no kernels for some of opset 23
        computes=("fp32",),
        gpu=True,
    ),
    "onnxruntime-tensorrt": Backend(
        module="medseg_trt.sessions.onnxruntime_gpu",
        function="open_tensorrt",
        package="onnxruntime",
        extra="gpu",
        flavours=("canonical",),  # the others' 8-bit activations are not symmetric
        computes=("fp32",),
        gpu=True,
    ),
    "onnxruntime-tensorrt-rtx": Backend(
        module="medseg_trt.sessions.onnxruntime_gpu",
        function="open_tensorrt_rtx",
        package="onnxruntime_ep_nv_tensorrt_rtx",
        extra="onnxruntime-rtx",
        flavours=("canonical",),
        computes=("fp32",),
        gpu=True,
    ),
    "tensorrt": Backend(
        module="medseg_trt.sessions.tensorrt",
        function="open_engine",
        package="tensorrt",
        extra="tensorrt",
        flavours=("canonical", "plain"),
        computes=("fp32",),
        gpu=True,
        engines=True,
    ),
    "tensorrt-rtx": Backend(
        module="medseg_trt.sessions.tensorrt",
        function="open_engine",
        package="tensorrt_rtx",
        extra="tensorrt-rtx",
        flavours=("canonical",),
        computes=("fp32",),
        gpu=True,
        engines=True,
    ),
}


def is_installed(backend: str) -> bool:
    """Say whether a back-end's package is here, without importing it."""
    try:
        return find_spec(BACKENDS[backend].package) is not None
    except ValueError:  # somebody has put None in its place
        return False
