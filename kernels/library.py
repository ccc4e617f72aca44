"""Find the PTX for a device: in a folder that ``medseg-trt kernels build`` wrote, or compiled on the spot."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from medseg_trt.errors import ArtefactError, DeviceError
from medseg_trt.files import inside
from medseg_trt.kernels.compile import compile_ptx
from medseg_trt.kernels.kernel import Entry, Kernel

SCHEMA = 1
FILE = "manifest.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What PTX is made for."""

    capability: int  # 86 is sm_86
    toolchain: str = "13.0"  # a key of compile.TOOLCHAINS

    @property
    def virtual(self) -> str:
        """Return the architecture that NVRTC compiles for."""
        return f"compute_{self.capability}"

    @property
    def real(self) -> str:
        """Return the architecture whose registers are counted."""
        return f"sm_{self.capability}"


TARGETS: Mapping[str, Target] = {
    **{f"sm_{capability}": Target(capability=capability) for capability in (80, 86, 87, 89, 90, 120)},
    "jetpack6": Target(capability=87, toolchain="12.6"),
}

Release = tuple[int, int]  # of CUDA: (12, 6)
FindPtx = Callable[[Kernel, Entry, int, Release], str]  # kernel, entry, capability of the device, CUDA of its driver


def open_library(folder: Path) -> FindPtx:
    """Return what finds PTX in a folder that ``medseg-trt kernels build`` wrote.

    It takes what was built for the newest architecture that the device has and the newest CUDA that its driver knows,
    and raises ``ArtefactError`` where there is none, or it is damaged, or it takes other arguments than are passed.

    Raises:
        ArtefactError: the folder has no manifest that this version can read.
    """
    rows = _rows(folder)
    again = f"Build it again: medseg-trt kernels build -o {folder}"

    def find(kernel: Kernel, entry: Entry, capability: int, cuda: Release) -> str:
        built = {row["target"]: row for row in rows if row["entry"] == entry.symbol}
        row = built[_newest(list(built), entry, capability, cuda)]
        if row["parameters"] != [asdict(parameter) for parameter in entry.parameters]:
            raise ArtefactError(f"{folder} has another version of {kernel.name}. {again}")
        path = inside(folder, row["ptx"])
        content = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(content).hexdigest() != row["sha256"]:
            raise ArtefactError(f"{path} is damaged. {again}")
        return content.decode()

    return find


def compile_here(kernel: Kernel, entry: Entry, capability: int, cuda: Release) -> str:
    """Compile the PTX of a function for a device.

    Raises:
        DeviceError: the device or its driver is too old.
    """
    target = TARGETS[_newest(list(TARGETS), entry, capability, cuda)]
    return compile_ptx(kernel, entry, target.virtual, target.toolchain)


def _rows(folder: Path) -> list[dict[str, Any]]:
    try:
        manifest = json.loads((folder / FILE).read_text(encoding="utf-8"))
        schema, rows = manifest["schema"], manifest["kernels"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"{folder} holds no kernels. Build them: medseg-trt kernels build -o {folder}") from error
    if schema != SCHEMA:
        raise ArtefactError(f"{folder} is of schema {schema}, not {SCHEMA}. Build it again: medseg-trt kernels build")
    return rows


def _newest(targets: list[str], entry: Entry, capability: int, cuda: Release) -> str:
    def order(name: str) -> tuple[int, Release]:
        major, minor = TARGETS[name].toolchain.split(".")
        return TARGETS[name].capability, (int(major), int(minor))

    fitting = [
        name
        for name in targets
        if name in TARGETS and entry.min_arch <= TARGETS[name].capability <= capability and order(name)[1] <= cuda
    ]
    if not fitting:
        raise DeviceError(
            f"there is no {entry.name} for sm_{capability} with a driver for CUDA {cuda[0]}.{cuda[1]}; "
            f"see what there is: medseg-trt kernels build --help"
        )
    return max(fitting, key=order)
