"""The table of back-ends: what can run a graph, and which package each one needs."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec

from medseg_trt.bundles.manifest import COMPUTE_DTYPES


@dataclass(frozen=True, kw_only=True, slots=True)
class Backend:
    """What can run a graph."""

    module: str  # of ours; it has ``function``
    package: str  # that it imports
    extra: str  # of medseg-trt, which installs the package
    dialects: tuple[str, ...]  # of the graphs that it reads, the preferred one first
    compute_dtypes: tuple[str, ...]  # what it can compute float parts in
    function: str = "open_graph"  # of the module
    streams: bool = False  # runs several images beside each other with one copy of the weights
    gpu: bool = False  # tried by a build on a GPU alone; else its graphs are verified with another back-end
    engines: bool = False  # runs an engine that was built from the graph, not the graph


NO_BF16 = "this processor has no bfloat16 arithmetic; choose another precision than bf16"

BACKENDS: Mapping[str, Backend] = {
    "onnxruntime": Backend(
        module="medseg_trt.sessions.onnxruntime",
        package="onnxruntime",
        extra="cpu",
        dialects=("canonical", "uint8"),
        compute_dtypes=COMPUTE_DTYPES["onnxruntime"],
    ),
    "openvino": Backend(
        module="medseg_trt.sessions.openvino",
        package="openvino",
        extra="openvino",
        dialects=("plain", "convolved"),
        compute_dtypes=COMPUTE_DTYPES["openvino"],
        streams=True,
    ),
    "onnxruntime-cuda": Backend(
        module="medseg_trt.sessions.onnxruntime_gpu",
        function="open_cuda",
        package="onnxruntime",
        extra="gpu",
        dialects=("plain", "canonical"),  # it has no kernels for some of opset 23
        compute_dtypes=("fp32",),
        gpu=True,
    ),
    "onnxruntime-tensorrt": Backend(
        module="medseg_trt.sessions.onnxruntime_gpu",
        function="open_tensorrt",
        package="onnxruntime",
        extra="gpu",
        dialects=("canonical",),  # the others' 8-bit activations are not symmetric
        compute_dtypes=("fp32",),
        gpu=True,
    ),
    "onnxruntime-tensorrt-rtx": Backend(
        module="medseg_trt.sessions.onnxruntime_gpu",
        function="open_tensorrt_rtx",
        package="onnxruntime_ep_nv_tensorrt_rtx",
        extra="onnxruntime-rtx",
        dialects=("canonical",),
        compute_dtypes=("fp32",),
        gpu=True,
    ),
    "tensorrt": Backend(
        module="medseg_trt.sessions.tensorrt",
        function="open_engine",
        package="tensorrt",
        extra="tensorrt",
        dialects=("canonical", "plain"),
        compute_dtypes=("fp32",),
        gpu=True,
        engines=True,
    ),
    "tensorrt-rtx": Backend(
        module="medseg_trt.sessions.tensorrt",
        function="open_engine",
        package="tensorrt_rtx",
        extra="tensorrt-rtx",
        dialects=("canonical",),
        compute_dtypes=("fp32",),
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
