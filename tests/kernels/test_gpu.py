"""On a GPU: both adapters against the references, PyTorch's tensors, errors by name, time, NVIDIA's own checkers."""

import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from gpu_free.cases import CASES
from gpu_free.sanitizer import nothing_checked

from medseg_trt.errors import DeviceError
from medseg_trt.kernels import KERNELS, load
from medseg_trt.kernels.cuda_bindings_adapter import CudaBindings
from medseg_trt.kernels.device_memory import DeviceMemory, milliseconds
from medseg_trt.kernels.kernel import DTYPES, Array, Entry, Kernel, rounded
from medseg_trt.kernels.launch import DRIVERS, Launcher, open_driver

pytestmark = pytest.mark.gpu
FUNCTIONS = [(name, entry.name) for name in KERNELS for entry in load(name).entries]
TRAFFIC = 256 * 2**20  # bytes; several times any card's cache, so that the memory itself is measured
SHARE = 0.5  # of the copy's bandwidth; a first bound, which no card has confirmed yet


@pytest.fixture(scope="module")
def driver() -> CudaBindings:
    try:
        return cast("CudaBindings", open_driver("cuda-bindings"))
    except DeviceError as error:
        pytest.skip(str(error))


@pytest.fixture(params=DRIVERS)
def launcher(request, driver) -> Launcher:
    try:
        return Launcher(open_driver(request.param), wait=True)
    except DeviceError as error:
        pytest.skip(str(error))


def entry_of_function(launcher: Launcher, kernel: Kernel, name: str) -> Entry:
    entry = kernel.entry(name)
    if entry.min_arch > launcher.driver.capability:
        pytest.skip(f"{name} needs sm_{entry.min_arch}; this device is sm_{launcher.driver.capability}")
    return entry


def outputs(
    driver: CudaBindings,
    launcher: Launcher,
    kernel: Kernel,
    entry: Entry,
    scalars: dict[str, int],
    inputs: dict[str, Array],
) -> dict[str, Array]:
    """Run a function on the device; what it does not write stays 0xCD."""
    shapes = kernel.shapes(scalars, entry)
    with DeviceMemory(driver) as memory:
        arrays = {name: memory.upload(values) for name, values in inputs.items()}
        for parameter in entry.parameters:
            if parameter.direction == "out":
                nbytes = int(np.prod(shapes[parameter.name])) * DTYPES[parameter.dtype].itemsize
                blank = np.full(nbytes, 0xCD, np.uint8).view(DTYPES[parameter.dtype]).reshape(shapes[parameter.name])
                arrays[parameter.name] = memory.upload(blank)
        launcher.launch(kernel, entry, arrays, scalars)
        return {
            parameter.name: memory.download(arrays[parameter.name])
            for parameter in entry.parameters
            if parameter.direction == "out"
        }


def worst(kernel: Kernel, entry: Entry, scalars: dict[str, int], inputs: dict[str, Array], measured) -> float:
    """Return the largest error as a multiple of what is allowed."""
    expected = kernel.reference(entry, inputs, scalars)
    return max(
        float(
            kernel.tolerance[parameter.dtype]
            .excess(measured[parameter.name], expected[parameter.name], parameter.dtype)
            .max()
        )
        for parameter in entry.parameters
        if parameter.direction == "out"
    )


@pytest.mark.parametrize(("name", "function"), FUNCTIONS)
@pytest.mark.parametrize(("rows", "width"), [(17, 33), (17, 4096)])
def test_kernel_on_gpu_is_within_tolerance_of_its_reference(name, function, rows, width, driver, launcher):
    kernel = load(name)
    entry = entry_of_function(launcher, kernel, function)
    for first_scale in range(3):
        scalars, inputs = CASES[name](entry, rows, width, first_scale, np.random.default_rng(first_scale))
        measured = outputs(driver, launcher, kernel, entry, scalars, inputs)
        assert worst(kernel, entry, scalars, inputs, measured) <= 1


