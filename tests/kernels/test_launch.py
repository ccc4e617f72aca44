"""Launching without a GPU: what reaches the CUDA driver, argument by argument, and what is stopped before it does."""

import dataclasses
import struct
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from fakes.launches import LOGITS_TO_MASK, PREPROCESSING, OnDevice, mask_call, ptx_of

from medseg_trt.errors import DeviceError
from medseg_trt.kernels import KERNELS, image_to_tensor, load
from medseg_trt.kernels.device import DeviceMemoryError
from medseg_trt.kernels.launch import CudaError, Driver, Launch, Launcher, pack
from medseg_trt.kernels.library import TARGETS

IMAGE_TO_TENSOR = image_to_tensor.KERNEL


class FakeDriver(Driver):
    """Records every call; returns the error that it is told to."""

    capability, cuda = 86, (13, 0)

    def __init__(self, fail: str = "") -> None:
        self.fail = fail
        self.error = CudaError("cuLaunchKernel returned 700 CUDA_ERROR_ILLEGAL_ADDRESS")
        self.loaded: list[str] = []
        self.launches: list[Launch] = []
        self.waited: list[Any] = []

    def _error(self, where: str) -> None:
        if self.fail == where:
            raise self.error

    def load(self, ptx: str, symbol: str) -> Any:
        self._error("load")
        self.loaded.append(ptx)
        return f"function {symbol}"

    def unload(self) -> None:
        self.loaded.clear()

    def launch(self, launch: Launch) -> None:
        self._error("launch")
        self.launches.append(launch)

    def synchronize(self, stream: Any) -> None:
        self._error("synchronize")
        self.waited.append(stream)


def test_arguments_arrive_in_the_order_of_the_source_with_grid_and_block():
    driver = FakeDriver()
    entry, arrays, scalars = mask_call()
    shuffled = dict(sorted(scalars.items()))
    Launcher(driver, ptx_of).launch(LOGITS_TO_MASK, entry, dict(reversed(arrays.items())), shuffled, stream=77)
    assert driver.launches == [
        Launch(
            function="function medseg_logits_to_mask_float16",
            grid=(63, 2, 1),  # 8000 pixels, one for each of 128 threads; two pictures
            block=(128, 1, 1),
            shared_bytes=0,
            stream=77,
            layout="PiiiiiiiiP",
            arguments=(0x100000, 2, 9, 48, 64, 48, 64, 100, 80, 0x900000),
        )
    ]
    assert driver.loaded == ["logits_to_mask_float16 for sm_86, CUDA 13.0"]
    assert driver.waited == []


def test_a_function_is_loaded_once_and_waiting_is_a_choice():
    driver = FakeDriver()
    launcher = Launcher(driver, ptx_of, wait=True)
    for _ in range(3):
        launcher.launch(LOGITS_TO_MASK, *mask_call(), stream=5)
    assert len(driver.loaded) == 1
    assert driver.waited == [5, 5, 5]


def some_scalars(kernel) -> dict[str, int]:
    """Return small scalars that any kernel can take: small even widths, one row or picture."""
    if kernel is IMAGE_TO_TENSOR:
        return image_to_tensor.scalars(PREPROCESSING, (2, 30, 40, 3))
    names = [parameter.name for parameter in kernel.entries[0].parameters if parameter.kind == "int32"]
    return dict.fromkeys(names, 8)


@pytest.mark.parametrize("name", KERNELS)
def test_every_function_is_packed_as_its_declaration_says(name):
    kernel = load(name)
    for entry in kernel.entries:
        scalars = {
            parameter.name: some_scalars(kernel).get(parameter.name, 8)
            for parameter in entry.parameters
            if parameter.kind == "int32"
        }
        pointers = [parameter.name for parameter in entry.parameters if parameter.kind == "pointer"]
        arrays = {parameter: 2**40 * number for number, parameter in enumerate(pointers, 1)}
        driver = FakeDriver()
        Launcher(driver, ptx_of).launch(kernel, entry, arrays, scalars)
        (launch,) = driver.launches
        for parameter, kind, value in zip(entry.parameters, launch.layout, launch.arguments, strict=True):
            assert kind == {"pointer": "P", "int32": "i"}[parameter.kind]
            assert value == {**arrays, **scalars}[parameter.name]
        assert launch.grid == kernel.grid(scalars)
        assert launch.block == kernel.block
        assert len(struct.pack(launch.layout, *launch.arguments)) > 0


@pytest.mark.parametrize("where", ["load", "launch", "synchronize"])
def test_a_cuda_error_has_the_kernels_name(where):
    launcher = Launcher(FakeDriver(where), ptx_of, wait=True)
    with pytest.raises(DeviceError, match=r"^logits_to_mask_float16: cuLaunchKernel returned 700 CUDA_ERROR_ILLEGAL"):
        launcher.launch(LOGITS_TO_MASK, *mask_call())


def test_too_little_memory_for_a_module_is_said_in_words():
    driver = FakeDriver("load")
    driver.error = DeviceMemoryError("cuModuleLoadData returned 2 CUDA_ERROR_OUT_OF_MEMORY")
    words = r"^logits_to_mask_float16: the GPU has not enough memory \(cuModuleLoadData returned 2 .*\)\. End what else"
    with pytest.raises(DeviceError, match=words):
        Launcher(driver, ptx_of).launch(LOGITS_TO_MASK, *mask_call())


def test_nothing_to_do_is_not_launched():
    entry, _, scalars = mask_call()
    arrays = {"logits": OnDevice((0, 9, 48, 64), "<f2", 0), "mask": OnDevice((0, 100, 80), "|u1", 0)}
    driver = FakeDriver("launch")
    Launcher(driver, ptx_of).launch(LOGITS_TO_MASK, entry, arrays, {**scalars, "batch": 0})
    assert driver.loaded == []


