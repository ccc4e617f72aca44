"""Find the PTX for a device: in a folder written by ``medseg-trt kernels build``, or by compiling it."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from medseg_trt.errors import ArtefactError, DeviceError
from medseg_trt.files import inside
from medseg_trt.kernels.compile import compile_ptx
from medseg_trt.kernels.kernel import Entry, Kernel, Parameter
from medseg_trt.spec import from_dict

SCHEMA = 1
FILE = "manifest.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """An architecture and toolchain that PTX is compiled for."""

    capability: int  # 86 is sm_86
    toolchain: str = "13.0"  # a key of compile.TOOLCHAINS

    @property
    def virtual(self) -> str:
        """Return the architecture that NVRTC compiles for."""
        return f"compute_{self.capability}"

    @property
    def real(self) -> str:
        """Return the architecture that ptxas assembles for."""
        return f"sm_{self.capability}"


TARGETS: Mapping[str, Target] = {
    **{f"sm_{capability}": Target(capability=capability) for capability in (80, 86, 87, 89, 90, 120)},
    "jetpack6": Target(capability=87, toolchain="12.6"),
    "sm_75": Target(capability=75),  # of the kernels on images alone
}


@dataclass(frozen=True, kw_only=True, slots=True)
class BuiltFunction:
    """One function of a folder of kernels, with its PTX file and resources."""

    name: str  # of the kernel
    entry: str  # the name of the function in the PTX
    dtype: str
    target: str  # a key of TARGETS
    arch: str
    ptx: str  # relative path
    ptx_version: str
    cuda: str  # a key of compile.TOOLCHAINS
    sha256: str  # of the PTX
    parameters: tuple[Parameter, ...]
    block: tuple[int, int, int]  # threads
    grid: str  # blocks, as text
    shared_bytes: int  # dynamic
    static_shared_bytes: int
    registers: int  # per thread
    spills: int  # bytes
    max_width: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelManifest:
    """The content of ``manifest.json`` in a folder of kernels."""

    schema: int = SCHEMA
    compilers: Mapping[str, str]  # by CUDA release
    kernels: tuple[BuiltFunction, ...]


Release = tuple[int, int]  # of CUDA: (12, 6)
ReadFile = Callable[[str], bytes]  # the bytes of a file, by its name in the folder of the library
FindPtx = Callable[[Kernel, Entry, int, Release], str]  # kernel, entry, capability of the device, CUDA of its driver


def open_library(folder: Path, read: ReadFile | None = None) -> FindPtx:
    """Return a function that finds PTX in a folder written by ``medseg-trt kernels build``.

    It selects the newest architecture that the device supports and the newest CUDA that its driver supports. It raises
    ``ArtefactError`` if the PTX is missing, damaged, or declares other arguments than the kernel.

    Args:
        folder: of the library.
        read: returns the bytes of its files, for example after a comparison with a digest; None reads them as they are.

    Raises:
        ArtefactError: the folder has no manifest that this version can read.
    """
    read = read or (lambda name: _content(folder, name))
    functions = read_manifest(folder, read).kernels
    rebuild = f"Build it again: medseg-trt kernels build -o {folder}"

    def find(kernel: Kernel, entry: Entry, capability: int, cuda: Release) -> str:
        built = {function.target: function for function in functions if function.entry == entry.symbol}
        function = built[_newest(list(built), entry, capability, cuda)]
        if function.parameters != entry.parameters:
            raise ArtefactError(f"{folder} has another version of {kernel.name}. {rebuild}")
        content = read(function.ptx)
        if hashlib.sha256(content).hexdigest() != function.sha256:
            raise ArtefactError(f"{folder / function.ptx} is damaged. {rebuild}")
        return content.decode()

    return find


def compile_here(kernel: Kernel, entry: Entry, capability: int, cuda: Release) -> str:
    """Compile the PTX of a function for a device.

    Raises:
        DeviceError: the device or its driver is too old.
    """
    target = TARGETS[_newest(list(TARGETS), entry, capability, cuda)]
    return compile_ptx(kernel, entry, target.virtual, target.toolchain)


def _content(folder: Path, name: str) -> bytes:
    path = inside(folder, name)
    return path.read_bytes() if path.is_file() else b""


def read_manifest(folder: Path, read: ReadFile | None = None) -> KernelManifest:
    """Read the manifest of a folder of kernels.

    Args:
        folder: of the library.
        read: as in ``open_library``.

    Raises:
        ArtefactError: the manifest is missing, damaged or of another schema.
    """
    read = read or (lambda name: _content(folder, name))
    build = f"medseg-trt kernels build -o {folder}"
    try:
        content = json.loads(read(FILE).decode("utf-8"))
        schema = content["schema"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"{folder} holds no kernels. Build them: {build}") from error
    if schema != SCHEMA:
        raise ArtefactError(f"{folder} is of schema {schema}, not {SCHEMA}. Build it again: {build}")
    return from_dict(KernelManifest, content, f"{folder / FILE} is damaged, build it again: {build}")


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