def test_cuda_bindings_and_pycuda_give_identical_rmsnorm_outputs(driver):
    kernel = load("rmsnorm")
    scalars, inputs = CASES["rmsnorm"](kernel.entries[0], 17, 4093, 0, np.random.default_rng(0))
    try:
        launchers = [Launcher(open_driver(name), wait=True) for name in DRIVERS]
    except DeviceError as error:
        pytest.skip(str(error))
    one, other = (outputs(driver, launcher, kernel, kernel.entries[0], scalars, inputs) for launcher in launchers)
    assert all(one[name].tobytes() == other[name].tobytes() for name in one)


def test_tensors_of_pytorch_are_taken_as_they_are(driver):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch sees no CUDA device")
    kernel = load("logits_to_mask")
    entry = kernel.entry("logits_to_mask_bfloat16")
    scalars, inputs = CASES["logits_to_mask"](entry, 64, 96, 0, np.random.default_rng(0))
    logits = torch.from_numpy(inputs["logits"].astype(np.float32)).cuda().bfloat16()
    mask = torch.empty(kernel.shapes(scalars, entry)["mask"], dtype=torch.uint8, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    Launcher(driver).launch(kernel, entry, {"logits": logits, "mask": mask}, scalars, stream.cuda_stream)
    stream.synchronize()
    assert worst(kernel, entry, scalars, inputs, {"mask": mask.cpu().numpy()}) <= 1


def test_an_error_inside_a_kernel_has_its_name():
    """In a process of its own: after an illegal access a CUDA context is of no more use."""
    code = """
from medseg_trt.kernels import load
from medseg_trt.kernels.launch import Launcher, open_driver
kernel = load("logits_to_mask")
scalars = dict(batch=1, classes=2, image_height=64, image_width=64, resampled_height=64, resampled_width=64,
               height=64, width=64)
try:
    driver = open_driver()
except Exception as error:
    raise SystemExit(f"skip: {error}")
Launcher(driver, wait=True).launch(kernel, kernel.entries[0], {"logits": 16, "mask": 2**20}, scalars)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.stderr.startswith("skip: "):
        pytest.skip(done.stderr.strip())
    assert "DeviceError: logits_to_mask_float16: cuStreamSynchronize returned 700" in done.stderr


@pytest.mark.parametrize("name", KERNELS)
def test_a_large_launch_reaches_a_share_of_the_copy_bandwidth(name, driver, record_property):
    kernel = load(name)
    entry = kernel.entries[0]
    launcher = Launcher(driver)
    rng = np.random.default_rng(0)
    rows = (
        1024
        if name in ("image_to_tensor", "logits_to_mask")
        else TRAFFIC // kernel.bytes_moved(CASES[name](entry, 64, 4096, 0, rng)[0], entry) * 64
    )
    scalars, inputs = CASES[name](entry, rows, 4096, 1 if name == "logits_to_mask" else 0, rng)
    with DeviceMemory(driver) as memory:
        arrays = {key: memory.upload(values) for key, values in inputs.items()}
        for key, shape in kernel.shapes(scalars, entry).items():
            if key not in arrays:
                dtype = next(parameter.dtype for parameter in entry.parameters if parameter.name == key)
                arrays[key] = memory.upload(rounded(np.zeros(shape), dtype))
        half = np.zeros(kernel.bytes_moved(scalars, entry) // 2, np.uint8)
        source, target = memory.upload(half), memory.upload(half)
        launch = partial(launcher.launch, kernel, entry, arrays, scalars)
        launch()  # loads the module, which cannot be captured
        copy_ms = np.median(milliseconds(driver, [partial(memory.copy, source, target)] * 5, runs=20))
        kernel_ms = np.median(milliseconds(driver, [launch] * 5, runs=20))
    record_property("gbytes_per_s", float(kernel.bytes_moved(scalars, entry) / kernel_ms / 1e6))
    record_property("share_of_copy", float(copy_ms / kernel_ms))
    assert copy_ms / kernel_ms > SHARE


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(tool, driver):
    program = shutil.which("compute-sanitizer")
    if program is None:
        pytest.skip("compute-sanitizer is not installed; it comes with the CUDA toolkit")
    done = subprocess.run(
        [
            program,
            "--tool",
            tool,
            "--error-exitcode",
            "99",
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-k",
            "test_kernel_on_gpu_is_within_tolerance_of_its_reference and cuda-bindings and 33",
            Path(__file__),
        ],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    if reason := nothing_checked(done.stdout + done.stderr):
        pytest.skip(reason)
