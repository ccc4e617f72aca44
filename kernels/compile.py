"""Compile a kernel to PTX with NVRTC from NVIDIA's Python wheels; neither a GPU nor a CUDA installation is needed.

``--fmad=false`` forbids the contraction of products and sums. PTX then contains ``mul.rn`` and ``add.rn``, which ptxas
must not contract either, so a CPU that executes the PTX rounds as a GPU does.
Source: NVIDIA, "NVRTC" and "PTX ISA" (rounding modifiers of ``add`` and ``mul``).
"""

import ctypes
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

from medseg_trt.errors import MedsegError, MissingExtraError
from medseg_trt.kernels.compile_cache import cached
from medseg_trt.kernels.kernel import Entry, Kernel

OPTIONS = ("--std=c++17", "--fmad=false")


@dataclass(frozen=True, kw_only=True, slots=True)
class Toolchain:
    """The Python wheels of a CUDA release."""

    extra: str  # of pyproject.toml
    compiler: tuple[str, str]  # distribution, file in it
    assembler: tuple[str, str]
    headers: tuple[tuple[str, str], ...]  # distribution, a file that locates its headers


TOOLCHAINS: Mapping[str, Toolchain] = {  # by CUDA release
    "13.0": Toolchain(  # PTX 9.0: drivers 580 and newer
        extra="kernels",
        compiler=("nvidia-cuda-nvrtc", "nvidia/cu13/lib/libnvrtc.so.13"),
        assembler=("nvidia-cuda-nvcc", "nvidia/cu13/bin/ptxas"),
        headers=(
            ("nvidia-cuda-runtime", "nvidia/cu13/include/cuda_fp16.h"),
            ("nvidia-cuda-crt", "nvidia/cu13/include/crt"),
            ("nvidia-cuda-cccl", "nvidia/cu13/include/nv"),
        ),
    ),
    "12.6": Toolchain(  # PTX 8.5: the driver of JetPack 6
        extra="jetpack6",
        compiler=("nvidia-cuda-nvrtc-cu12", "nvidia/cuda_nvrtc/lib/libnvrtc.so.12"),
        assembler=("nvidia-cuda-nvcc-cu12", "nvidia/cuda_nvcc/bin/ptxas"),
        headers=(
            ("nvidia-cuda-runtime-cu12", "nvidia/cuda_runtime/include/cuda_fp16.h"),
            ("nvidia-cuda-nvcc-cu12", "nvidia/cuda_nvcc/include/crt"),
            ("nvidia-cuda-cccl-cu12", "nvidia/cuda_cccl/include/nv"),
        ),
    ),
}
DEFAULT = "13.0"  # a key of TOOLCHAINS


def compile_ptx(kernel: Kernel, entry: Entry, arch: str = "compute_80", toolchain: str = DEFAULT) -> str:
    """Return the PTX of one entry, from the user's cache if the same source was compiled before.

    Args:
        kernel: has the source.
        entry: has the ``-D`` options that select the function.
        arch: the virtual architecture, ``compute_80`` … ``compute_120``.
        toolchain: a key of ``TOOLCHAINS``.

    Raises:
        MissingExtraError: a wheel of the toolchain is not installed.
        MedsegError: the source does not compile; the compiler's log is attached as a note.
    """
    tools = TOOLCHAINS[toolchain]
    options = (*OPTIONS, f"--gpu-architecture={arch}", *(f"-D{name}={value}" for name, value in entry.defines.items()))
    key = {
        "sources": sources(kernel.source),
        "options": options,
        "compiler": compiler_version(toolchain),
        "headers": {name: version(name) for name, _ in tools.headers},
    }
    return cached(key, lambda: _compile(kernel, entry, options, toolchain))


def sources(path: Path) -> dict[str, str]:
    """Return the text of a ``.cu`` file and of every local file that it includes, directly or not, by file name."""
    texts: dict[str, str] = {}
    waiting = [path]
    while waiting:
        text = (file := waiting.pop()).read_text(encoding="utf-8")
        texts[file.name] = text
        included = re.findall(r'^\s*#\s*include\s+"([^"]+)"', text, flags=re.MULTILINE)
        waiting += [file.parent / name for name in included if name not in texts]
    return dict(sorted(texts.items()))


def compiler_version(toolchain: str) -> str:
    """Return the versions of NVRTC and of its wheel, for example ``"NVRTC 13.0 (13.0.88)"``."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(_nvrtc(toolchain), "nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
    return f"NVRTC {major.value}.{minor.value} ({version(TOOLCHAINS[toolchain].compiler[0])})"


def wheel_file(name: str, file: str, extra: str) -> Path:
    """Return the path of a file that a wheel installed.

    Raises:
        MissingExtraError: the wheel is not installed, or has no such file on this platform.
    """
    try:
        path = Path(str(distribution(name).locate_file(file)))
    except PackageNotFoundError:
        path = None
    if path is None or not path.exists():
        raise MissingExtraError(f"{name} is not installed. Install it: pip install 'medseg-trt[{extra}]' (Linux only)")
    return path


def _compile(kernel: Kernel, entry: Entry, options: tuple[str, ...], toolchain: str) -> str:
    library = _nvrtc(toolchain)
    tools = TOOLCHAINS[toolchain]
    folders = [kernel.source.parent, *(wheel_file(*header, tools.extra).parent for header in tools.headers)]
    all_options = [*options, *(f"--include-path={folder}" for folder in dict.fromkeys(folders))]
    program = ctypes.c_void_p()
    text = kernel.source.read_bytes()
    _check(library, "nvrtcCreateProgram", ctypes.byref(program), text, kernel.source.name.encode(), 0, None, None)
    try:
        encoded = (ctypes.c_char_p * len(all_options))(*(option.encode() for option in all_options))
        status = library.nvrtcCompileProgram(program, len(all_options), encoded)
        if status:
            log = _text(library, program, "nvrtcGetProgramLog")
            first = next((line for line in log.splitlines() if "error" in line), _message(library, status))
            error = MedsegError(f"{kernel.source.name} does not compile as {entry.name}: {first}")
            error.add_note(log)
            raise error
        return _text(library, program, "nvrtcGetPTX")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


@cache
def _nvrtc(toolchain: str) -> ctypes.CDLL:
    tools = TOOLCHAINS[toolchain]
    path = wheel_file(*tools.compiler, tools.extra)
    for builtins in path.parent.glob("libnvrtc-builtins.so.*"):  # NVRTC does not search its own folder for them
        ctypes.CDLL(str(builtins))
    library = ctypes.CDLL(str(path))
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    return library


def _text(library: ctypes.CDLL, program: ctypes.c_void_p, function: str) -> str:
    size = ctypes.c_size_t()
    _check(library, f"{function}Size", program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    _check(library, function, program, buffer)
    return buffer.value.decode()


def _check(library: ctypes.CDLL, function: str, *arguments: object) -> None:
    if status := getattr(library, function)(*arguments):
        raise MedsegError(f"{function}: {_message(library, status)}")


def _message(library: ctypes.CDLL, status: int) -> str:
    return library.nvrtcGetErrorString(status).decode()
