"""The adapters of cuda-bindings and PyCUDA: which calls of the driver they make, and how they fail."""

import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fakes.launches import LOGITS_TO_MASK, mask_call, ptx_of

from medseg_trt.errors import DeviceError, MissingExtraError, UsageError
from medseg_trt.gpu import Gpu
from medseg_trt.kernels import cuda_bindings_adapter, pycuda_adapter
from medseg_trt.kernels.device_memory import DeviceMemory, milliseconds
from medseg_trt.kernels.launch import Launcher, open_driver
from medseg_trt.kernels.modules import ModuleCache


class Status(int):
    """An error code as cuda-bindings has it."""

    name = "CUDA_ERROR_INVALID_VALUE"


class FakeCudaBindings:
    """``cuda.bindings.driver`` on a machine with one sm_89 device and a driver for CUDA 12.6."""

    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR="major", CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR="minor"
    )
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)

    def __init__(self, fail: str = "", context: int = 0) -> None:
        self.fail = fail
        self.calls: list[tuple[Any, ...]] = []
        self.results = {
            "cuDriverGetVersion": 12060,
            "cuCtxGetCurrent": context,
            "cuDeviceGet": 1,
            "cuDevicePrimaryCtxRetain": "primary",
            "cuCtxGetDevice": 1,
            "cuModuleLoadData": "module",
            "cuModuleGetFunction": "function",
            "cuDeviceGetName": b"Fake\0",
        }

    def __getattr__(self, function: str):
        def call(*arguments):
            self.calls.append((function, *arguments))
            if function == self.fail:
                return (Status(1), None) if function in self.results else (Status(1),)
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
        ("cuLaunchKernel", "function", 63, 2, 1, 128, 1, 1, 0, 77, (values, types), 0),
        ("cuStreamSynchronize", 77),
    ]


def test_a_ptx_is_loaded_once_for_all_adapters_and_unloaded_after_the_last():
    cuda = FakeCudaBindings(context=12345)
    drivers = [cuda_bindings_adapter.CudaBindings(cuda, 0) for _ in range(5)]
    launchers = [Launcher(driver, ptx_of) for driver in drivers]
    for launcher in launchers:
        for dtype in ("float16", "float32"):
            entry = LOGITS_TO_MASK.entry(f"logits_to_mask_{dtype}")
            launcher.launch(LOGITS_TO_MASK, entry, {"logits": 0x100000, "mask": 0x900000}, mask_call()[2])
    names = [call[0] for call in cuda.calls]
    assert names.count("cuModuleLoadData") == 2
    for launcher in launchers[1:]:
        launcher.close()
    assert "cuModuleUnload" not in [call[0] for call in cuda.calls]
    launchers[0].close()
    assert cuda.calls[-3:] == [("cuCtxPushCurrent", 12345), ("cuModuleUnload", "module"), ("cuCtxPopCurrent",)]
    assert [call[0] for call in cuda.calls].count("cuModuleUnload") == 2
    launchers[0].launch(LOGITS_TO_MASK, *mask_call())
    assert [call[0] for call in cuda.calls].count("cuModuleLoadData") == 3
    del drivers, launcher, launchers  # nobody closed the last one
    assert [call[0] for call in cuda.calls].count("cuModuleUnload") == 3


def test_launcher_close_tolerates_a_destroyed_context():
    cuda = FakeCudaBindings(context=12345)
    launcher = Launcher(cuda_bindings_adapter.CudaBindings(cuda, 0), ptx_of)
    launcher.launch(LOGITS_TO_MASK, *mask_call())
    cuda.fail = "cuCtxPushCurrent"
    launcher.close()
    assert cuda.calls[-1] == ("cuCtxPushCurrent", 12345)  # what another library has made current stays so


def loads_for_every_adapter(monkeypatch):
    monkeypatch.setattr(
        cuda_bindings_adapter.MODULES, "get", lambda key, load, unload: ModuleCache().get(key, load, unload)
    )


def unloads_nothing(monkeypatch):
    monkeypatch.setattr(cuda_bindings_adapter, "_unloader", lambda *_: lambda module: None)


def unloads_with_the_first(monkeypatch):
    real = cuda_bindings_adapter.CudaBindings.unload

    def unload(driver):
        for module in driver._modules:
            driver.call("cuModuleUnload", module.handle)
        real(driver)

    monkeypatch.setattr(cuda_bindings_adapter.CudaBindings, "unload", unload)


FAULTS = (loads_for_every_adapter, unloads_nothing, unloads_with_the_first)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_of_the_modules_is_noticed(fault, monkeypatch):
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        test_a_ptx_is_loaded_once_for_all_adapters_and_unloaded_after_the_last()


