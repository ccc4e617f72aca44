"""Build one shared library of TensorRT plugins from the kernels, which needs neither Python nor the CUDA runtime.

Compile it on the target machine, or for the same operating system and processor. TensorRT's headers are in the TensorRT
archive and in Debian packages, not in the Python wheels; CUDA's headers come from the wheels of the extra ``kernels``.
Source: TensorRT, "Building and loading a plugin library".
"""

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from medseg_trt.errors import MedsegError, MissingExtraError, UsageError
from medseg_trt.files import atomic_file
from medseg_trt.kernels.compile import DEFAULT, TOOLCHAINS, compile_ptx, wheel_file
from medseg_trt.kernels.kernel import Entry
from medseg_trt.kernels.library import TARGETS, Target
from medseg_trt.kernels.nodes import NAMESPACE, NODES, VERSION, Node

INCLUDE = "MEDSEG_TENSORRT_INCLUDE"  # environment variable with the folder of TensorRT's headers
SOURCE = Path(__file__).with_name("plugin.cpp")
TABLE = "plugin_table.h"
OPTIONS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-Wl,--build-id=none")
TYPES: Mapping[str, str] = {"float16": "kHALF", "bfloat16": "kBF16", "float32": "kFLOAT", "int8": "kINT8"}
FIELDS: Mapping[str, str] = {"float32": "kFLOAT32", "int32": "kINT32"}
LONGEST = 60000  # bytes of a string literal; the C++ standard guarantees 65536


@dataclass(frozen=True, kw_only=True, slots=True)
class CompiledFunction:
    """One function of a node for one target."""

    node: Node
    entry: Entry
    target: Target

    @property
    def ptx(self) -> str:
        """Compile the function, or read its PTX from the cache."""
        return compile_ptx(self.node.kernel, self.entry, self.target.virtual, self.target.toolchain)

    @property
    def array_name(self) -> str:
        """Return the name of the C++ array that holds the PTX."""
        return f"ptx_{self.entry.name}_{self.target.capability}_{_oldest_cuda(self.target)}"


def _named_ptx(function: CompiledFunction) -> tuple[str, str]:
    return function.array_name, function.ptx


