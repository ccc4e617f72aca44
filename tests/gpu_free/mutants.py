"""Kernels broken on purpose, one line each, and the checks that have to see it: a fault that none sees is a hole.

A mutant replaces one text, found exactly once, in a copy of the kernels' sources. ``python -m gpu_free.mutants``, from
the folder ``tests``, runs them all, prints which check caught which, and ends with 1 if one is left.
"""

import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from gpu_free.host.checks import CHECKS
from gpu_free.host.host import missing
from gpu_free.mutant import Mutant, kernel_name
from gpu_free.mutants_of_arithmetic import ARITHMETIC_MUTANTS
from gpu_free.mutants_of_memory import MEMORY_MUTANTS

from medseg_trt.kernels import load
from medseg_trt.kernels.kernel import Entry, Kernel

COLUMNS = (15, 58, 9)  # of the table: kernel, fault, check
MUTANTS: Mapping[str, Mutant] = {**MEMORY_MUTANTS, **ARITHMETIC_MUTANTS}
SOUND = tuple(dict.fromkeys((mutant.entry, check) for mutant in MUTANTS.values() for check in mutant.checks))


def break_kernel(mutant: Mutant, folder: Path) -> tuple[Kernel, Entry]:
    """Copy the sources into ``folder``, put the fault in, and return the broken kernel and its entry.

    Raises:
        ValueError: the text is not there exactly once: the kernel has changed, and the mutant with it must.
    """
    kernel = mutant.kernel
    for file in kernel.source.parent.glob("*.cu*"):
        shutil.copyfile(file, folder / file.name)
    target = folder / mutant.file
    text = target.read_text(encoding="utf-8")
    if (occurrences := text.count(mutant.old)) != 1:
        raise ValueError(
            f"{mutant.file} has {occurrences} places like {mutant.old!r}; a mutant needs one. Change the mutant"
        )
    target.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    return replace(kernel, source=folder / kernel.source.name), kernel.entry(mutant.entry)


def catch(mutant: Mutant, folder: Path) -> tuple[str, str]:
    """Return the check that sees the fault and what it says; ("", "") if none of its checks does."""
    kernel, entry = break_kernel(mutant, folder)
    for name in mutant.checks:
        if seen := CHECKS[name](kernel, entry, mutant.kernel):
            return name, seen
    return "", ""


def main() -> int:
    """Print the table of all mutants; return 1 if one survives or the unbroken kernel fails, 2 without a compiler."""
    if reason := missing():
        print(f"nothing was checked: {reason}")
        return 2
    wrong = 0
    for entry, check in SOUND:
        kernel = load(kernel_name(entry))
        if seen := CHECKS[check](kernel, kernel.entry(entry), kernel):
            wrong += 1
            print(f"{entry}, unbroken, fails the check {check}: {seen}")
    for name, mutant in MUTANTS.items():
        with tempfile.TemporaryDirectory() as folder:
            check, seen = catch(mutant, Path(folder))
        wrong += not check
        cells = (kernel_name(mutant.entry), name, check or "NONE")
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, COLUMNS, strict=True)), seen[:70], flush=True)
    print(f"{len(MUTANTS)} mutants; survivors, and checks that unbroken kernels fail: {wrong}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
