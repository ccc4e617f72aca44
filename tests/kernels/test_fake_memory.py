"""Memory, streams, graphs and events through the real cuda-bindings: a driver of ours keeps them in the host's memory.

What the other tests of sessions ask a stand-in for, these ask NVIDIA's package, so that an argument or a result of
another type than it takes and gives is found without a GPU.
"""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_free import driver as fake

pytestmark = pytest.mark.skipif(fake.compiler() is None, reason="needs a C compiler: apt install gcc")
LIMITS = """
import ctypes
import numpy as np
from medseg_trt.kernels.cuda_bindings_adapter import CudaBindings
from medseg_trt.kernels.device import DeviceMemoryError, open_device
from medseg_trt.kernels.device_memory import DeviceMemory, milliseconds
from medseg_trt.kernels.launch import CudaError

def raised(function, *arguments):
    try:
        function(*arguments)
    except CudaError as error:
        return type(error), str(error)

driver = ctypes.CDLL("libcuda.so.1")
before = driver.fake_alive()
device = open_device()
"""
DEVICE = """
free = device.free_bytes()
kind, words = raised(device.allocate, 2 * free)
assert kind is DeviceMemoryError and words == "cuMemAlloc returned 2 CUDA_ERROR_OUT_OF_MEMORY", words
assert raised(device.allocate_host, 2 * free)[0] is DeviceMemoryError
assert raised(device.free, 0) == (CudaError, "cuMemFree returned 1 CUDA_ERROR_INVALID_VALUE")
memory = device.allocate(1000)
assert memory % 256 == 0 and device.free_bytes() == free - 1000
device.free(memory)

with DeviceMemory(device) as memory:
    numbers = memory.upload(np.arange(6, dtype=np.float16).reshape(2, 3))
    copied = memory.upload(np.zeros((2, 3), np.float16))
    stream = device.new_stream()
    copies = [lambda stream: memory.copy(numbers, copied, stream)] * 4
    assert milliseconds(device, copies, runs=3) == [1.0] * 3  # a copy is a millisecond of the fake's clock
    assert (memory.download(copied) == np.arange(6).reshape(2, 3)).all()
    device.begin_capture(stream)
    assert raised(device.synchronize, stream) == (CudaError, "cuStreamSynchronize returned 900 "
                                                  "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED")
    device.free_graph(device.end_capture(stream))
    device.free_stream(stream)
assert driver.fake_alive() == before
"""
SESSION = """
from types import SimpleNamespace
from medseg_trt.sessions.tensorrt import TensorRtSession
from medseg_trt.sessions.tensorrt_engine import Engine, Tensor

class Copying:
    '''A network whose logits are its images.'''

    def prepare(self, batch, source, target):
        self.call = "cuMemcpyDtoDAsync", target, source, batch * pixels.nbytes

    def enqueue(self, stream):
        device.call(*self.call, stream)

    def is_capturable(self, stream):
        return isinstance(stream, int)

pixels = Tensor(name="pixel_values", dtype=np.dtype(np.float32), shape=(3, 4, 5))
engine = SimpleNamespace(input=pixels, output=pixels, least=1, usual=2, most=4, activation_bytes=64,
                         context=lambda address: Copying(), close=lambda: None)
engine.filled_up = lambda images: Engine.filled_up(engine, images)
rng = np.random.default_rng(0)
with TensorRtSession(engine, device, "tensorrt-rtx", "copying") as session:
    session.warm_up()
    for images in (1, 4, 9, 3, 1, 9):
        batch = rng.normal(size=(images, 3, 4, 5)).astype(np.float32)
        assert (session.run(batch) == batch).all()
    times = session.time_on_device(batch, 0.0, 5)
    assert times.compute_ms == [3.0] * 5  # three pieces, a copy each
    assert (set(times.upload_ms), set(times.download_ms)) == ({1.0}, {1.0})
    assert len(times.images_per_s) == 1 and times.images_per_s[0] > 0
    assert [batch.graph is not None for stream in session._streams._free for batch in stream._batches.values()]
assert driver.fake_alive() == before, driver.fake_alive()
"""
KERNELS = """
from medseg_trt.kernels import load
from medseg_trt.kernels.launch import Launcher
kernel = load("swiglu")
text = ".visible .entry medseg_swiglu_float16(.param .u64 a, .param .u32 b, .param .u32 c, .param .u64 d)"
for launcher in (Launcher(open_device(), lambda *_: text) for _ in range(3)):
    launcher.launch(kernel, kernel.entry("swiglu_float16"), {"gate_up": 1 << 20, "y": 1 << 40}, {"rows": 1, "width": 8})
    assert driver.fake_modules() == 1
    launcher.close()
assert driver.fake_modules() == 0
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed: pip install 'medseg-trt[kernels]'")
    importlib.metadata.version("cuda-bindings")  # no stand-in of another test
    return fake.build(tmp_path_factory.mktemp("driver"))


@pytest.mark.parametrize("program", [DEVICE, SESSION, KERNELS], ids=["device", "session", "kernels"])
def test_adapter_and_session_run_with_the_real_cuda_bindings_on_a_fake_driver(program, folder):
    fake.python(folder, LIMITS + program)


# --- faults on purpose ---------------------------------------------------------------------------------------------

WITHOUT_FLAGS = """
def end_capture(device, stream):
    return device.call("cuGraphInstantiate", device.call("cuStreamEndCapture", stream))
CudaBindings.end_capture = end_capture
"""
FAULTS = {
    "a handle that is no number": (
        SESSION,
        'CudaBindings.new_stream = lambda device: str(device.call("cuStreamCreate", 1))',
    ),
    "a graph without flags": (SESSION, WITHOUT_FLAGS),
    "an event without time": (SESSION, 'CudaBindings.new_event = lambda device: device.call("cuEventCreate", 2)'),
    "a graph that is kept": (SESSION, "CudaBindings.free_graph = lambda device, graph: None"),
    "a module that is kept": (KERNELS, "CudaBindings.unload = lambda device: None"),
    "total memory for free memory": (
        DEVICE,
        "CudaBindings.free_bytes = lambda device: int(device._cuda.cuMemGetInfo()[2])",
    ),
}
ERRORS = ("TypeError", "AssertionError", "CudaError", "DeviceError")


@pytest.mark.parametrize("fault", FAULTS)
def test_adapter_fault_fails_with_the_real_cuda_bindings(fault, folder):
    program, changed = FAULTS[fault]
    with pytest.raises(subprocess.CalledProcessError) as caught:
        fake.python(folder, LIMITS + changed + program)
    assert any(error in caught.value.__notes__[0] for error in ERRORS)


# --- tests that need a GPU -----------------------------------------------------------------------------------------

WARNS = """
import warnings, pytest

pytestmark = [pytest.mark.gpu]

def test_a_library_warns():
    warnings.warn("this card is new to me", UserWarning)
"""


def test_a_warning_of_a_library_on_a_card_is_shown_and_fails_nothing(folder, tmp_path):
    test = tmp_path / "test_warns.py"
    test.write_text(WARNS)
    root = Path(__file__).parents[2]
    command = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", "-c", root / "pyproject.toml"]
    command += ["--rootdir", root, "-m", "gpu", "-p", "conftest", test]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(root / "tests")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "this card is new to me" in done.stdout
    assert "1 passed" in done.stdout
