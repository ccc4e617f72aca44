"""ONNX Runtime's GPU providers on a machine without one: what falls to the CPU is found, and said in one line."""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import onnxruntime
import pytest

from medseg_trt.bundles.bundle import load_bundle
from medseg_trt.errors import DeviceError, MissingExtraError
from medseg_trt.sessions.backends import BACKENDS
from medseg_trt.sessions.onnxruntime_gpu import (
    PROVIDERS,
    RECORD,
    OnnxRuntimeGpuSession,
    Provider,
    placement,
    require_placed,
)
from medseg_trt.sessions.open import choose, open_session

CUDA, RTX = PROVIDERS["onnxruntime-cuda"], PROVIDERS["onnxruntime-tensorrt-rtx"]


@pytest.fixture
def bundle(tiny_bundle):
    return load_bundle(tiny_bundle)


def session_of(bundle, providers, graph="fp32-plain.onnx"):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry(RECORD, "1")
    return onnxruntime.InferenceSession(str(bundle.folder / graph), options, providers=providers, enable_fallback=0)


def test_every_node_has_a_provider(bundle):
    placed = placement(session_of(bundle, ["CPUExecutionProvider"]))
    assert list(placed) == ["CPUExecutionProvider"]
    assert placed["CPUExecutionProvider"].count("Conv") == 24  # as many as the graph has
    require_placed(placed, Provider(name="CPUExecutionProvider", title="CPU"))


def test_a_provider_that_takes_nothing_is_found_though_the_session_opens_and_runs(bundle):
    """ONNX Runtime's Azure provider is in every build and knows none of our operators: a real silent fallback."""
    session = session_of(bundle, ["AzureExecutionProvider"])
    assert session.get_providers() == ["AzureExecutionProvider", "CPUExecutionProvider"]  # nobody would notice
    with pytest.raises(DeviceError, match="Azure provider took no node") as caught:
        require_placed(placement(session), Provider(name="AzureExecutionProvider", title="Azure"))
    assert "\n" not in str(caught.value)


def test_a_single_node_on_the_cpu_is_found_and_named():
    placed = {"CUDAExecutionProvider": ["Conv", "MatMul"], "CPUExecutionProvider": ["Resize"]}
    with pytest.raises(DeviceError, match=r"CUDA provider leaves 1 of 3 nodes to CPUExecutionProvider \(1 Resize\)"):
        require_placed(placed, CUDA)


def test_tensorrt_may_leave_nodes_to_cuda_and_not_to_the_cpu():
    tensorrt = PROVIDERS["onnxruntime-tensorrt"]
    require_placed({"TensorrtExecutionProvider": ["Conv"], "CUDAExecutionProvider": ["Gelu"]}, tensorrt)
    with pytest.raises(DeviceError, match="leaves 1 of 2 nodes to CPU"):
        require_placed({"TensorrtExecutionProvider": ["Conv"], "CPUExecutionProvider": ["Gelu"]}, tensorrt)
    with pytest.raises(DeviceError, match="leaves 1 of 2 nodes to CUDA"):
        require_placed({RTX.name: ["Conv"], "CUDAExecutionProvider": ["Gelu"]}, RTX)


@pytest.mark.parametrize("backend", ["onnxruntime-cuda", "onnxruntime-tensorrt"])
def test_an_onnx_runtime_without_the_provider_says_what_to_install(bundle, backend):
    if PROVIDERS[backend].name in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime is built for GPUs")
    with pytest.raises(
        MissingExtraError, match=r"pip uninstall onnxruntime; pip install 'medseg-trt\[gpu\]'"
    ) as caught:
        open_session(bundle, backend)
    assert caught.value.exit_code == 6
    assert "\n" not in str(caught.value)


def test_the_package_of_the_rtx_provider_is_named(bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'medseg-trt\[onnxruntime-rtx\]'"):
        open_session(bundle, "onnxruntime-tensorrt-rtx")


class FakeRuntime(ModuleType):
    """ONNX Runtime for GPUs that loses its provider without a word, as it does where CUDA's libraries are missing."""

    __version__ = onnxruntime.__version__
    SessionOptions = onnxruntime.SessionOptions

    def __init__(self, devices=()):
        super().__init__("onnxruntime")
        self.devices, self.asked, self.registered = list(devices), [], []

    def get_available_providers(self):
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def preload_dlls(self):
        print("Failed to load libcudart.so.13")

    def register_execution_provider_library(self, name, path):
        self.registered.append((name, path))

    def get_ep_devices(self):
        return self.devices

    def InferenceSession(self, path, options, providers=(), enable_fallback=1):  # noqa: N802
        self.asked.append((list(providers), enable_fallback))
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def installed(monkeypatch, *modules: ModuleType) -> None:
    monkeypatch.setattr("medseg_trt.sessions.open.is_installed", lambda _: True)
    for module in modules:
        monkeypatch.setitem(sys.modules, module.__name__, module)


def test_a_provider_that_cannot_be_loaded_is_an_error_and_prints_nothing_on_stdout(bundle, monkeypatch, capsys):
    runtime = FakeRuntime()
    installed(monkeypatch, runtime)
    with pytest.raises(
        DeviceError, match=r"took no node: it does not run on this machine.*onnxruntime-gpu\[cuda,cudnn\]"
    ):
        open_session(bundle, "onnxruntime-cuda")
    assert runtime.asked == [([("CUDAExecutionProvider", {"use_tf32": "0"})], 0)]
    assert capsys.readouterr().out == ""


def test_a_plugin_provider_without_a_device_is_an_error(bundle, monkeypatch):
    library = ModuleType("onnxruntime_ep_nv_tensorrt_rtx")
    vars(library).update(get_ep_name=lambda: RTX.name, get_library_path=lambda: "/lib/rtx.so")
    runtime = FakeRuntime()
    installed(monkeypatch, runtime, library)
    with pytest.raises(DeviceError, match="TensorRT-RTX provider finds no device"):
        open_session(bundle, "onnxruntime-tensorrt-rtx")
    assert runtime.registered == [(RTX.name, "/lib/rtx.so")]


def test_the_gpu_is_given_the_flavour_that_it_reads(bundle):
    assert bundle.variant(choose(bundle, "onnxruntime-cuda")).flavour == "plain"
    assert bundle.variant(choose(bundle, "onnxruntime-tensorrt")).flavour == "canonical"
    chosen = choose(bundle, "onnxruntime-cuda", "fp32")
    assert (chosen.backend, chosen.executed, chosen.median_ms) == ("onnxruntime-cuda", False, None)


def test_every_provider_is_a_backend_and_known_to_onnx_runtime():
    assert set(PROVIDERS) == {name for name in BACKENDS if name.startswith("onnxruntime-")}
    assert {each.name for each in PROVIDERS.values()} <= set(onnxruntime.get_all_providers())


def test_an_error_in_a_run_is_one_line_and_not_another_run_on_the_cpu(bundle):
    session = OnnxRuntimeGpuSession(
        session_of(bundle, ["CPUExecutionProvider"]), "onnxruntime-cuda", "ONNX Runtime, CUDA"
    )
    image = np.zeros((1, 3, 32, 32), np.float32)
    assert session.run(image).shape == (1, 3, 32, 32)

    def full(*_):
        raise RuntimeError("CUDA failure 2: out of memory\nGPU=0")

    session._session = SimpleNamespace(run=full)
    with pytest.raises(DeviceError, match=r"^ONNX Runtime, CUDA: CUDA failure 2: out of memory$"):
        session.run(image)