def test_too_many_blocks_are_refused():
    entry, _, scalars = mask_call()
    arrays = {"logits": 2**20, "mask": 2**44}
    with pytest.raises(ValueError, match=r"\(63, 70000, 1\) blocks"):
        Launcher(FakeDriver(), ptx_of).launch(LOGITS_TO_MASK, entry, arrays, {**scalars, "batch": 70000})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": np.zeros((2, 9, 48, 64), np.float16)}, "logits is not on a CUDA device"),
        ({"logits": OnDevice((2, 9, 48, 64), "<f4")}, "logits is <f4; it must be float16"),
        ({"logits": OnDevice((2, 9, 64, 48), "<f2")}, r"shape \(2, 9, 64, 48\); it must be \(2, 9, 48, 64\)"),
        ({"logits": OnDevice((2, 9, 48, 64), "<f2", strides=(55296, 2, 1152, 18))}, "make it contiguous"),
        ({"logits": OnDevice((2, 9, 48, 64), "<f2", strides=(55296, 6144, 256, 2))}, "make it contiguous"),
        ({"logits": OnDevice((2, 9, 48, 64), "<f2", address=0x7001)}, "starts at 0x7001"),
        ({"logits": OnDevice((2, 9, 48, 64), "<f2", address=0)}, "starts at 0x0"),
        ({"logits": 0x7001}, "starts at 0x7001"),
        ({"mask": OnDevice((2, 100, 80), "|u1", read_only=True)}, "mask is read-only"),
        ({"mask": OnDevice((2, 100, 80), "|u1", address=0x100000 + 100)}, "logits and mask overlap"),
        ({"mask": 0x100000 - 1}, "logits and mask overlap"),
        ({"labels": 0x9000}, "takes logits, mask; given are logits, mask, labels"),
    ],
)
def test_a_wrong_array_is_stopped_at_the_boundary(changes, message):
    driver = FakeDriver()
    with pytest.raises(ValueError, match=message) as caught:
        Launcher(driver, ptx_of).launch(LOGITS_TO_MASK, *mask_call(**changes))
    assert str(caught.value).startswith("logits_to_mask_float16")
    assert driver.loaded == driver.launches == []


@pytest.mark.parametrize(
    ("scalars", "message"),
    [
        ({"classes": 2**31}, "classes is 2147483648, which does not fit"),
        ({"width": 16385}, "the width is 16385; at most 16384"),
        ({"depth": 1}, "given are .*depth"),
    ],
)
def test_a_wrong_scalar_is_stopped_at_the_boundary(scalars, message):
    entry, arrays, good = mask_call()
    with pytest.raises(ValueError, match=message):
        pack(LOGITS_TO_MASK, entry, arrays, {**good, **scalars})
    with pytest.raises(ValueError, match="takes batch, classes"):
        pack(LOGITS_TO_MASK, entry, arrays, {"batch": 1})


@pytest.mark.parametrize("strides", [None, (55296, 6144, 128, 2)])
def test_contiguous_arrays_and_their_neighbours_pass(strides):
    size = 2 * 9 * 48 * 64 * 2
    entry, arrays, scalars = mask_call(
        logits=OnDevice((2, 9, 48, 64), "<f2", 0x100000, strides), mask=OnDevice((2, 100, 80), "|u1", 0x100000 + size)
    )
    assert pack(LOGITS_TO_MASK, entry, arrays, scalars)[0] == 0x100000


def test_pack_refuses_float16_arrays_for_a_bfloat16_kernel():
    entry = LOGITS_TO_MASK.entry("logits_to_mask_bfloat16")
    _, arrays, scalars = mask_call()
    with pytest.raises(ValueError, match="logits is <f2; it must be bfloat16"):
        pack(LOGITS_TO_MASK, entry, arrays, scalars)
    arrays["logits"] = OnDevice((2, 9, 48, 64), "<V2", 0x100000)  # what PyTorch says of bfloat16
    assert pack(LOGITS_TO_MASK, entry, arrays, scalars)[0] == 0x100000


def test_a_tensor_on_the_cpu_is_refused_in_one_line():
    torch = pytest.importorskip("torch")
    with pytest.raises(ValueError, match="logits is not on a CUDA device"):
        pack(LOGITS_TO_MASK, *mask_call(logits=torch.zeros(2, 9, 48, 64, dtype=torch.float16)))


def test_a_launch_does_not_import_torch():
    code = "import sys, medseg_trt.kernels.launch; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- the real adapters, over modules that record what they are asked -------------------------------------------------


def test_targets_are_named_after_their_architecture():
    assert all(name in (target.real, "jetpack6") for name, target in TARGETS.items())


def test_strides_and_bits_of_a_picture_reach_the_kernel():
    scalars = image_to_tensor.scalars(PREPROCESSING, (2, 30, 40, 3), strides=(30 * 200, 200, 4))
    assert [scalars[f"{name}_stride"] for name in ("image", "row", "pixel")] == [6000, 200, 4]
    assert struct.pack("<i", scalars["scale0_bits"]) == struct.pack("<f", 1 / (255 * 0.25))
    assert struct.pack("<i", scalars["bias0_bits"]) == struct.pack("<f", -0.5 / 0.25)
    entry = dataclasses.replace(IMAGE_TO_TENSOR.entries[0])
    arguments = pack(IMAGE_TO_TENSOR, entry, {"pixels": 0x10001, "tensor": 0x900000}, scalars)
    assert arguments[:8] == (0x10001, 2, 30, 40, 3, 6000, 200, 4)
