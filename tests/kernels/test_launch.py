"""Launching without a GPU: what reaches the CUDA driver, argument by argument, and what is stopped before it does."""

import ctypes
import dataclasses
import struct
import subprocess
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from medseg_trt.errors import DeviceError, MissingExtraError, UsageError
from medseg_trt.kernels import KERNELS, cuda_bindings_adapter, image_to_tensor, load, logits_to_mask, pycuda_adapter
from medseg_trt.kernels.device_memory import DeviceMemory, milliseconds
from medseg_trt.kernels.launch import CudaError, Driver, Launch, Launcher, open_driver, pack
from medseg_trt.kernels.library import TARGETS
from medseg_trt.spec import Preprocessing

IMAGE_TO_TENSOR, LOGITS_TO_MASK = image_to_tensor.KERNEL, logits_to_mask.KERNEL
PREPROCESSING = Preprocessing(image_size=(48, 64), std=(0.25, 0.5, 1.0), mean=(0.5, 0.25, 0.125))


class OnDevice:
    """An array that says it is on a GPU, as PyTorch's and CuPy's do; nothing is behind the address."""

    def __init__(self, shape, typestr, address=0x7000, strides=None, read_only=False):
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": typestr,
            "data": (address, read_only),
            "strides": strides,
            "version": 3,
        }


class FakeDriver(Driver):
    """Records every call; returns the error that it is told to."""

    capability, cuda = 86, (13, 0)

    def __init__(self, fail: str = "") -> None:
        self.fail = fail
        self.loaded: list[str] = []
        self.launches: list[Launch] = []
        self.waited: list[Any] = []

    def _error(self, where: str) -> None:
        if self.fail == where:
            raise CudaError("cuLaunchKernel returned 700 CUDA_ERROR_ILLEGAL_ADDRESS")

    def load(self, ptx: str, symbol: str) -> Any:
        self._error("load")
        self.loaded.append(ptx)
        return f"function {symbol}"

    def launch(self, launch: Launch) -> None:
        self._error("launch")
        self.launches.append(launch)

    def synchronize(self, stream: Any) -> None:
        self._error("synchronize")
        self.waited.append(stream)


def ptx_of(kernel, entry, capability, cuda) -> str:
    return f"{entry.name} for sm_{capability}, CUDA {cuda[0]}.{cuda[1]}"


def mask_call(**changes):
    """Return good arguments of logits_to_mask_float16 for two pictures of 100 x 80, changed as asked."""
    scalars = logits_to_mask.scalars(PREPROCESSING, 2, 9, (100, 80))
    arrays = {
        "logits": OnDevice((2, 9, 48, 64), "<f2", 0x100000),
        "mask": OnDevice((2, 100, 80), "|u1", 0x900000),
    }
    return LOGITS_TO_MASK.entries[0], {**arrays, **changes}, scalars


