"""Streams, memory and graphs of the real adapter, over a module that records what it is asked."""

import ctypes
import inspect
import sys
from types import SimpleNamespace

import pytest

from medseg_trt.errors import DeviceError
from medseg_trt.kernels.cuda_bindings_adapter import CudaBindings
from medseg_trt.kernels.device import Device, DeviceMemoryError, open_device
from medseg_trt.kernels.launch import CudaError, Driver

THREAD_LOCAL = "thread local"


class Status(int):
    name = "CUDA_ERROR_OF_A_KIND"


class FakeDriverModule:
    """``cuda.bindings.driver``; every call is recorded, and returns a number of its own or what is set."""

    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=8, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=9
    )
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=THREAD_LOCAL)

    def __init__(self):
        self.calls = []
        self.status = {}
        self.results = {
            "cuDriverGetVersion": (13000,),
            "cuCtxGetCurrent": (0x77,),
            "cuDeviceGet": (0,),
            "cuCtxGetDevice": (0,),
            "cuDeviceGetName": (b"GPU\0\0\0",),
            "cuMemAlloc": (0x1000,),
            "cuMemAllocHost": (0x2000,),
            "cuMemGetInfo": (123, 456),
            "cuStreamCreate": (0x30,),
            "cuStreamEndCapture": ("graph",),
            "cuGraphInstantiate": ("executable",),
            "cuEventCreate": ("event",),
            "cuEventElapsedTime": (1.25,),
        }

    def __getattr__(self, function):
        if not function.startswith("cu"):
            raise AttributeError(function)

        def call(*arguments):
            self.calls.append((function, *arguments))
            if function == "cuDeviceGetAttribute":
                return 0, arguments[0]
            return Status(self.status.get(function, 0)), *self.results.get(function, ())

        return call


@pytest.fixture
def module():
    return FakeDriverModule()


@pytest.fixture
def device(module):
    opened = CudaBindings(module, 0)
    module.calls.clear()
    return opened


CALLS = {
    "activate": ((), [("cuCtxSetCurrent", 0x77)], None),
    "free_bytes": ((), [("cuMemGetInfo",)], 123),
    "allocate": ((64,), [("cuMemAlloc", 64)], 0x1000),
    "free": ((0x1000,), [("cuMemFree", 0x1000)], None),
    "allocate_host": ((64,), [("cuMemAllocHost", 64)], 0x2000),
    "free_host": ((0x2000,), [("cuMemFreeHost", 0x2000)], None),
    "new_stream": ((), [("cuStreamCreate", 1)], 0x30),
    "free_stream": ((0x30,), [("cuStreamDestroy", 0x30)], None),
    "clear": ((0x1000, 8, 0x30), [("cuMemsetD8Async", 0x1000, 0, 8, 0x30)], None),
    "upload": ((0x1000, 0x2000, 8, 0x30), [("cuMemcpyHtoDAsync", 0x1000, 0x2000, 8, 0x30)], None),
    "download": ((0x2000, 0x1000, 8, 0x30), [("cuMemcpyDtoHAsync", 0x2000, 0x1000, 8, 0x30)], None),
    "begin_capture": ((0x30,), [("cuStreamBeginCapture", 0x30, THREAD_LOCAL)], None),
    "end_capture": (
        (0x30,),
        [("cuStreamEndCapture", 0x30), ("cuGraphInstantiate", "graph", 0), ("cuGraphDestroy", "graph")],
        "executable",
    ),
    "launch_graph": (("executable", 0x30), [("cuGraphLaunch", "executable", 0x30)], None),
    "free_graph": (("executable",), [("cuGraphExecDestroy", "executable")], None),
    "new_event": ((), [("cuEventCreate", 0)], "event"),
    "free_event": (("event",), [("cuEventDestroy", "event")], None),
    "record_event": (("event", 0x30), [("cuEventRecord", "event", 0x30)], None),
    "wait_event": (("event",), [("cuEventSynchronize", "event")], None),
    "elapsed_ms": (("first", "second"), [("cuEventElapsedTime", "first", "second")], 1.25),
}


def test_every_abstract_method_of_device_is_tested():
    assert set(CALLS) == set(Device.__abstractmethods__ - Driver.__abstractmethods__)


@pytest.mark.parametrize("method", CALLS)
def test_device_method_makes_the_expected_driver_calls(device, module, method):
    arguments, calls, result = CALLS[method]
    assert getattr(device, method)(*arguments) == result
    assert module.calls == calls


@pytest.mark.parametrize("method", CALLS)
def test_an_error_code_is_raised_by_its_name(device, module, method):
    arguments, calls, _ = CALLS[method]
    module.status[calls[0][0]] = 700
    with pytest.raises(CudaError, match=rf"^{calls[0][0]} returned 700 CUDA_ERROR_OF_A_KIND$"):
        getattr(device, method)(*arguments)


def test_a_lack_of_memory_is_told_from_other_errors(device, module):
    module.status = {"cuMemAlloc": 2, "cuMemAllocHost": 2}
    for allocate in (device.allocate, device.allocate_host):
        with pytest.raises(DeviceMemoryError):
            allocate(64)
    module.status = {"cuMemAlloc": 1}
    with pytest.raises(CudaError) as caught:
        device.allocate(64)
    assert not isinstance(caught.value, DeviceMemoryError)


def test_allocating_0_bytes_allocates_1_byte(device, module):
    device.allocate(0)
    device.allocate_host(0)
    assert module.calls == [("cuMemAlloc", 1), ("cuMemAllocHost", 1)]


def test_a_graph_that_cannot_be_made_executable_is_given_back(device, module):
    module.status["cuGraphInstantiate"] = 700
    with pytest.raises(CudaError):
        device.end_capture(0x30)
    assert module.calls[-1] == ("cuGraphDestroy", "graph")


def test_device_reports_name_capability_and_cuda_version(device):
    assert (device.name, device.capability, device.cuda) == ("GPU", 89, (13, 0))


def test_the_real_module_has_every_function_with_as_many_arguments():
    driver = pytest.importorskip("cuda.bindings.driver")
    for _, calls, _ in CALLS.values():
        for function, *arguments in calls:
            first_line = (inspect.getdoc(getattr(driver, function)) or "").splitlines()[0]
            inside = first_line.partition("(")[2].rpartition(")")[0]
            assert len([argument for argument in inside.split(",") if argument.strip()]) == len(arguments), first_line
    assert hasattr(driver.CUstreamCaptureMode, "CU_STREAM_CAPTURE_MODE_THREAD_LOCAL")
    assert int(driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY) == 2
    assert int(driver.CUstream_flags.CU_STREAM_NON_BLOCKING) == 1


def test_without_a_driver_it_is_one_line():
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        with pytest.raises(
            DeviceError, match=r"^there is no GPU cuda:0: no NVIDIA driver is installed; see medseg-trt doctor"
        ):
            open_device()
    else:
        pytest.skip("this machine has an NVIDIA driver")


def test_an_adapter_without_streams_is_refused(monkeypatch):
    before = set(sys.modules)  # another test of this process may have put a stand-in there
    bare = type("Bare", (Driver,), dict.fromkeys(Driver.__abstractmethods__))()
    monkeypatch.setattr("medseg_trt.kernels.device.open_driver", lambda *_: bare)
    with pytest.raises(DeviceError, match="has no streams and graphs"):
        open_device()
    assert "pycuda" not in sys.modules.keys() - before
