"""Say what this machine can run, and what to type to make it run the rest."""

import ctypes
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version


@dataclass(frozen=True, kw_only=True, slots=True)
class Ability:
    """Something that needs packages."""

    modules: Mapping[str, str]  # module to import, and the package that holds it
    extra: str  # of medseg-trt, which installs them


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """Whether this machine has an ability."""

    ability: str
    ready: bool
    detail: str  # versions, or the command that installs what is missing


ABILITIES: Mapping[str, Ability] = {
    "infer on the CPU with ONNX Runtime": Ability(modules={"onnxruntime": "onnxruntime"}, extra="cpu"),
    "infer on the CPU with OpenVINO": Ability(modules={"openvino": "openvino"}, extra="openvino"),
    "read NIfTI volumes": Ability(modules={"nibabel": "nibabel"}, extra="medical"),
    "train": Ability(
        modules={
            "torch": "torch",
            "safetensors": "safetensors",
            "gguf": "gguf",
            "scipy": "scipy",
            "matplotlib": "matplotlib",
        },
        extra="train",
    ),
    "build bundles": Ability(
        modules={"torch": "torch", "onnx": "onnx", "onnxscript": "onnxscript", "onnx_ir": "onnx-ir"}, extra="export"
    ),
    "build engines with TensorRT-RTX": Ability(
        modules={"tensorrt_rtx": "tensorrt-rtx-cu13", "cuda.bindings": "cuda-bindings"}, extra="tensorrt-rtx"
    ),
    "compile CUDA kernels": Ability(
        modules={
            "nvidia.cu13.lib": "nvidia-cuda-nvrtc",
            "nvidia.cu13.bin": "nvidia-cuda-nvcc",
            "nvidia.cu13.include": "nvidia-cuda-runtime",
            "ml_dtypes": "ml_dtypes",
        },
        extra="kernels",
    ),
    "measure HD95": Ability(modules={"scipy": "scipy"}, extra="report"),
}


def examine() -> list[Finding]:
    """Look for every ability, without importing any of its packages, and for an NVIDIA driver."""
    return [*(_examine(name, ability) for name, ability in ABILITIES.items()), _driver()]


def _examine(name: str, ability: Ability) -> Finding:
    missing = [package for module, package in ability.modules.items() if importlib.util.find_spec(module) is None]
    if missing:
        detail = f"{', '.join(missing)} missing; install: pip install 'medseg-trt[{ability.extra}]'"
        return Finding(ability=name, ready=False, detail=detail)
    return Finding(ability=name, ready=True, detail=", ".join(_versioned(each) for each in ability.modules.values()))


def _versioned(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:  # onnxruntime-gpu brings the module onnxruntime, too
        return package


def _driver() -> Finding:
    """Ask the driver itself: a PyTorch that was built for the CPU would not know."""
    name = "an NVIDIA GPU (used for training alone, so far)"
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Finding(ability=name, ready=False, detail="no NVIDIA driver is installed")
    count = ctypes.c_int(0)
    found = driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
    return Finding(ability=name, ready=found, detail=f"{count.value} device(s)" if found else "a driver, but no device")