def test_contexts_do_not_share_modules():
    cuda = FakeCudaBindings(context=1)
    one = cuda_bindings_adapter.CudaBindings(cuda, 0)
    cuda.results["cuCtxGetCurrent"] = 2
    other = cuda_bindings_adapter.CudaBindings(cuda, 0)
    for driver in (one, other):
        Launcher(driver, ptx_of).launch(LOGITS_TO_MASK, *mask_call())
    assert [call[0] for call in cuda.calls].count("cuModuleLoadData") == 2


def test_another_device_than_the_threads_gets_its_own_context():
    cuda = FakeCudaBindings(context=12345)
    cuda.results["cuCtxGetDevice"] = 0
    cuda_bindings_adapter.CudaBindings(cuda, 1)
    assert ("cuDevicePrimaryCtxRetain", 1) in cuda.calls
    assert ("cuCtxSetCurrent", "primary") in cuda.calls


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
        memory.copy(array, array, 7)
        assert cuda.calls[-1] == ("cuMemcpyDtoDAsync", 0x5000, 0x5000, 12, 7)
    assert cuda.calls[-1] == ("cuMemFree", 0x5000)


def test_time_is_that_of_one_launch_in_a_graph_of_all():
    cuda = FakeCudaBindings()
    cuda.results |= {"cuStreamCreate": 9, "cuEventCreate": "event", "cuEventElapsedTime": 12.0}
    cuda.results |= {"cuStreamEndCapture": "graph", "cuGraphInstantiate": "executable"}
    driver = cuda_bindings_adapter.CudaBindings(cuda, 0)
    launches = [partial(driver.clear, buffer, 8) for buffer in (0x1000, 0x2000, 0x3000, 0x4000)]
    cuda.calls.clear()
    assert milliseconds(driver, launches, runs=2) == [3.0, 3.0]
    names = [call[0] for call in cuda.calls if not call[0].startswith("cuEvent")]
    graph = [
        "cuStreamBeginCapture",
        *["cuMemsetD8Async"] * 4,
        "cuStreamEndCapture",
        "cuGraphInstantiate",
        "cuGraphDestroy",
    ]
    runs = ["cuGraphLaunch", "cuStreamSynchronize"] * 4  # the first two warm up
    assert names == ["cuStreamCreate", *graph, *runs, "cuGraphExecDestroy", "cuStreamDestroy"]
    assert all(call[-1] == 9 for call in cuda.calls if call[0] in ("cuMemsetD8Async", "cuGraphLaunch", "cuEventRecord"))
    assert [call[0] for call in cuda.calls].count("cuEventRecord") == 8
    assert [call[0] for call in cuda.calls].count("cuEventDestroy") == 2


def test_cuda_bindings_stays_in_the_context_of_the_thread():
    cuda = FakeCudaBindings(context=12345)
    cuda_bindings_adapter.CudaBindings(cuda, 0)
    assert not {"cuCtxSetCurrent", "cuDevicePrimaryCtxRetain"} & {call[0] for call in cuda.calls}


def test_without_a_number_it_is_the_device_of_the_threads_context():
    cuda = FakeCudaBindings(context=12345)
    cuda.results["cuCtxGetDevice"] = 2
    cuda_bindings_adapter.CudaBindings(cuda, None)
    assert not {"cuDeviceGet", "cuCtxSetCurrent", "cuDevicePrimaryCtxRetain"} & {call[0] for call in cuda.calls}
    assert ("cuDeviceGetAttribute", "major", 2) in cuda.calls
    cuda = FakeCudaBindings()
    cuda_bindings_adapter.CudaBindings(cuda, None)
    assert ("cuDeviceGet", 0) in cuda.calls
    assert ("cuCtxSetCurrent", "primary") in cuda.calls


@pytest.mark.parametrize(
    "function", ["cuModuleLoadData", "cuModuleGetFunction", "cuLaunchKernel", "cuStreamSynchronize"]
)
def test_an_error_code_of_cuda_bindings_becomes_an_error_with_the_kernels_name(function):
    driver = cuda_bindings_adapter.CudaBindings(FakeCudaBindings(function), 0)
    with pytest.raises(DeviceError, match=rf"^logits_to_mask_float16: {function} returned 1 CUDA_ERROR_INVALID_VALUE$"):
        Launcher(driver, ptx_of, wait=True).launch(LOGITS_TO_MASK, *mask_call())


class FakePycudaError(Exception):
    """``pycuda.driver.Error``."""

    words = "invalid argument"


