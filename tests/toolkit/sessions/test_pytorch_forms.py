"""PyTorch's ways to run a checkpoint, on the CPU and on a stand-in for CUDA that records what it is asked."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import make_checkpoint

from medseg_trt import devices
from medseg_trt.devices import AUTO, CPU, ComputeDevice
from medseg_trt.errors import DeviceError
from medseg_trt.gpu import Gpu
from medseg_trt.pytorch_build import PyTorchBuild
from medseg_trt.sessions import pytorch
from medseg_trt.sessions.pytorch import PyTorchSession, open_graph
from medseg_trt.sessions.pytorch_forms import EAGER, FORMATS, FORMS, PEERS_ON_GPU
from medseg_trt.train.checkpoint import load_checkpoint
from medseg_trt.train.torch_device import torch_device


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def image():
    return np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)


@pytest.fixture(autouse=True)
def switches():
    """Leave PyTorch's switches as they were."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def test_every_peer_is_a_format_and_a_form():
    assert {arithmetic for arithmetic, _ in PEERS_ON_GPU} <= set(FORMATS)
    assert {form for _, form in PEERS_ON_GPU} <= set(FORMS)
    assert ("fp32", EAGER) not in PEERS_ON_GPU  # the reference
    assert {"channels-last", "cuda-graph", "reduce-overhead", "max-autotune"} <= {form for _, form in PEERS_ON_GPU}


@pytest.mark.parametrize(("arithmetic", "form", "limit"), [("fp32", "channels-last", 1e-4), ("bf16", EAGER, 0.5)])
def test_pytorch_form_is_close_to_the_fp32_logits(checkpoint, image, arithmetic, form, limit):
    with open_graph(checkpoint, "fp32", None, "fp32") as reference:
        expected = reference.run(image)
    with open_graph(checkpoint, "fp32", None, arithmetic, CPU, form) as session:
        logits = session.run(image)
        assert session.time_on_device(image, 0.0, 1) is None  # a CPU has no such clock
    assert logits.dtype == np.float32
    assert 0 < np.abs(logits - expected).max() < limit


@pytest.mark.parametrize(("arithmetic", "allowed"), [("fp32", False), ("tf32", True), ("fp16", False)])
def test_the_reference_multiplies_without_tf32(checkpoint, arithmetic, allowed):
    torch.backends.cudnn.allow_tf32 = not allowed  # PyTorch's default is on
    PyTorchSession(load_checkpoint(checkpoint).model(), None, arithmetic).close()
    assert torch.backends.cudnn.allow_tf32 is allowed
    assert (torch.get_float32_matmul_precision() != "highest") is allowed


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_a_compiled_form_is_compiled_in_its_mode(checkpoint, image, mode, monkeypatch):
    modes = []
    monkeypatch.setattr(torch, "compile", lambda network, mode: modes.append(mode) or network)
    with open_graph(checkpoint, "fp32", None, "fp32", CPU, mode) as session:
        session.run(image)
        assert session.description.endswith(f"torch.compile, {mode}")
    assert modes == [mode]


def test_a_cuda_graph_needs_a_gpu(checkpoint):
    with pytest.raises(DeviceError, match="--device cuda"):
        open_graph(checkpoint, "fp32", None, "fp32", CPU, "cuda-graph")


class FakeCuda:
    """As much of ``torch.cuda`` as a session uses; work is done at once, and every call is recorded."""

    def __init__(self):
        self.calls = []
        self.clock = 0.0

    def __getattr__(self, name):
        def call(*arguments):
            self.calls.append(name)
            return _Context(self, name)

        return call

    def Stream(self):  # noqa: N802  # PyTorch's name
        number = self.calls.count("Stream")
        self.calls.append("Stream")
        return SimpleNamespace(
            number=number,
            synchronize=lambda: self.calls.append(f"synchronize {number}"),
            wait_stream=lambda _: self.calls.append("wait_stream"),
        )

    def stream(self, stream):
        self.calls.append(f"stream {stream.number}")
        return _Context(self, f"stream {stream.number}")

    def Event(self, enable_timing):  # noqa: N802  # PyTorch's name
        assert enable_timing
        event = SimpleNamespace(at=None)

        def record():
            self.calls.append("record")
            self.clock += 1.0
            event.at = self.clock

        event.record = record
        event.synchronize = lambda: self.calls.append("wait")
        event.elapsed_time = lambda stop: stop.at - event.at
        return event


