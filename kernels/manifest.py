"""Build every kernel for every target into a folder with ``manifest.json``; ``library.py`` reads it again."""

import hashlib
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from medseg_trt.errors import MedsegError, UsageError
from medseg_trt.files import atomic_folder, write_json
from medseg_trt.kernels import KERNELS, load
from medseg_trt.kernels.assemble import usage
from medseg_trt.kernels.compile import compile_ptx, compiler_version
from medseg_trt.kernels.kernel import Entry, Kernel
from medseg_trt.kernels.library import FILE, SCHEMA, TARGETS


def build(folder: Path, targets: Iterable[str] = TARGETS, kernels: Iterable[str] = KERNELS) -> dict[str, Any]:
    """Compile kernels for targets into a folder, and return its manifest; the same sources give the same bytes.

    Functions that need a newer architecture than a target has are left out of it.

    Args:
        folder: made, or replaced if it holds an earlier build.
        targets: keys of ``TARGETS``.
        kernels: keys of ``kernels.KERNELS``.

    Raises:
        UsageError: a target is unknown, or the folder holds something else.
        MissingExtraError: a compiler is not installed.
        MedsegError: a kernel does not compile, or takes other arguments than it declares.
    """
    chosen = list(dict.fromkeys(targets))
    if unknown := [name for name in chosen if name not in TARGETS]:
        raise UsageError(f"there is no architecture {', '.join(unknown)}; choose from: {', '.join(TARGETS)}")
    if folder.exists() and any(folder.iterdir()) and not (folder / FILE).is_file():
        raise UsageError(f"{folder} holds something else than kernels; give another folder with -o")
    work = [
        (name, kernel, entry)
        for name in chosen
        for kernel in map(load, kernels)
        for entry in kernel.entries
        if entry.min_arch <= TARGETS[name].capability
    ]
    with atomic_folder(folder) as temporary:

        def make(job: tuple[str, Kernel, Entry]) -> dict[str, Any]:
            return _build_one(temporary, *job)

        with ThreadPoolExecutor(max_workers=2) as pool:
            rows = list(pool.map(make, work))
        toolchains = sorted({TARGETS[name].toolchain for name in chosen})
        manifest = {
            "schema": SCHEMA,
            "compilers": {toolchain: compiler_version(toolchain) for toolchain in toolchains},
            "kernels": rows,
        }
        write_json(temporary / FILE, manifest)
    return manifest


def ptx_parameters(ptx: str, symbol: str) -> list[str]:
    """Return the kinds of a function's arguments, "pointer" or "int32", as its PTX declares them.

    Raises:
        MedsegError: there is no such function.
    """
    found = re.search(rf"\.visible \.entry {re.escape(symbol)}\s*\((.*?)\)", ptx, flags=re.DOTALL)
    if found is None:
        raise MedsegError(f"the PTX has no function {symbol}")
    kinds = {"u64": "pointer", "u32": "int32"}
    declared: list[str] = re.findall(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)", found[1])
    return [kinds.get(kind, kind) for kind in declared]


def _build_one(folder: Path, target: str, kernel: Kernel, entry: Entry) -> dict[str, Any]:
    """Write the PTX of one function and return its row of the manifest."""
    make = TARGETS[target]
    ptx = compile_ptx(kernel, entry, make.virtual, make.toolchain)
    declared = [parameter.kind for parameter in entry.parameters]
    if ptx_parameters(ptx, entry.symbol) != declared:
        raise MedsegError(f"{kernel.source.name}: {entry.name} takes other arguments than its declaration says")
    file = folder / target / f"{entry.name}.ptx"
    file.parent.mkdir(exist_ok=True)
    file.write_text(ptx, encoding="utf-8", newline="\n")
    used = usage(ptx, make.real, make.toolchain)
    return {
        "name": kernel.name,
        "entry": entry.symbol,
        "dtype": entry.dtype,
        "target": target,
        "arch": make.real,
        "ptx": f"{target}/{entry.name}.ptx",
        "ptx_version": _directive(ptx, "version"),
        "cuda": make.toolchain,
        "sha256": hashlib.sha256(ptx.encode()).hexdigest(),
        "parameters": [asdict(parameter) for parameter in entry.parameters],
        "block": list(kernel.block),
        "grid": kernel.grid_rule,
        "shared_bytes": kernel.shared_bytes,
        "static_shared_bytes": used.shared_bytes,
        "registers": used.registers,
        "spills": used.spill_bytes,
        "max_width": kernel.max_width,
    }


def _directive(ptx: str, name: str) -> str:
    found = re.search(rf"^\.{name}\s+(\S+)", ptx, flags=re.MULTILINE)
    if found is None:
        raise MedsegError(f"the PTX has no .{name} line")
    return found[1]