def test_arguments_arrive_in_the_order_of_the_source_with_grid_and_block():
    driver = FakeDriver()
    entry, arrays, scalars = mask_call()
    shuffled = dict(sorted(scalars.items()))
    Launcher(driver, ptx_of).launch(LOGITS_TO_MASK, entry, dict(reversed(arrays.items())), shuffled, stream=77)
    assert driver.launches == [
        Launch(
            function="function medseg_logits_to_mask_float16",
            grid=(4, 2, 1),  # 8000 pixels in tiles of 2048; two pictures
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
    names = [each.name for each in kernel.entries[0].parameters if each.kind == "int32"]
    return dict.fromkeys(names, 8)


@pytest.mark.parametrize("name", KERNELS)
def test_every_function_is_packed_as_its_declaration_says(name):
    kernel = load(name)
    for entry in kernel.entries:
        scalars = {
            each.name: some_scalars(kernel).get(each.name, 8) for each in entry.parameters if each.kind == "int32"
        }
        pointers = [each.name for each in entry.parameters if each.kind == "pointer"]
        arrays = {each: 2**40 * place for place, each in enumerate(pointers, 1)}
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


def test_nothing_to_do_is_not_launched():
    entry, _, scalars = mask_call()
    arrays = {"logits": OnDevice((0, 9, 48, 64), "<f2", 0), "mask": OnDevice((0, 100, 80), "|u1", 0)}
    driver = FakeDriver("launch")
    Launcher(driver, ptx_of).launch(LOGITS_TO_MASK, entry, arrays, {**scalars, "batch": 0})
    assert driver.loaded == []


def test_too_many_blocks_are_refused():
    entry, _, scalars = mask_call()
    arrays = {"logits": 2**20, "mask": 2**44}
    with pytest.raises(ValueError, match=r"\(4, 70000, 1\) blocks"):
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


def test_bfloat16_is_told_from_float16():
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


class Status(int):
    """An error code as cuda-bindings has it."""

    name = "CUDA_ERROR_INVALID_VALUE"


class FakeCudaBindings:
    """``cuda.bindings.driver`` on a machine with one sm_89 device and a driver for CUDA 12.6."""

    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR="major", CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR="minor"
    )

    def __init__(self, fail: str = "", context: int = 0) -> None:
        self.fail = fail
        self.calls: list[tuple[Any, ...]] = []
        self.results = {
            "cuDriverGetVersion": 12060,
            "cuCtxGetCurrent": context,
            "cuDeviceGet": "device",
            "cuDevicePrimaryCtxRetain": "primary",
            "cuCtxGetDevice": "device",
            "cuModuleLoadData": "module",
            "cuModuleGetFunction": "function",
            "cuDeviceGetName": b"Fake\0",
        }

    def __getattr__(self, function: str):
        def call(*arguments):
            self.calls.append((function, *arguments))
            if function == self.fail:
                return (Status(1), None)
            if function == "cuDeviceGetAttribute":
                return (0, {"major": 8, "minor": 9}[arguments[0]])
            return (0, self.results[function]) if function in self.results else (0,)

        return call


def test_cuda_bindings_is_called_as_the_driver_api_wants():
    cuda = FakeCudaBindings()
    driver = cuda_bindings_adapter.CudaBindings(cuda, 1)
    assert (driver.capability, driver.cuda) == (89, (12, 6))
    assert ("cuDeviceGet", 1) in cuda.calls
    assert ("cuCtxSetCurrent", "primary") in cuda.calls
    Launcher(driver, ptx_of, wait=True).launch(LOGITS_TO_MASK, *mask_call(), stream=77)
    types = (ctypes.c_void_p, *[ctypes.c_int32] * 8, ctypes.c_void_p)
    values = (0x100000, 2, 9, 48, 64, 48, 64, 100, 80, 0x900000)
    assert cuda.calls[-4:] == [
        ("cuModuleLoadData", b"logits_to_mask_float16 for sm_89, CUDA 12.6\0"),
        ("cuModuleGetFunction", "module", b"medseg_logits_to_mask_float16"),
        ("cuLaunchKernel", "function", 4, 2, 1, 128, 1, 1, 0, 77, (values, types), 0),
        ("cuStreamSynchronize", 77),
    ]


def test_memory_is_filled_read_and_given_back():
    cuda = FakeCudaBindings()
    cuda.results["cuMemAlloc"] = 0x5000
    numbers = np.arange(6, dtype=np.float16).reshape(2, 3)[:, ::-1]  # is copied in its own order
    with DeviceMemory(cuda_bindings_adapter.CudaBindings(cuda, 0)) as memory:
        array = memory.upload(numbers)
        uploaded = cuda.calls[-1]
        assert uploaded[:2] == ("cuMemcpyHtoD", 0x5000)
        assert uploaded[3] == 12
        assert array.__cuda_array_interface__["data"] == (0x5000, False)
        assert (array.__cuda_array_interface__["shape"], array.__cuda_array_interface__["typestr"]) == ((2, 3), "<f2")
        assert memory.download(array).shape == (2, 3)
        assert [call[0] for call in cuda.calls[-2:]] == ["cuStreamSynchronize", "cuMemcpyDtoH"]
        memory.copy(array, array)
        assert cuda.calls[-1] == ("cuMemcpyDtoDAsync", 0x5000, 0x5000, 12, 0)
    assert cuda.calls[-1] == ("cuMemFree", 0x5000)


def test_time_is_that_of_one_launch():
    cuda = FakeCudaBindings()
    cuda.results |= {"cuEventCreate": "event", "cuEventElapsedTime": 12.0}
    launches: list[int] = []
    driver = cuda_bindings_adapter.CudaBindings(cuda, 0)
    assert milliseconds(driver, lambda: launches.append(1), runs=3, repeats=4) == [3.0, 3.0, 3.0]
    assert len(launches) == 3 + 3 * 4  # the first three warm up
    assert [call[0] for call in cuda.calls].count("cuEventRecord") == 6


def test_cuda_bindings_stays_in_the_context_of_the_thread():
    cuda = FakeCudaBindings(context=12345)
    cuda_bindings_adapter.CudaBindings(cuda, 0)
    assert not {"cuCtxSetCurrent", "cuDevicePrimaryCtxRetain"} & {call[0] for call in cuda.calls}


@pytest.mark.parametrize(
    "function", ["cuModuleLoadData", "cuModuleGetFunction", "cuLaunchKernel", "cuStreamSynchronize"]
)
def test_an_error_code_of_cuda_bindings_becomes_an_error_with_the_kernels_name(function):
    driver = cuda_bindings_adapter.CudaBindings(FakeCudaBindings(function), 0)
    with pytest.raises(DeviceError, match=rf"^logits_to_mask_float16: {function} returned 1 CUDA_ERROR_INVALID_VALUE$"):
        Launcher(driver, ptx_of, wait=True).launch(LOGITS_TO_MASK, *mask_call())


class FakePycudaError(Exception):
    """``pycuda.driver.Error``."""


class FakePycuda(ModuleType):
    """``pycuda.driver`` on a machine with one sm_87 device and a driver for CUDA 12.6."""

    Error = FakePycudaError

    def __init__(self, fail: str = "") -> None:
        super().__init__("pycuda.driver")
        self.fail = fail
        self.calls: list[tuple[Any, ...]] = []
        context = SimpleNamespace(push=lambda: self._note("push"), pop=lambda: self._note("pop"))
        self.Device = lambda number: SimpleNamespace(
            retain_primary_context=lambda: (self._note("retain", number), context)[1]
        )
        self.Context = SimpleNamespace(
            get_current=lambda: None,
            get_device=lambda: SimpleNamespace(compute_capability=lambda: (8, 7)),
            synchronize=lambda: self._note("synchronize"),
        )

    def _note(self, *call: Any) -> None:
        self.calls.append(call)
        if call[0] == self.fail:
            raise FakePycudaError(f"{call[0]} failed: invalid argument")

    def init(self) -> None:
        self._note("init")

    def get_driver_version(self) -> int:
        return 12060

    def module_from_buffer(self, buffer: bytes) -> Any:
        self._note("module_from_buffer", buffer)

        def async_call(*arguments, shared_size):
            self._note("async_call", *arguments, shared_size)

        function = SimpleNamespace(prepare=lambda kinds: self._note("prepare", kinds), prepared_async_call=async_call)
        return SimpleNamespace(get_function=lambda symbol: (self._note("get_function", symbol), function)[1])


def test_pycuda_is_called_as_it_wants():
    cuda = FakePycuda()
    driver = pycuda_adapter.Pycuda(cuda, 1)
    assert (driver.capability, driver.cuda) == (87, (12, 6))
    assert cuda.calls == [("init",), ("retain", 1), ("push",)]
    Launcher(driver, ptx_of, wait=True).launch(LOGITS_TO_MASK, *mask_call())
    assert cuda.calls[3:] == [
        ("module_from_buffer", b"logits_to_mask_float16 for sm_87, CUDA 12.6\0"),
        ("get_function", "medseg_logits_to_mask_float16"),
        ("prepare", "PiiiiiiiiP"),
        ("async_call", (4, 2, 1), (128, 1, 1), None, 0x100000, 2, 9, 48, 64, 48, 64, 100, 80, 0x900000, 0),
        ("synchronize",),
    ]


def test_pycuda_uses_its_own_streams_only():
    cuda = FakePycuda()
    launcher = Launcher(pycuda_adapter.Pycuda(cuda, 0), ptx_of, wait=True)
    stream = SimpleNamespace(synchronize=lambda: None)
    launcher.launch(LOGITS_TO_MASK, *mask_call(), stream=stream)
    assert cuda.calls[-1][3] is stream
    with pytest.raises(DeviceError, match=r"^logits_to_mask_float16: pycuda launches on its own Stream objects only"):
        launcher.launch(LOGITS_TO_MASK, *mask_call(), stream=77)


@pytest.mark.parametrize("function", ["module_from_buffer", "get_function", "prepare", "async_call", "synchronize"])
def test_an_error_of_pycuda_becomes_an_error_with_the_kernels_name(function):
    driver = pycuda_adapter.Pycuda(FakePycuda(function), 0)
    with pytest.raises(DeviceError, match=rf"^logits_to_mask_float16: {function} failed: invalid argument$"):
        Launcher(driver, ptx_of, wait=True).launch(LOGITS_TO_MASK, *mask_call())


# --- machines that cannot -------------------------------------------------------------------------------------------


def has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


@pytest.mark.skipif(has_driver(), reason="this machine has an NVIDIA driver")
def test_without_a_driver_the_real_cuda_bindings_ends_in_one_line():
    with pytest.raises(DeviceError, match=r"^no CUDA device 0: .*Kernels need an NVIDIA GPU and its driver$") as caught:
        open_driver("cuda-bindings")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 6


@pytest.mark.parametrize("fail", ["cuInit", "cuDeviceGet"])
def test_without_a_device_cuda_bindings_ends_in_one_line(fail, monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", FakeCudaBindings(fail))
    with pytest.raises(DeviceError, match=rf"^no CUDA device 3: {fail} returned 1 CUDA_ERROR_INVALID_VALUE\. Kernels"):
        open_driver("cuda-bindings", 3)


def test_without_a_device_pycuda_ends_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycuda.driver", FakePycuda("init"))
    with pytest.raises(DeviceError, match=r"^no CUDA device 0: init failed: invalid argument\. Kernels need"):
        open_driver("pycuda")


@pytest.mark.parametrize(("name", "module"), [("cuda-bindings", "cuda.bindings.driver"), ("pycuda", "pycuda.driver")])
def test_a_package_that_is_missing_says_what_to_install(name, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r"pip install 'medseg-trt\[(kernels|pycuda)\]'"):
        open_driver(name)


def test_a_pycuda_whose_driver_is_missing_is_no_missing_package(monkeypatch, tmp_path):
    (tmp_path / "pycuda").mkdir()
    (tmp_path / "pycuda" / "__init__.py").touch()
    (tmp_path / "pycuda" / "driver.py").write_text("raise ImportError('libcuda.so.1: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "pycuda", raising=False)
    with pytest.raises(DeviceError, match=r"^no CUDA device 0: libcuda\.so\.1: cannot open .* Kernels need") as caught:
        open_driver("pycuda")
    assert not isinstance(caught.value, MissingExtraError)


def test_a_typo_lists_the_adapters():
    with pytest.raises(UsageError, match="no CUDA adapter 'cupy'; choose one of: cuda-bindings, pycuda"):
        open_driver("cupy")


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