class FakePycudaMemoryError(FakePycudaError):
    """``pycuda.driver.MemoryError``."""

    words = "out of memory"


@dataclass(frozen=True)
class FakePycudaDevice:
    """``pycuda.driver.Device``, which is equal to another one of the same number."""

    number: int
    retain_primary_context: Callable[[], Any] = field(compare=False)

    def compute_capability(self) -> tuple[int, int]:
        return 8, 7


class FakePycuda(ModuleType):
    """``pycuda.driver`` on a machine with one sm_87 device and a driver for CUDA 12.6."""

    Error = FakePycudaError
    MemoryError = FakePycudaMemoryError

    def __init__(self, fail: str = "", current: int | None = None) -> None:
        super().__init__("pycuda.driver")
        self.fail = fail
        self.error = FakePycudaError
        self.calls: list[tuple[Any, ...]] = []
        context = SimpleNamespace(push=lambda: self._note("push"), pop=lambda: self._note("pop"))
        self.Device = lambda number: FakePycudaDevice(number, lambda: (self._note("retain", number), context)[1])
        self.Context = SimpleNamespace(
            get_current=lambda: None if current is None else context,
            get_device=lambda: self.Device(current or 0),
            synchronize=lambda: self._note("synchronize"),
        )

    def _note(self, *call: Any) -> None:
        self.calls.append(call)
        if call[0] == self.fail:
            raise self.error(f"{call[0]} failed: {self.error.words}")

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
        ("async_call", (63, 2, 1), (128, 1, 1), None, 0x100000, 2, 9, 48, 64, 48, 64, 100, 80, 0x900000, 0),
        ("synchronize",),
    ]


@pytest.mark.parametrize("device", [1, None])
def test_pycuda_stays_in_a_current_context_of_the_device(device):
    cuda = FakePycuda(current=1)
    pycuda_adapter.Pycuda(cuda, device)
    assert cuda.calls == [("init",)]


def test_pycuda_refuses_another_device_than_that_of_the_current_context(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycuda.driver", FakePycuda(current=1))
    with pytest.raises(UsageError, match=r"^the current CUDA context is of another GPU than cuda:0; push a context"):
        open_driver("pycuda", 0)


def test_too_little_memory_for_a_module_of_pycuda_is_said_in_words():
    cuda = FakePycuda("module_from_buffer")
    cuda.error = FakePycudaMemoryError
    driver = pycuda_adapter.Pycuda(cuda, 0)
    with pytest.raises(DeviceError, match=r"not enough memory \(module_from_buffer failed: out of memory\)"):
        Launcher(driver, ptx_of).launch(LOGITS_TO_MASK, *mask_call())


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
    with pytest.raises(DeviceError, match=r"^there is no GPU cuda:0: no NVIDIA driver is installed; see") as caught:
        open_driver("cuda-bindings")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 6


FAILING = [
    ("cuda-bindings", FakeCudaBindings("cuInit"), "cuInit returned 1 CUDA_ERROR_INVALID_VALUE"),
    ("cuda-bindings", FakeCudaBindings("cuDevicePrimaryCtxRetain"), "cuDevicePrimaryCtxRetain returned 1 CUDA_ERROR_"),
    ("pycuda", FakePycuda("init"), "init failed: invalid argument"),
]


@pytest.mark.parametrize(("name", "package", "words"), FAILING)
def test_a_device_that_cannot_be_opened_is_told_from_one_that_is_missing(name, package, words, monkeypatch):
    monkeypatch.setitem(sys.modules, {"cuda-bindings": "cuda.bindings.driver"}.get(name, "pycuda.driver"), package)
    monkeypatch.setattr("medseg_trt.gpu.find_gpu", lambda number: None)
    with pytest.raises(DeviceError, match=r"^there is no GPU cuda:3: "):
        open_driver(name, 3)
    monkeypatch.setattr("medseg_trt.gpu.find_gpu", lambda number: Gpu(name="A10", sm="sm86", cuda="13.0", driver=None))
    with pytest.raises(DeviceError, match=rf"^A10, cuda:3, cannot be opened: {words}"):
        open_driver(name, 3)


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
    with pytest.raises(DeviceError, match=r"^there is no GPU cuda:0: ") as caught:
        open_driver("pycuda")
    assert not isinstance(caught.value, MissingExtraError)


def test_a_typo_lists_the_adapters():
    with pytest.raises(UsageError, match="no CUDA adapter 'cupy'; choose one of: cuda-bindings, pycuda"):
        open_driver("cupy")
