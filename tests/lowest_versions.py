"""Which tests exercise each dependency of pyproject.toml: what ``make test-lowest`` runs with its lowest version.

``python tests/lowest_versions.py`` prints the files, and with ``requirements`` a file of requirements for uv. There,
the tested version of PyTorch stays, because PyPI's releases are built for CUDA and take gigabytes; ``requirements
lowest`` asks for the lowest all the same.
"""

import re
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path

TESTS = Path(__file__).parent
EXTRAS = ("cpu", "openvino", "medical", "train", "export", "kernels", "report", "sign", "serve")  # what needs no GPU
TOOLS = ("ruff", "pyright", "nodejs")  # of the group dev: no test imports them
EXERCISED_BY: Mapping[str, tuple[str, ...]] = {  # dependency -> names of test modules, wherever they lie
    "accelerate": ("test_processes",),
    "beartype": ("test_spec",),
    "build": ("test_wheel",),
    "click": ("test_cli", "test_help"),
    "connected-components-3d": ("test_apply",),
    "cryptography": ("test_signature",),
    "cuda-bindings": ("test_device",),
    "dicomweb-client": ("test_dicomweb",),
    "einops": ("test_external",),
    "filelock": ("test_once",),
    "gguf": ("test_gguf_file",),
    "h5py": ("test_arrays", "test_official"),
    "highdicom": ("test_dicom_seg",),
    "hypothesis": ("test_overlap",),
    "jaxtyping": ("test_spec",),
    "jinja2": ("test_report",),
    "matplotlib": ("test_curve", "test_report"),
    "medpy": ("test_hausdorff",),
    "ml_dtypes": ("test_weight_only",),
    "monai": ("test_hausdorff",),
    "networkx": ("test_pictures",),
    "nibabel": ("test_formats", "test_images"),
    "numpy": ("test_arrays", "test_preprocess"),
    "onnx": ("test_save", "test_fuse"),
    "onnx-ir": ("test_half", "test_quantize"),
    "onnxruntime": ("test_open", "test_pipeline"),
    "onnxscript": ("test_dialects",),
    "openvino": ("test_openvino",),
    "pillow": ("test_images_2d", "test_overlay"),
    "playwright": ("test_page",),
    "prometheus-client": ("test_operations",),
    "pydantic": ("test_spec", "test_bundle"),
    "pydicom": ("test_dicom",),
    "pylibjpeg": ("test_dicom",),
    "pylibjpeg-openjpeg": ("test_dicom",),
    "pynetdicom": ("test_dicom_node",),
    "pynrrd": ("test_nrrd",),
    "pytest": ("test_spec",),
    "pytest-xdist": ("test_spec",),
    "rich": ("test_progress",),
    "safetensors": ("test_blocks",),
    "schemathesis": ("test_malformed",),
    "scikit-learn": ("test_overlap", "test_splits"),
    "scipy": ("test_hausdorff", "test_intervals", "test_augment"),
    "setuptools": ("test_wheel",),
    "simplejpeg": ("test_images_2d",),
    "simpleitk": ("test_qform",),
    "tifffile": ("test_tiff",),
    "starlette": ("test_protocol_v2",),
    "torch": ("test_model", "test_losses"),
    "tritonclient": ("test_protocol_v2",),
    "uvicorn": ("test_protocol_v2",),
    "transformers": ("test_llama", "test_layer_readers"),
}


def requirements(torch: str = "tested") -> list[str]:
    """Return what ``make test-lowest`` installs: the project with its extras, and the group dev without its tools."""
    data = tomllib.loads((TESTS.parent / "pyproject.toml").read_text(encoding="utf-8"))
    groups = data["dependency-groups"]
    lines = [*groups["gpu-check"], *(line for line in groups["dev"] if isinstance(line, str))]  # dev includes gpu-check
    dev = [line for line in lines if name_of(line) not in TOOLS]
    versions = (TESTS / "constraints.txt").read_text(encoding="utf-8").splitlines()
    tested = [line for line in versions if name_of(line) == "torch"] if torch == "tested" else []
    return [f"--editable .[{','.join(EXTRAS)}]", *tested, *dev]


def name_of(requirement: str) -> str:
    """Return the package's name at the start of a requirement."""
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0]


def dependencies() -> set[str]:
    """Return the names of all packages that these requirements name, but for NVIDIA's compilers, which are pinned."""
    data = tomllib.loads((TESTS.parent / "pyproject.toml").read_text(encoding="utf-8"))
    extras = data["project"]["optional-dependencies"]
    lines = [*data["project"]["dependencies"], *(line for extra in EXTRAS for line in extras[extra])]
    return {name_of(line) for line in [*lines, *requirements()[1:]] if not line.startswith("nvidia-")}


def files(module: str) -> list[Path]:
    """Return the test files of that name."""
    return sorted(path.relative_to(TESTS.parent) for path in TESTS.rglob(f"{module}.py"))


def main() -> None:
    """Print the requirements or the test files, one a line."""
    if sys.argv[1:2] == ["requirements"]:
        print("\n".join(requirements(*sys.argv[2:])))
    else:
        modules = sorted({module for modules in EXERCISED_BY.values() for module in modules})
        print("\n".join(str(path) for module in modules for path in files(module)))


if __name__ == "__main__":
    main()