def build_library(path: Path, targets: Iterable[str] = TARGETS, include: Path | None = None) -> str:
    """Compile every plugin with its PTX into a shared library, and return the SHA-256 of the file.

    The same sources and compilers give the same bytes.

    Args:
        path: of the library; an existing file is replaced.
        targets: keys of ``library.TARGETS``; a device uses the newest one that it supports.
        include: the folder with ``NvInferRuntime.h`` (10.0 and newer); by default that of ``MEDSEG_TENSORRT_INCLUDE``.

    Raises:
        UsageError: a target is unknown, or the folder lacks the header.
        MissingExtraError: g++ is missing, or a wheel with CUDA's headers or compiler is not installed.
        MedsegError: it does not compile.
    """
    chosen = list(dict.fromkeys(targets))
    if unknown := [name for name in chosen if name not in TARGETS]:
        raise UsageError(f"there is no architecture {', '.join(unknown)}; choose from: {', '.join(TARGETS)}")
    headers = [_tensorrt_headers(include), *_cuda_headers()]
    compiler = shutil.which("g++")
    if compiler is None:
        raise MissingExtraError("there is no g++ to compile the plugins. Install it: apt install g++")
    with tempfile.TemporaryDirectory() as folder, atomic_file(path) as temporary:
        Path(folder, TABLE).write_text(table(chosen), encoding="utf-8")
        shutil.copyfile(SOURCE, Path(folder, SOURCE.name))
        flags = [*OPTIONS, f"-I{folder}", *(f"-isystem{header}" for header in headers)]
        command = [compiler, *flags, SOURCE.name, "-o", str(temporary.absolute()), "-ldl", "-lpthread"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
            error = MedsegError(f"{SOURCE.name} does not compile with the headers in {headers[0]}: {first}")
            error.add_note(done.stderr)
            raise error
    return hashlib.sha256(path.read_bytes()).hexdigest()


def table(targets: Iterable[str]) -> str:
    """Return the header that ``plugin.cpp`` includes: every node with its functions for every target.

    Raises:
        MissingExtraError: a wheel with a CUDA compiler is not installed.
        MedsegError: a kernel does not compile.
    """
    functions = [
        CompiledFunction(node=node, entry=entry, target=TARGETS[name])
        for node in NODES.values()
        for _, entries in choices(node)
        for entry in entries.values()
        for name in sorted(targets, key=_order, reverse=True)
        if TARGETS[name].capability >= entry.min_arch
    ]
    with ThreadPoolExecutor(max_workers=2) as pool:
        texts = dict(pool.map(_named_ptx, functions))
    arrays = [f"const char {name}[] =\n{_literal(text)};" for name, text in texts.items()]
    rows = ",\n".join(_description(node, functions) for node in NODES.values())
    head = f'const char NAMESPACE[] = "{NAMESPACE}", VERSION[] = "{VERSION}";'
    return "\n".join(("#pragma once", head, *arrays, f"const std::vector<Description> TABLE = {{\n{rows}}};", ""))


def choices(node: Node) -> Iterator[tuple[int, dict[str, Entry]]]:
    """Yield the functions of a node for every value of the attribute that selects them; 0 without such an attribute."""
    zeros = dict.fromkeys(node.attributes, 0)
    names = list(node.choices)
    for values in product(*(range(len(words)) for words in node.choices.values())):
        yield sum(values), node.entries({**zeros, **dict(zip(names, values, strict=True))})


def _order(name: str) -> tuple[int, int]:
    return TARGETS[name].capability, _oldest_cuda(TARGETS[name])


def _oldest_cuda(target: Target) -> int:
    """Return the oldest CUDA version whose driver accepts a target's PTX, in the driver's encoding: 12060 is 12.6."""
    major, minor = target.toolchain.split(".")
    return 1000 * int(major) + 10 * int(minor)


def _literal(text: str) -> str:
    pieces = (text[start : start + LONGEST] for start in range(0, len(text), LONGEST))
    return "\n".join(f'R"PTX({piece})PTX"' for piece in pieces)


def _description(node: Node, compiled: Sequence[CompiledFunction]) -> str:
    kernel = node.kernel
    grid = kernel.grid_rule.strip("()").split(",")[0].split(" * ")  # "(batch * tokens, 1, 1)"
    attributes = (
        f'{{"{name}", PluginFieldType::{FIELDS[kind]}, {str(name in node.choices).lower()}}}'
        for name, kind in node.attributes.items()
    )
    functions = (
        _function(node, choice, entry, compiled) for choice, entries in choices(node) for entry in entries.values()
    )
    return (
        f'{{"{node.name}", Rule::{node.rule}, {kernel.block[0]}, {{{_joined(_quoted(grid))}}}, '
        f"{{{_joined(attributes)}}},\n {{{_joined(functions)}}}}}"
    )


def _function(node: Node, choice: int, entry: Entry, compiled: Sequence[CompiledFunction]) -> str:
    parameters = (
        f'{{"{parameter.name}", {str(parameter.kind == "pointer").lower()}, '
        f"{str(parameter.direction == 'out').lower()}, DataType::{TYPES.get(parameter.dtype, 'kINT32')}}}"
        for parameter in entry.parameters
    )
    texts = (
        f"{{{function.target.capability}, {_oldest_cuda(function.target)}, {function.array_name}}}"
        for function in compiled
        if function.node is node and function.entry is entry
    )
    return (
        f'{{DataType::{TYPES[entry.dtype]}, {choice}, "{entry.symbol}",\n  {{{_joined(parameters)}}},\n'
        f"  {{{_joined(texts)}}}}}"
    )


def _quoted(words: Iterable[str]) -> Iterator[str]:
    return (f'"{word.strip()}"' for word in words)


def _joined(parts: Iterable[str]) -> str:
    return ", ".join(parts)


def _tensorrt_headers(include: Path | None) -> Path:
    folder = include or (Path(os.environ[INCLUDE]) if os.environ.get(INCLUDE) else None)
    if folder is None:
        raise UsageError(
            f"set the folder of TensorRT's headers: {INCLUDE}=/usr/include/x86_64-linux-gnu (see kernels/README.md)"
        )
    if not (folder / "NvInferRuntime.h").is_file():
        raise UsageError(f"{folder} has no NvInferRuntime.h; set {INCLUDE} to the folder that has it")
    return folder.absolute()


def _cuda_headers() -> list[Path]:
    tools = TOOLCHAINS[DEFAULT]
    return list(dict.fromkeys(wheel_file(*header, tools.extra).parent for header in tools.headers))
