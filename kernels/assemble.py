"""Assemble PTX to SASS, the code that a GPU executes, and count registers, spills and opcodes.

ptxas and nvdisasm come from NVIDIA's wheels, as the compiler does.
"""

import hashlib
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from medseg_trt.errors import MedsegError
from medseg_trt.kernels.compile import DEFAULT, TOOLCHAINS, wheel_file
from medseg_trt.kernels.compile_cache import cached

DISASSEMBLER = "nvidia-cuda-nvdisasm", "nvidia/cu13/bin/nvdisasm", "kernels"
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """The resources of one function on one architecture."""

    registers: int  # per thread
    shared_bytes: int  # static, per block
    stack_bytes: int  # per thread, in local memory
    spill_bytes: int  # spill stores plus spill loads


def usage(ptx: str, arch: str, toolchain: str = DEFAULT) -> Usage:
    """Return the resources that ptxas reports for the function in ``ptx``.

    Args:
        ptx: a text that ``compile_ptx`` returned.
        arch: a real architecture, ``sm_80`` …; not older than the PTX's target.
        toolchain: a key of ``compile.TOOLCHAINS``.

    Raises:
        MissingExtraError: a wheel of the toolchain is not installed.
        MedsegError: ptxas fails.
    """
    ptxas = _assembler(toolchain)

    def make() -> str:
        with tempfile.TemporaryDirectory() as folder:
            return _assemble(ptxas, ptx, arch, Path(folder, "kernel.cubin"))

    report = cached(_usage_key(ptxas, ptx, arch), make)
    shared = re.search(r"(\d+) bytes smem", report)
    (registers,) = _numbers(r"Used (\d+) registers", report)
    stack, stores, loads = _numbers(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report
    )
    return Usage(
        registers=registers,
        shared_bytes=int(shared[1]) if shared else 0,
        stack_bytes=stack,
        spill_bytes=stores + loads,
    )


def opcodes(ptx: str, arch: str, toolchain: str = DEFAULT, *, fuse_multiply_add: bool = True) -> Mapping[str, int]:
    """Return the number of occurrences of every SASS opcode, with its modifiers: ``{"LDG.E.128": 2, …}``.

    ``fuse_multiply_add=False`` forbids ptxas to contract a product and a sum into one instruction where the PTX permits
    it. The other arguments, and the errors, are those of ``usage``.
    """
    ptxas, nvdisasm = _assembler(toolchain), wheel_file(*DISASSEMBLER)

    def make() -> str:
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder, "kernel.cubin")
            report = _assemble(ptxas, ptx, arch, cubin, f"--fmad={str(fuse_multiply_add).lower()}")
            if fuse_multiply_add:  # ptxas's default, so ``usage`` can use this report
                cached(_usage_key(ptxas, ptx, arch), lambda: report)
            listing = _run(nvdisasm, "--no-dataflow", str(cubin))
        return json.dumps(Counter(INSTRUCTION.findall(listing)), sort_keys=True)

    return json.loads(cached(["opcodes", ptx, arch, fuse_multiply_add, _digest(ptxas), _digest(nvdisasm)], make))


def count(opcode_counts: Mapping[str, int], name: str, *modifiers: str) -> int:
    """Return the number of opcodes with this name and all of these modifiers."""
    total = 0
    for opcode, occurrences in opcode_counts.items():
        first, *rest = opcode.split(".")
        total += occurrences if first == name and set(modifiers) <= set(rest) else 0
    return total


def _usage_key(ptxas: Path, ptx: str, arch: str) -> list[str]:
    return ["usage", ptx, arch, _digest(ptxas)]


def _assemble(ptxas: Path, ptx: str, arch: str, cubin: Path, *options: str) -> str:
    """Write the cubin and return ptxas's report."""
    source = cubin.with_suffix(".ptx")
    source.write_text(ptx, encoding="utf-8")
    return _run(ptxas, f"--gpu-name={arch}", "--verbose", *options, f"--output-file={cubin}", str(source))


def _numbers(pattern: str, report: str) -> list[int]:
    match = re.search(pattern, report)
    if match is None:
        raise MedsegError(f"the report of ptxas does not match {pattern!r}; it begins {report[:200]!r}")
    return [int(number) for number in match.groups()]


def _run(program: Path, *arguments: str) -> str:
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        message = (done.stderr or done.stdout).strip() or f"exit code {done.returncode}"
        raise MedsegError(f"{program.name} failed: {message.splitlines()[0]}")
    return done.stdout + done.stderr


def _assembler(toolchain: str) -> Path:
    tools = TOOLCHAINS[toolchain]
    return wheel_file(*tools.assembler, tools.extra)


@cache
def _digest(program: Path) -> str:
    """Return the digest of a program, which identifies its version."""
    return hashlib.sha256(program.read_bytes()).hexdigest()
