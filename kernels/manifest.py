"""Build every kernel for every target into a folder with ``manifest.json``, which ``library.py`` reads."""

import hashlib
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from medseg_trt.errors import MedsegError, UsageError
from medseg_trt.files import atomic_folder, write_json
from medseg_trt.kernels import KERNELS, load
from medseg_trt.kernels.assemble import usage
from medseg_trt.kernels.compile import compile_ptx, compiler_version
from medseg_trt.kernels.kernel import Entry, Kernel
from medseg_trt.kernels.library import FILE, TARGETS, BuiltFunction, KernelManifest
from medseg_trt.spec import to_dict


def build(folder: Path, targets: Iterable[str] = TARGETS, kernels: Iterable[str] = KERNELS) -> KernelManifest:
    """Compile kernels for targets into a folder and return its manifest; equal sources give equal bytes.

    Functions that need a newer architecture than a target are not built for it.

    Args:
        folder: created, or replaced if it holds an earlier build.
        targets: keys of ``TARGETS``.
        kernels: keys of ``kernels.KERNELS``.

    Raises:
        UsageError: a target is unknown, or the folder holds other files.
        MissingExtraError: a compiler is not installed.
        MedsegError: a kernel does not compile, or its PTX declares other arguments than its entry.
    """
    chosen = list(dict.fromkeys(targets))
    if unknown := [name for name in chosen if name not in TARGETS]:
        raise UsageError(f"there is no architecture {', '.join(unknown)}; choose from: {', '.join(TARGETS)}")
    if folder.exists() and any(folder.iterdir()) and not (folder / FILE).is_file():
        raise UsageError(f"{folder} holds other files than kernels; choose another folder with -o")
    work = [
        (name, kernel, entry)
        for name in chosen
        for kernel in map(load, kernels)
        for entry in kernel.entries
        if entry.min_arch <= TARGETS[name].capability
    ]
    with atomic_folder(folder) as temporary:

        def build_one(item: tuple[str, Kernel, Entry]) -> BuiltFunction:
            return _build_one(temporary, *item)

        with ThreadPoolExecutor(max_workers=2) as pool:
            functions = tuple(pool.map(build_one, work))
        toolchains = sorted({TARGETS[name].toolchain for name in chosen})
        compilers = {toolchain: compiler_version(toolchain) for toolchain in toolchains}
        manifest = KernelManifest(compilers=compilers, kernels=functions)
        write_json(temporary / FILE, to_dict(manifest))
    return manifest


def ptx_parameters(ptx: str, symbol: str) -> list[str]:
    """Return the kinds of a function's arguments, "pointer" or "int32", as its PTX declares them.

    Raises:
        MedsegError: there is no such function.
    """
    match = re.search(rf"\.visible \.entry {re.escape(symbol)}\s*\((.*?)\)", ptx, flags=re.DOTALL)
    if match is None:
        raise MedsegError(f"the PTX has no function {symbol}")
    kinds = {"u64": "pointer", "u32": "int32"}
    declared: list[str] = re.findall(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)", match[1])
    return [kinds.get(kind, kind) for kind in declared]


def _build_one(folder: Path, target: str, kernel: Kernel, entry: Entry) -> BuiltFunction:
    """Write the PTX of one function and return its row of the manifest."""
    architecture, toolchain = TARGETS[target], TARGETS[target].toolchain
    ptx = compile_ptx(kernel, entry, architecture.virtual, toolchain)
    declared = [parameter.kind for parameter in entry.parameters]
    if ptx_parameters(ptx, entry.symbol) != declared:
        raise MedsegError(f"{kernel.source.name}: the PTX of {entry.name} has other arguments than its declaration")
    file = folder / target / f"{entry.name}.ptx"
    file.parent.mkdir(exist_ok=True)
    file.write_text(ptx, encoding="utf-8", newline="\n")
    used = usage(ptx, architecture.real, toolchain)
    return BuiltFunction(
        name=kernel.name,
        entry=entry.symbol,
        dtype=entry.dtype,
        target=target,
        arch=architecture.real,
        ptx=f"{target}/{entry.name}.ptx",
        ptx_version=_directive(ptx, "version"),
        cuda=toolchain,
        sha256=hashlib.sha256(ptx.encode()).hexdigest(),
        parameters=entry.parameters,
        block=kernel.block,
        grid=kernel.grid_rule,
        shared_bytes=kernel.shared_bytes,
        static_shared_bytes=used.shared_bytes,
        registers=used.registers,
        spills=used.spill_bytes,
        max_width=kernel.max_width,
    )


def _directive(ptx: str, name: str) -> str:
    match = re.search(rf"^\.{name}\s+(\S+)", ptx, flags=re.MULTILINE)
    if match is None:
        raise MedsegError(f"the PTX has no .{name} line")
    return match[1]
