"""Compile a kernel's ``.cu`` with g++ under sanitizers, and run it on NumPy arrays in a process of its own.

The source is the one that NVRTC compiles; ``cuda_host.h`` supplies CUDA's words. A program holds one entry and one
set of sanitizers. It runs any number of cases and answers with the outputs, or ends at the first finding.
Source: GCC, "Program Instrumentation Options"; LLVM, "AddressSanitizer", "ThreadSanitizer" (fibre annotations).
"""

import atexit
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

from medseg_trt.errors import MissingExtraError
from medseg_trt.kernels.compile import DEFAULT, TOOLCHAINS, sources, wheel_file
from medseg_trt.kernels.kernel import DTYPES, Array, Entry, Kernel

HERE = Path(__file__).parent
RUNTIME = ("runtime", "serve")
FLAGS = (
    "-std=c++17",
    "-O1",
    "-g1",  # lines, for the findings
    "-ffp-contract=off",  # as NVRTC's --fmad=false
    "-fno-strict-aliasing",  # CUDA reads bytes through any type
    "-Wno-unknown-pragmas",
    "-Wno-attributes",
)
SANITIZERS: Mapping[str, tuple[str, ...]] = {
    "address": (
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        "-fsanitize-sections=block_shared",  # shared memory has a section of its own; it is guarded all the same
    ),
    "thread": ("-fsanitize=thread",),
}
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:color=never",  # nothing is leaked on purpose, and it needs ptrace
    "UBSAN_OPTIONS": "print_stacktrace=0:color=never",
    "TSAN_OPTIONS": "halt_on_error=1:color=never",
}
FINDINGS: Mapping[str, str] = {  # what a program prints, and the name of the check that it belongs to
    r"host check: (.*)": "host check",
    r"ERROR: AddressSanitizer: (.*)": "AddressSanitizer",
    r"runtime error: (.*)": "UndefinedBehaviorSanitizer",
    r"WARNING: ThreadSanitizer: (.*)": "ThreadSanitizer",
}
FORWARD, BACKWARD, SHUFFLED = ORDERS = (0, 1, 2023)  # of lanes, warps and blocks; from 2 on a seed
FILLS: Mapping[int, int] = {FORWARD: 0xFF, BACKWARD: 0x00, SHUFFLED: 0x55}  # an output never written differs by order
LONGEST_S = 120.0
_SCALAR, _INPUT, _OUTPUT = range(3)


class Finding(Exception):  # noqa: N818  an answer, not an accident
    """A sanitizer or a check of the host build ended the program.

    Attributes:
        check: which, for example ``"AddressSanitizer"``.
    """

    def __init__(self, check: str, text: str) -> None:
        self.check = check
        super().__init__(f"{check}: {text}")


class CompileError(Exception):
    """g++ refuses the source: nothing was checked, so this is no finding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One launch: input arrays and scalars by parameter name.

    ``offsets`` moves an array, also of outputs, so many bytes past the 256-byte boundary that ``cudaMalloc`` gives.
    """

    inputs: Mapping[str, Array]
    scalars: Mapping[str, int]
    offsets: Mapping[str, int] = field(default_factory=dict)


@cache
def missing() -> str:
    """Return why the host build cannot be made here; "" where it can."""
    compiler = shutil.which("g++")
    if compiler is None:
        return "the host build needs g++"
    for options in SANITIZERS.values():
        command = [compiler, "-x", "c++", "-", "-o", os.devnull, *options]
        tried = subprocess.run(command, input="int main() {}", text=True, capture_output=True)
        if tried.returncode:
            return f"the host build needs g++ with {options[0]}: {tried.stderr.strip().splitlines()[-1]}"
    try:
        _headers()
    except MissingExtraError as error:
        return str(error)
    return ""


