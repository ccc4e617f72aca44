"""Build the kernels into one shared library of TensorRT plugins, which needs neither Python nor the CUDA runtime.

The library is compiled where it will run, or for the same operating system and processor. NVIDIA ships TensorRT's
headers with the TensorRT archive and Debian packages, not with the Python wheels; CUDA's come from the wheels of the
extra ``kernels``.
Source: TensorRT, "Building and loading a plugin library".
"""

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

from medseg_trt.errors import MedsegError, MissingExtraError, UsageError
from medseg_trt.files import atomic_file
from medseg_trt.kernels.compile import DEFAULT, TOOLCHAINS, compile_ptx, wheel_file
from medseg_trt.kernels.kernel import Entry
from medseg_trt.kernels.library import TARGETS, Target
from medseg_trt.kernels.nodes import NAMESPACE, NODES, VERSION, Node

INCLUDE = "MEDSEG_TENSORRT_INCLUDE"  # the environment variable that says where TensorRT's headers are
SOURCE = Path(__file__).with_name("plugin.cpp")
TABLE = "plugin_table.h"
OPTIONS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-Wl,--build-id=none")
TYPES: Mapping[str, str] = {"float16": "kHALF", "bfloat16": "kBF16", "float32": "kFLOAT", "int8": "kINT8"}
FIELDS: Mapping[str, str] = {"float32": "kFLOAT32", "int32": "kINT32"}
LONGEST = 60000  # bytes of a string literal; no compiler has to take more than 65536

Made = tuple[Node, int, Entry, Target]


def build_library(path: Path, targets: Iterable[str] = TARGETS, include: Path | None = None) -> str:
    """Compile every plugin with its PTX into a shared library, and return the SHA-256 of the file.

    The same sources and compilers give the same bytes.

    Args:
        path: of the library; replaced if it is there.
        targets: keys of ``library.TARGETS``; a device takes the best of them that it can.
        include: the folder with ``NvInferRuntime.h`` (10.0 and newer); by default that of ``MEDSEG_TENSORRT_INCLUDE``.

    Raises:
        UsageError: a target is unknown, or the folder has no such header.
        MissingExtraError: there is no g++, or a wheel with CUDA's headers or compiler is not installed.
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
    """Return the header that ``plugin.cpp`` includes: every node, with its functions for every target.

    Raises:
        MissingExtraError: a wheel with a CUDA compiler is not installed.
        MedsegError: a kernel does not compile.
    """
    made = [
        (node, choice, entry, TARGETS[name])
        for node in NODES.values()
        for choice, entries in choices(node)
        for entry in entries.values()
        for name in sorted(targets, key=_order, reverse=True)
        if TARGETS[name].capability >= entry.min_arch
    ]
    with ThreadPoolExecutor(max_workers=2) as pool:
        texts = dict(zip(map(_name, made), pool.map(_ptx, made), strict=True))
    arrays = [f"const char {name}[] =\n{_literal(text)};" for name, text in texts.items()]
    rows = ",\n".join(_description(node, made) for node in NODES.values())
    head = f'const char NAMESPACE[] = "{NAMESPACE}", VERSION[] = "{VERSION}";'
    return "\n".join(("#pragma once", head, *arrays, f"const std::vector<Description> TABLE = {{\n{rows}}};", ""))


def choices(node: Node) -> Iterator[tuple[int, dict[str, Entry]]]:
    """Yield the functions of a node for every value of the attribute that chooses between them; 0 if none does."""
    zeros = dict.fromkeys(node.attributes, 0)
    names = list(node.choices)
    for values in product(*(range(len(words)) for words in node.choices.values())):
        yield sum(values), node.entries({**zeros, **dict(zip(names, values, strict=True))})


def _order(name: str) -> tuple[int, int]:
    return TARGETS[name].capability, _cuda(TARGETS[name])


def _cuda(target: Target) -> int:
    """Return the oldest CUDA whose driver takes a target's PTX, as the driver says it: 12060 is 12.6."""
    major, minor = target.toolchain.split(".")
    return 1000 * int(major) + 10 * int(minor)


def _ptx(made: Made) -> str:
    node, _, entry, target = made
    return compile_ptx(node.kernel, entry, target.virtual, target.toolchain)


def _name(made: Made) -> str:
    _, _, entry, target = made
    return f"ptx_{entry.name}_{target.capability}_{_cuda(target)}"


def _literal(text: str) -> str:
    pieces = (text[start : start + LONGEST] for start in range(0, len(text), LONGEST))
    return "\n".join(f'R"PTX({piece})PTX"' for piece in pieces)


def _description(node: Node, made: list[Made]) -> str:
    kernel = node.kernel
    grid = kernel.grid_rule.strip("()").split(",")[0].split(" * ")  # "(batch * tokens, 1, 1)"
    attributes = (
        f'{{"{name}", PluginFieldType::{FIELDS[kind]}, {str(name in node.choices).lower()}}}'
        for name, kind in node.attributes.items()
    )
    functions = (_function(node, choice, entry, made) for choice, found in choices(node) for entry in found.values())
    return (
        f'{{"{node.name}", Rule::{node.rule}, {kernel.block[0]}, {{{_joined(_quoted(grid))}}}, '
        f"{{{_joined(attributes)}}},\n {{{_joined(functions)}}}}}"
    )


def _function(node: Node, choice: int, entry: Entry, made: list[Made]) -> str:
    parameters = (
        f'{{"{each.name}", {str(each.kind == "pointer").lower()}, {str(each.direction == "out").lower()}, '
        f"DataType::{TYPES.get(each.dtype, 'kINT32')}}}"
        for each in entry.parameters
    )
    texts = (
        f"{{{each[3].capability}, {_cuda(each[3])}, {_name(each)}}}"
        for each in made
        if each[0] is node and each[2] is entry
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
            f"say where TensorRT's headers are: {INCLUDE}=/usr/include/x86_64-linux-gnu (see kernels/README.md)"
        )
    if not (folder / "NvInferRuntime.h").is_file():
        raise UsageError(f"{folder} has no NvInferRuntime.h; set {INCLUDE} to the folder that has it")
    return folder.absolute()


def _cuda_headers() -> list[Path]:
    tools = TOOLCHAINS[DEFAULT]
    return list(dict.fromkeys(wheel_file(*each, tools.extra).parent for each in tools.headers))
