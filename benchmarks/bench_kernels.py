"""How fast are the CUDA kernels, as a share of what a plain copy of the same bytes takes?

    python benchmarks/bench_kernels.py [-o benchmarks/results/kernels-NAME.json]

Every function is compared with its reference first; one that is wrong gets no time. Then CUDA events time it at 256
rows of 4096, or pictures of 512 x 512 pixels, and at 16 times as many. Without an NVIDIA GPU it ends with one line and
exit code 6.
"""

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Mapping
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
RUNS, REPEATS = 50, 20
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
    return {each.name: every[each.name] for each in entry.parameters if each.kind == "int32"}


def inputs_of(kernel: Kernel, entry: Entry, scalars: Mapping[str, int]) -> dict[str, Array]:
    """Return generated numbers for every input."""
    rng = np.random.default_rng(0)
    shapes = kernel.shapes(scalars, entry)
    inputs: dict[str, Array] = {}
    for each in entry.parameters:
        if each.kind != "pointer" or each.direction != "in":
            continue
        if each.name == "frequencies":
            inputs[each.name] = frequency_words(HEAD_DIM, 10000.0)
        elif each.dtype == "uint8":
            inputs[each.name] = rng.integers(0, 256, shapes[each.name], dtype=np.uint8)
        else:
            inputs[each.name] = rng.standard_normal(shapes[each.name]).astype(DTYPES[each.dtype])
    return inputs


def measure(driver: CudaBindings, launcher: Launcher, kernel: Kernel, entry: Entry, times: int) -> dict[str, Any]:
    """Return one row of the table.

    Raises:
        MedsegError: an output is not within the kernel's tolerance.
    """
    scalars = scalars_of(kernel, entry, times)
    inputs = inputs_of(kernel, entry, scalars)
    shapes = kernel.shapes(scalars, entry)
    written = [each for each in entry.parameters if each.direction == "out"]
    moved = kernel.bytes_moved(scalars, entry)
    with DeviceMemory(driver) as memory:
        arrays: dict[str, DeviceArray] = {name: memory.upload(values) for name, values in inputs.items()}
        arrays |= {each.name: memory.upload(rounded(np.zeros(shapes[each.name]), each.dtype)) for each in written}
        launcher.launch(kernel, entry, arrays, scalars)
        expected = kernel.reference(entry, inputs, scalars)
        for each in written:
            found = memory.download(arrays[each.name])
            excess = float(kernel.tolerance[each.dtype].excess(found, expected[each.name], each.dtype).max())
            if excess > 1:
                raise MedsegError(f"{entry.name}: {each.name} is {excess:.3g} times its tolerance off; it is not timed")
        half = np.zeros(max(moved // 2, 1), np.uint8)
        source, target = memory.upload(half), memory.upload(half)
        ours = milliseconds(driver, lambda: launcher.launch(kernel, entry, arrays, scalars), runs=RUNS, repeats=REPEATS)
        copy = milliseconds(driver, lambda: memory.copy(source, target), runs=RUNS, repeats=REPEATS)
    return {
        "kernel": kernel.name,
        "entry": entry.name,
        "scalars": scalars,
        "bytes": moved,
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