class _Context:
    def __init__(self, cuda, name):
        self._cuda, self._name = cuda, name

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._cuda.calls.append(f"end {self._name}")

    def replay(self):
        self._cuda.calls.append("replay")

    def wait_stream(self, _):
        self._cuda.calls.append("wait_stream")


def test_a_graph_is_captured_once_for_each_shape_after_runs_in_another_stream(monkeypatch):
    cuda, runs = FakeCuda(), []
    monkeypatch.setattr(torch, "cuda", cuda)
    graphs = pytorch._Graphs(lambda images: runs.append(1) or 2 * images, lambda: _Context(cuda, "autocast"))
    images = torch.ones(1, 3, 4, 4)
    for batch in (images, images, torch.ones(2, 3, 4, 4), images):
        graphs(batch)
    assert cuda.calls.count("CUDAGraph") == 2
    assert cuda.calls.count("replay") == 4
    assert len(runs) == 2 * (pytorch.GRAPH_WARM_UPS + 1)
    first = cuda.calls[: cuda.calls.index("replay")]
    assert first.index("end stream 0") < first.index("graph") < first.index("end graph")


def test_pytorch_on_a_gpu_keeps_launches_in_flight_and_times_copies_apart(checkpoint, image, monkeypatch):
    cuda = FakeCuda()
    session = PyTorchSession(load_checkpoint(checkpoint).model())
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(session, "_device", SimpleNamespace(type="cuda"))
    monkeypatch.setattr(session, "_uploaded", lambda batch: torch.from_numpy(batch))
    times = session.time_on_device(image, 0.0, 5)
    assert times is not None
    assert (len(times.compute_ms), len(times.enqueue_ms)) == (5, 5)
    assert (len(times.upload_ms), len(times.download_ms)) == (pytorch.COPIES, pytorch.COPIES)
    calls = cuda.calls[cuda.calls.index("record") :]
    assert calls[:4] == ["record"] * 4  # two launches before the first wait
    assert set(times.compute_ms) == {1.0}


class GraphOutput(torch.Tensor):
    """The output of a CUDA graph of torch.compile, which may not be read once the next run has begun."""

    overwritten = False

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        read = [value for value in args if isinstance(value, GraphOutput) and value.overwritten]
        if read and func is not torch.empty_like:  # which takes the shape alone
            raise RuntimeError("accessing tensor output of CUDAGraphs that has been overwritten by a subsequent run")
        return super().__torch_function__(func, types, args, kwargs)


def test_the_logits_of_a_compiled_graph_are_not_read_after_the_next_run(checkpoint, image, monkeypatch):
    cuda, outputs = FakeCuda(), list[GraphOutput]()
    session = PyTorchSession(load_checkpoint(checkpoint).model())
    network = session._forward

    def forward(images):
        if outputs:
            outputs[-1].overwritten = True
        outputs.append(network(images).as_subclass(GraphOutput))
        return outputs[-1]

    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(session, "_device", SimpleNamespace(type="cuda"))
    monkeypatch.setattr(session, "_uploaded", lambda batch: torch.from_numpy(batch))
    monkeypatch.setattr(session, "_forward", forward)
    monkeypatch.setattr(session, "_overlaps", False)
    times = session.time_on_device(image, 0.0, 5)
    assert times is not None
    assert len(times.download_ms) == pytorch.COPIES


OVERLAP = [
    *("stream 0", "end stream 0", "stream 1", "end stream 1"),
    *("synchronize 0", "stream 0", "end stream 0"),
    *("synchronize 1", "stream 1", "end stream 1"),
    *("synchronize 0", "synchronize 1"),
]