class Builder:
    """Compile programs into a folder; what they have in common is compiled once for each set of sanitizers."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def program(self, kernel: Kernel, entry: Entry, sanitizer: str) -> Path:
        """Compile one entry, unless that was done before, and return the program.

        Raises:
            CompileError: g++ refuses the source.
        """
        digest = hashlib.sha256("".join(sources(kernel.source).values()).encode()).hexdigest()[:16]
        program = self._folder / sanitizer / f"{entry.name}-{digest}"
        if program.exists():
            return program
        common = self._common(sanitizer)
        lines = ['#include "cuda_host.h"', *(f"#define {name} {value}" for name, value in entry.defines.items())]
        lines += [
            f'#include "{kernel.source}"',
            f"int main() {{ return fibres::serve_kernel<&{entry.symbol}>(&{entry.symbol}); }}",
        ]
        _compile([*SANITIZERS[sanitizer], "-x", "c++", "-", *common, "-o", str(program)], "\n".join(lines))
        return program

    def _common(self, sanitizer: str) -> list[str]:
        """Return the options that use the header and the runtime, compiled on the first call."""
        folder = self._folder / sanitizer
        objects = [folder / f"{name}.o" for name in RUNTIME]
        if not folder.exists():
            folder.mkdir(parents=True)
            header = ["-x", "c++-header", str(HERE / "cuda_host.h"), "-o", str(folder / "cuda_host.h.gch")]
            _compile([*SANITIZERS[sanitizer], *header])
            for name, file in zip(RUNTIME, objects, strict=True):
                _compile([f"-DSANITIZER_{sanitizer.upper()}", "-c", str(HERE / f"{name}.cpp"), "-o", str(file)])
        return [f"-I{folder}", "-x", "none", *map(str, objects)]


@cache
def shared_builder() -> Builder:
    """Return one for the whole process; its folder is gone when the process is."""
    folder = tempfile.mkdtemp(prefix="medseg-host-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Builder(Path(folder))


def _compile(options: Sequence[str], text: str = "") -> None:
    command = ["g++", *FLAGS, *options, f"-I{HERE}", *_headers()]
    done = subprocess.run(command, input=text, text=True, capture_output=True)
    if done.returncode:
        raise CompileError(next((line for line in done.stderr.splitlines() if "error" in line), done.stderr))


def run(
    program: Path, kernel: Kernel, entry: Entry, cases: Sequence[Case], orders: Sequence[int] = ORDERS
) -> list[list[dict[str, Array]]]:
    """Run every case in every order, all in one process, and return the outputs by name: a list of cases an order.

    Args:
        program: what ``Builder.program`` returned.
        kernel: gives the launch shape.
        entry: gives the order and types of the arguments.
        cases: the launches.
        orders: which thread, warp and block goes first: some of ``ORDERS``, or other seeds.

    Raises:
        Finding: the program ended before it answered.
    """
    launches = [(order, case) for order in orders for case in cases]
    request = b"".join([_numbers(len(launches)), *(_request(kernel, entry, case, order) for order, case in launches)])
    command = [*_steady(), str(program)]
    try:
        done = subprocess.run(command, input=request, capture_output=True, env=os.environ | OPTIONS, timeout=LONGEST_S)
    except subprocess.TimeoutExpired:
        raise Finding("time", f"no answer in {LONGEST_S:g} s") from None
    if done.returncode:
        raise _finding(done.stderr.decode(errors="replace"), done.returncode)
    outputs = list(_split(done.stdout, kernel, entry, [case for _, case in launches]))
    return [outputs[start : start + len(cases)] for start in range(0, len(outputs), len(cases))]


def _request(kernel: Kernel, entry: Entry, case: Case, order: int) -> bytes:
    fill = FILLS.get(order, FILLS[SHUFFLED])
    parts = [_numbers(*kernel.grid(case.scalars), *kernel.block, order, len(entry.parameters))]
    shapes = kernel.shapes(case.scalars, entry)
    for parameter in entry.parameters:
        if parameter.kind == "int32":
            parts.append(_numbers(_SCALAR, 0, 4) + np.int32(case.scalars[parameter.name]).tobytes())
            continue
        if parameter.direction == "in":
            role, data = _INPUT, np.ascontiguousarray(case.inputs[parameter.name]).tobytes()
        else:
            size = int(np.prod(shapes[parameter.name])) * DTYPES[parameter.dtype].itemsize
            role, data = _OUTPUT, bytes([fill]) * size
        parts += [_numbers(role, case.offsets.get(parameter.name, 0), len(data)), data]
    return b"".join(parts)


def _split(output: bytes, kernel: Kernel, entry: Entry, cases: Sequence[Case]) -> Iterator[dict[str, Array]]:
    start = 0
    for case in cases:
        shapes = kernel.shapes(case.scalars, entry)
        outputs: dict[str, Array] = {}
        for parameter in entry.parameters:
            if parameter.direction == "out":
                shape, dtype = shapes[parameter.name], DTYPES[parameter.dtype]
                outputs[parameter.name] = np.frombuffer(output, dtype, int(np.prod(shape)), start).reshape(shape)
                start += outputs[parameter.name].nbytes
        yield outputs


def _finding(report: str, status: int) -> Finding:
    report = re.sub(r"[^\s(]*/([\w.]+:\d+)", r"\1", report)  # files by their names
    for pattern, check in FINDINGS.items():
        if match := re.search(pattern, report):
            text = re.sub(r" on address 0x.*| \(pid=\d+\)|, which requires.*", "", match[1]).strip()
            source_line = re.search(r"[\w.]+\.cuh?:\d+", report)  # the first is where it happened
            return Finding(check, f"{text}, {source_line[0]}" if source_line and source_line[0] not in text else text)
    return Finding("exit", f"status {status}: {report.strip()[-300:]}")


def _numbers(*values: int) -> bytes:
    return np.array(values, np.int64).tobytes()


@cache
def _headers() -> tuple[str, ...]:
    tools = TOOLCHAINS[DEFAULT]
    folders = dict.fromkeys(wheel_file(*header, tools.extra).parent for header in tools.headers)
    return tuple(part for folder in folders for part in ("-isystem", str(folder)))


@cache
def _steady() -> tuple[str, ...]:
    """Turn off address randomisation: ThreadSanitizer of GCC 12 does not know all addresses that newer Linux draws."""
    setarch = shutil.which("setarch")
    command = (setarch, "-R") if setarch else ()
    return command if command and subprocess.run([*command, "true"], capture_output=True).returncode == 0 else ()
