"""Turn PTX into what a card executes, SASS, to count registers, spills, and the width of loads and stores.

ptxas and nvdisasm come from NVIDIA's wheels, like the compiler.
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
from medseg_trt.kernels.store import remember

DISASSEMBLER = "nvidia-cuda-nvdisasm", "nvidia/cu13/bin/nvdisasm", "kernels"
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What one function needs on one architecture."""

    registers: int  # of each thread
    shared_bytes: int  # static, of each block
    stack_bytes: int  # of each thread, in local memory
    spill_bytes: int  # stored there and loaded again, because the registers do not suffice


def usage(ptx: str, arch: str, toolchain: str = DEFAULT) -> Usage:
    """Return what ptxas reports about the one function in ``ptx``.

    Args:
        ptx: a text that ``compile_ptx`` returned.
        arch: a real architecture, ``sm_80`` …; not older than the PTX's target.
        toolchain: a key of ``compile.TOOLCHAINS``.

    Raises:
        MissingExtraError: a wheel of the toolchain is not installed.
        MedsegError: ptxas refuses it.
    """
    ptxas = _assembler(toolchain)

    def make() -> str:
        with tempfile.TemporaryDirectory() as folder:
            return _assemble(ptxas, ptx, arch, Path(folder, "kernel.cubin"))

    report = remember(_usage_key(ptxas, ptx, arch), make)
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


def opcodes(ptx: str, arch: str, toolchain: str = DEFAULT, *, contract: bool = True) -> Mapping[str, int]:
    """Return how often each opcode of SASS occurs, with its modifiers: ``{"LDG.E.128": 2, …}``.

    ``contract=False`` forbids ptxas to make one instruction of a product and a sum, as it otherwise does where the PTX
    lets it. The other arguments, and the errors, are those of ``usage``.
    """
    ptxas, nvdisasm = _assembler(toolchain), wheel_file(*DISASSEMBLER)

    def make() -> str:
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder, "kernel.cubin")
            report = _assemble(ptxas, ptx, arch, cubin, f"--fmad={str(contract).lower()}")
            if contract:  # ptxas's default: spares ``usage`` its run
                remember(_usage_key(ptxas, ptx, arch), lambda: report)
            listing = _run(nvdisasm, "--no-dataflow", str(cubin))
        return json.dumps(Counter(INSTRUCTION.findall(listing)), sort_keys=True)

    return json.loads(remember(["opcodes", ptx, arch, contract, _digest(ptxas), _digest(nvdisasm)], make))


def count(found: Mapping[str, int], name: str, *modifiers: str) -> int:
    """Return how many of the opcodes found have this name and all of these modifiers."""
    total = 0
    for opcode, times in found.items():
        first, *rest = opcode.split(".")
        total += times if first == name and set(modifiers) <= set(rest) else 0
    return total


def _usage_key(ptxas: Path, ptx: str, arch: str) -> list[str]:
    return ["usage", ptx, arch, _digest(ptxas)]


def _assemble(ptxas: Path, ptx: str, arch: str, cubin: Path, *options: str) -> str:
    """Write the cubin and return ptxas's report."""
    source = cubin.with_suffix(".ptx")
    source.write_text(ptx, encoding="utf-8")
    return _run(ptxas, f"--gpu-name={arch}", "--verbose", *options, f"--output-file={cubin}", str(source))


def _numbers(pattern: str, report: str) -> list[int]:
    found = re.search(pattern, report)
    if found is None:
        raise MedsegError(f"ptxas says nothing like {pattern!r}; its report begins {report[:200]!r}")
    return [int(number) for number in found.groups()]


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
    """Return the digest of a program, which stands for its version."""
    return hashlib.sha256(program.read_bytes()).hexdigest()