@pytest.mark.parametrize("form", FORMS)
def test_two_streams_of_pytorch_overlap_and_a_form_with_one_input_and_output_is_not_measured(
    checkpoint, image, form, monkeypatch
):
    cuda, session = FakeCuda(), PyTorchSession(load_checkpoint(checkpoint).model())
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(session, "_device", SimpleNamespace(type="cuda"))
    monkeypatch.setattr(session, "_uploaded", lambda batch: torch.from_numpy(batch))
    monkeypatch.setattr(session, "_overlaps", FORMS[form].overlaps)
    times = session.time_on_device(image, 0.0, 4)
    assert times is not None
    assert len(times.images_per_s) == (1 if form in (EAGER, "channels-last") else 0)
    overlap = [call for call in cuda.calls if call.split()[0] in ("stream", "end", "synchronize")]
    assert (overlap[-len(OVERLAP) :] == OVERLAP) is FORMS[form].overlaps


def test_every_turn_of_the_throughput_has_the_same_streams(checkpoint, image, monkeypatch):
    """PyTorch keeps the memory of a network for every stream that it has run in."""
    cuda, session = FakeCuda(), PyTorchSession(load_checkpoint(checkpoint).model())
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(session, "_device", SimpleNamespace(type="cuda"))
    monkeypatch.setattr(session, "_uploaded", lambda batch: torch.from_numpy(batch))
    for _ in range(3):
        times = session.time_on_device(image, 0.0, 4)
        assert times is not None
        assert len(times.images_per_s) == 1
    assert cuda.calls.count("Stream") == pytorch.STREAMS


@pytest.mark.parametrize("device", [CPU, AUTO])
def test_without_a_gpu_pytorch_takes_the_cpu_where_it_may(device):
    if torch.cuda.is_available() and device is AUTO:
        pytest.skip("this machine has a GPU")
    assert torch_device(device) == torch.device("cpu")


def test_torch_device_error_explains_a_missing_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("medseg_trt.gpu.find_gpu", lambda number: None)
    with pytest.raises(
        DeviceError, match=r"there is no GPU cuda:0: .*; see medseg-trt doctor, or choose --device cpu$"
    ):
        torch_device(ComputeDevice("cuda"))
    monkeypatch.setattr("medseg_trt.gpu.find_gpu", lambda number: Gpu(name="A10", sm="sm86", cuda="12.0", driver=None))
    monkeypatch.setattr(devices, "pytorch_build", lambda: PyTorchBuild(version="2.13.0+cpu", cuda=None))
    with pytest.raises(
        DeviceError, match=r"--device cuda:0: PyTorch 2.13.0\+cpu is built without CUDA; install one for"
    ):
        torch_device(ComputeDevice("cuda"))
    monkeypatch.setattr(devices, "pytorch_build", lambda: PyTorchBuild(version="2.13.0", cuda="13.0"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(DeviceError, match=r"built for CUDA 13\.0, does not start on A10: its driver may be too old"):
        torch_device(ComputeDevice("cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert torch_device(AUTO) == torch.device("cuda", 0)
    assert torch_device(ComputeDevice("cuda", 1)) == torch.device("cuda", 1)
    with pytest.raises(DeviceError, match="PyTorch finds 2 GPU"):
        torch_device(ComputeDevice("cuda", 2))


OUT_OF_MEMORY = (
    "CUDA out of memory. Tried to allocate 20.00 MiB. "
    "GPU 0 has a total capacity of 7.79 GiB of which 11.06 MiB is free. "
    "Including non-PyTorch memory, this process has 7.77 GiB memory in use.\n"
    "If reserved but unallocated memory is large"
)


def test_too_little_memory_is_one_line_with_what_is_free(checkpoint, image, monkeypatch):
    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError(OUT_OF_MEMORY)

    session = PyTorchSession(load_checkpoint(checkpoint).model())
    monkeypatch.setattr(session, "_forward", refuse)
    with pytest.raises(DeviceError) as caught:
        session.run(image)
    assert str(caught.value) == (
        f"{session.description}: the GPU has not enough memory (CUDA out of memory. Tried to allocate 20.00 MiB. "
        "GPU 0 has a total capacity of 7.79 GiB of which 11.06 MiB is free). End what else runs on it"
    )
