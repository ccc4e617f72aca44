"""How fast are the CUDA kernels, relative to a copy of the same number of bytes?

    python benchmarks/bench_kernels.py [-o benchmarks/results/kernels-NAME.json]

Every kernel is first compared with its reference, and is not timed if it is wrong. CUDA events time it at 256 rows of
4096, or images of 512 x 512 pixels, and at 16 times as many: launches in a graph, each over buffers of its own, which
together exceed any card's cache. Without an NVIDIA GPU the exit code is 6.
"""

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from medseg_trt.errors import DeviceError, MedsegError
from medseg_trt.files import write_json
from medseg_trt.kernels import KERNELS, image_to_tensor, load, logits_to_mask
from medseg_trt.kernels.cuda_bindings_adapter import CudaBindings
from medseg_trt.kernels.device_memory import DeviceArray, DeviceMemory, milliseconds
from medseg_trt.kernels.kernel import DTYPES, Array, Entry, Kernel, float_bits, rounded
from medseg_trt.kernels.launch import Launcher, open_driver
from medseg_trt.kernels.rotary import frequency_words
from medseg_trt.spec import Preprocessing

ROWS, WIDTH, HEAD_DIM = 256, 4096, 128
RUNS = 50
BUFFER_BYTES = 2**29  # of all launches of a graph: four times the largest cache of a card, 126 MB
MAX_LAUNCHES = 100
PREPROCESSING = Preprocessing(image_size=(512, 512))


def scalars_of(kernel: Kernel, entry: Entry, times: int) -> dict[str, int]:
    """Return scalars for ``times`` times the smaller size."""
    if kernel.name == "image_to_tensor":
        return image_to_tensor.scalars(PREPROCESSING, (times, 512, 512, 3))
    if kernel.name == "logits_to_mask":
        return logits_to_mask.scalars(PREPROCESSING, times, 9, (512, 512))
    every = {
        "rows": ROWS * times,
        "width": WIDTH,
        "epsilon_bits": float_bits(1e-6),
        "scale_bits": float_bits(0.03),
        "batch": times,
        "tokens": ROWS,
        "first_position": 0,
        "num_heads": WIDTH // HEAD_DIM,
        "num_kv_heads": 8,
        "head_dim": HEAD_DIM,
        "copy_values": 1,
    }
    return {parameter.name: every[parameter.name] for parameter in entry.parameters if parameter.kind == "int32"}


def inputs_of(kernel: Kernel, entry: Entry, scalars: Mapping[str, int]) -> dict[str, Array]:
    """Return generated numbers for every input."""
    rng = np.random.default_rng(0)
    shapes = kernel.shapes(scalars, entry)
    inputs: dict[str, Array] = {}
    for parameter in entry.parameters:
        if parameter.kind != "pointer" or parameter.direction != "in":
            continue
        if parameter.name == "frequencies":
            inputs[parameter.name] = frequency_words(HEAD_DIM, 10000.0)
        elif parameter.dtype == "uint8":
            inputs[parameter.name] = rng.integers(0, 256, shapes[parameter.name], dtype=np.uint8)
        else:
            inputs[parameter.name] = rng.standard_normal(shapes[parameter.name]).astype(DTYPES[parameter.dtype])
    return inputs


def measure(driver: CudaBindings, launcher: Launcher, kernel: Kernel, entry: Entry, times: int) -> dict[str, Any]:
    """Return one row of the table.

    Raises:
        MedsegError: an output is not within the kernel's tolerance.
    """
    scalars = scalars_of(kernel, entry, times)
    inputs = inputs_of(kernel, entry, scalars)
    shapes = kernel.shapes(scalars, entry)
    written = [parameter for parameter in entry.parameters if parameter.direction == "out"]
    moved = kernel.bytes_moved(scalars, entry)
    with DeviceMemory(driver) as memory:
        zeros = {parameter.name: rounded(np.zeros(shapes[parameter.name]), parameter.dtype) for parameter in written}
        num_launches = min(max(BUFFER_BYTES // moved, 1), MAX_LAUNCHES)
        buffers = [
            {name: memory.upload(values) for name, values in (*inputs.items(), *zeros.items())}
            for _ in range(num_launches)
        ]
        arrays: dict[str, DeviceArray] = buffers[0]
        launcher.launch(kernel, entry, arrays, scalars)
        expected = kernel.reference(entry, inputs, scalars)
        for parameter in written:
            output = memory.download(arrays[parameter.name])
            excess = float(
                kernel.tolerance[parameter.dtype].excess(output, expected[parameter.name], parameter.dtype).max()
            )
            if excess > 1:
                raise MedsegError(
                    f"{entry.name}: {parameter.name} is {excess:.3g} times its tolerance off; it is not timed"
                )
        half = np.zeros(max(moved // 2, 1), np.uint8)
        copies = [partial(memory.copy, memory.upload(half), memory.upload(half)) for _ in buffers]
        launches = [partial(launcher.launch, kernel, entry, own_arrays, scalars) for own_arrays in buffers]
        ours = milliseconds(driver, launches, runs=RUNS)
        copy = milliseconds(driver, copies, runs=RUNS)
    return {
        "kernel": kernel.name,
        "entry": entry.name,
        "scalars": scalars,
        "bytes": moved,
        "launches": num_launches,
        "executed": True,
        "median_ms": float(np.median(ours)),
        "p95_ms": float(np.percentile(ours, 95)),
        "copy_median_ms": float(np.median(copy)),
        "share_of_copy": float(np.median(copy) / np.median(ours)),
    }


def machine(driver: CudaBindings) -> dict[str, Any]:
    """Return what the figures were measured on."""
    fields = "name,driver_version,clocks.sm,clocks.mem,power.limit"
    asked = subprocess.run(
        ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    return {
        "gpu": asked.stdout.strip(),
        "sm": driver.capability,
        "cuda": list(driver.cuda),
        "platform": platform.platform(),
        "compiler": version("nvidia-cuda-nvrtc"),
        "medseg-trt": version("medseg-trt"),
    }


def main() -> int:
    """Measure every function that the device has the instructions for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, help="also write the figures as JSON")
    output: Path | None = parser.parse_args().output
    try:
        driver = open_driver("cuda-bindings")
    except DeviceError as error:
        print(f"bench_kernels: {error}", file=sys.stderr)
        return error.exit_code
    assert isinstance(driver, CudaBindings)
    launcher = Launcher(driver)
    rows: list[dict[str, Any]] = []
    for name in KERNELS:
        kernel = load(name)
        for entry in kernel.entries:
            for times in (1, 16):
                if entry.min_arch <= driver.capability:
                    rows.append(measure(driver, launcher, kernel, entry, times))
                    print(f"{entry.name}: {rows[-1]['median_ms']:.4f} ms", file=sys.stderr)
    result = {"script": "benchmarks/bench_kernels.py", "machine": machine(driver), "rows": rows}
    print(json.dumps(result))
    if output is not None:
        write_json(output, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
