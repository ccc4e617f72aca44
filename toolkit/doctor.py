"""Report what this machine can run, and the commands that install the rest."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version

from medseg_trt.gpu import listed_gpus
from medseg_trt.pytorch_build import INSTALL, pytorch_build


@dataclass(frozen=True, kw_only=True, slots=True)
class Ability:
    """Something that needs packages."""

    modules: Mapping[str, str]  # module to import, and the package that holds it
    extra: str  # of medseg-trt, which installs them
    # Packages that are looked up by name, because they share a namespace or hold no module.
    wheels: tuple[str, ...] = ()

    @property
    def packages(self) -> tuple[str, ...]:
        """All packages it needs."""
        return (*self.modules.values(), *self.wheels)


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """Whether this machine has an ability."""

    ability: str
    ready: bool
    detail: str  # versions, or the command that installs what is missing


TRAIN = "train"
ABILITIES: Mapping[str, Ability] = {
    "infer on the CPU with ONNX Runtime": Ability(modules={"onnxruntime": "onnxruntime"}, extra="cpu"),
    "infer on the CPU with OpenVINO": Ability(modules={"openvino": "openvino"}, extra="openvino"),
    "infer on an NVIDIA GPU with TensorRT-RTX": Ability(
        modules={"tensorrt_rtx": "tensorrt-rtx-cu13", "ml_dtypes": "ml_dtypes"},
        wheels=("cuda-bindings",),
        extra="tensorrt-rtx",
    ),
    "infer on an NVIDIA GPU with ONNX Runtime": Ability(modules={}, wheels=("onnxruntime-gpu",), extra="gpu"),
    "sign bundles and verify them": Ability(modules={"cryptography": "cryptography"}, extra="sign"),
    "read NIfTI volumes": Ability(modules={"nibabel": "nibabel"}, extra="medical"),
    TRAIN: Ability(
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
        modules={"tensorrt_rtx": "tensorrt-rtx-cu13"}, wheels=("cuda-bindings",), extra="tensorrt-rtx"
    ),
    "compile CUDA kernels": Ability(
        modules={"ml_dtypes": "ml_dtypes"},
        wheels=("nvidia-cuda-nvrtc", "nvidia-cuda-nvcc", "nvidia-cuda-runtime", "nvidia-cuda-crt", "nvidia-cuda-cccl"),
        extra="kernels",
    ),
    "measure HD95": Ability(modules={"scipy": "scipy"}, extra="report"),
}


def examine() -> list[Finding]:
    """Look for every ability, without importing any of its packages, and for an NVIDIA driver."""
    findings = [_examine(name, ability) for name, ability in ABILITIES.items()]
    gpus = listed_gpus()
    if gpus.count:
        findings = [_on_a_gpu(finding) if finding.ability == TRAIN else finding for finding in findings]
    return [*findings, Finding(ability="an NVIDIA GPU", ready=gpus.count > 0, detail=gpus.words)]


def _examine(name: str, ability: Ability) -> Finding:
    missing = [package for module, package in ability.modules.items() if importlib.util.find_spec(module) is None]
    missing += [package for package in ability.wheels if _version(package) is None]
    if missing:
        detail = f"{', '.join(missing)} missing; install: pip install 'medseg-trt[{ability.extra}]'"
        return Finding(ability=name, ready=False, detail=detail)
    detail = ", ".join(f"{package} {_version(package) or ''}".strip() for package in ability.packages)
    return Finding(ability=name, ready=True, detail=detail)


def _version(package: str) -> str | None:
    """Return the installed version; None also if another package brings the module (onnxruntime-gpu: onnxruntime)."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _on_a_gpu(finding: Finding) -> Finding:
    """Say of a PyTorch that is built without CUDA that the machine's GPU does not train."""
    build = pytorch_build()
    if not finding.ready or build is None or build.cuda is not None:
        return finding
    return replace(
        finding, detail=f"{finding.detail}; on the CPU only, as this PyTorch is built without CUDA: {INSTALL}"
    )
