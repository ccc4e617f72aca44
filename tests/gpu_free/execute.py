"""Run a kernel's shipped PTX on arrays, and say how far its outputs are from its contract."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from gpu_free.machine import Argument, run_ptx
from gpu_free.report import Report

from medseg_trt.kernels.compile import DEFAULT, compile_ptx
from medseg_trt.kernels.kernel import DTYPES, Array, Entry, Kernel

FILLING = 0xA5  # of outputs before a run: an element left out is no lucky zero


@dataclass(frozen=True, slots=True)
class Execution:
    """What a run gave."""

    outputs: dict[str, Array]
    report: Report


def ptx_of(kernel: Kernel, entry: Entry, arch: int = 80, toolchain: str = DEFAULT) -> str:
    """Return the PTX for a virtual architecture, or for the oldest on which the entry exists."""
    return compile_ptx(kernel, entry, f"compute_{max(arch, entry.min_arch)}", toolchain)


def execute(
    kernel: Kernel,
    entry: Entry,
    scalars: Mapping[str, int],
    inputs: Mapping[str, Array],
    ptx: str,
    *,
    starts: Mapping[str, int] | None = None,
) -> Execution:
    """Run ``ptx`` as the launcher would.

    Args:
        kernel: whose launch shape it is.
        entry: whose parameters they are.
        scalars: int32 arguments by name.
        inputs: arrays by name.
        ptx: the code; from ``ptx_of``, or a broken one.
        starts: bytes by which an array lies past a 16-byte boundary, by name.
    """
    shapes = kernel.shapes(scalars, entry)
    outputs: dict[str, Array] = {}
    arguments: list[Argument | int] = []
    for parameter in entry.parameters:
        name, start = parameter.name, (starts or {}).get(parameter.name, 0)
        if parameter.kind == "int32":
            arguments.append(scalars[name])
        elif parameter.direction == "in":
            assert inputs[name].shape == shapes[name], name
            arguments.append(Argument(name, inputs[name], start=start))
        else:
            dtype = DTYPES[parameter.dtype]
            size = int(np.prod(shapes[name])) * dtype.itemsize
            outputs[name] = np.full(size, FILLING, np.uint8).view(dtype).reshape(shapes[name])
            arguments.append(Argument(name, outputs[name], is_output=True, start=start))
    report = run_ptx(
        ptx,
        entry.symbol,
        kernel.grid(scalars),
        kernel.block,
        arguments,
        shared_bytes=kernel.shared_bytes,
    )
    return Execution(outputs, report)


def excesses(
    kernel: Kernel, entry: Entry, scalars: Mapping[str, int], inputs: Mapping[str, Array], outputs: Mapping[str, Array]
) -> dict[str, float]:
    """Return the largest error of each output as a multiple of what the kernel's tolerance allows."""
    expected = kernel.reference(entry, inputs, scalars)
    excess_of: dict[str, float] = {}
    for parameter in entry.parameters:
        if parameter.direction == "out":
            name, tolerance = parameter.name, kernel.tolerance[parameter.dtype]
            ratio = tolerance.excess(outputs[name], expected[name], parameter.dtype)
            excess_of[name] = float(ratio.max(initial=0.0)) if not np.isnan(ratio).any() else float("inf")
    return excess_of
