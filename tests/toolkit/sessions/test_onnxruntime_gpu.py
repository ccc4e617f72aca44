"""ONNX Runtime's GPU providers on a machine without one: what falls to the CPU is found, and said in one line."""

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from fakes.gpu import FakeGpu

from medseg_trt.bundles.bundle import load_bundle
from medseg_trt.bundles.manifest import FileEntry
from medseg_trt.errors import ArtefactError, DeviceError, MissingExtraError
from medseg_trt.export.graph.interface import MASK_NODE
from medseg_trt.export.graph.masks import with_masks
from medseg_trt.export.graph.onnx_graph import OnnxGraph
from medseg_trt.export.graph.save import save_graphs
from medseg_trt.gpu import Gpu
from medseg_trt.sessions import onnxruntime_gpu
from medseg_trt.sessions.backends import BACKENDS
from medseg_trt.sessions.engine_cache import EngineCache
from medseg_trt.sessions.onnxruntime_gpu import (
    PROVIDERS,
    RECORD,
    SIZES,
    OnnxRuntimeGpuSession,
    OwnStream,
    Provider,
    placement,
    require_placed,
)
from medseg_trt.sessions.open import choose, open_session

CUDA, RTX = PROVIDERS["onnxruntime-cuda"], PROVIDERS["onnxruntime-tensorrt-rtx"]


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """Let the driver list a GPU."""
    monkeypatch.setattr("medseg_trt.gpu.find_gpu", lambda number: Gpu(name="Fake", sm="sm89", cuda="13", driver="580"))


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


def test_the_sizes_of_a_graph_that_makes_masks_may_be_joined_on_the_cpu_and_nothing_else(bundle, tmp_path):
    """ONNX Runtime for GPUs leaves that one node there on purpose, so that such a graph would never run on a GPU."""
    graph = OnnxGraph(model=ir.load(bundle.folder / "fp32-plain.onnx"))
    save_graphs({"masks.onnx": with_masks(graph, bundle.preprocessing)}, tmp_path, "weights.bin")
    session = session_of(SimpleNamespace(folder=tmp_path), ["CPUExecutionProvider"], "masks.onnx")
    here = placement(session)
    assert here[SIZES] == ["Concat"]
    assert here["CPUExecutionProvider"].count("Concat") == placement(session_of(bundle, ["CPUExecutionProvider"]))[
        "CPUExecutionProvider"
    ].count("Concat")
    nodes = [node for part in session.get_provider_graph_assignment_info() for node in part.get_nodes()]

    def placed_with(is_on_cpu):
        parts = [
            SimpleNamespace(ep_name=name, get_nodes=lambda wanted=wanted: [n for n in nodes if is_on_cpu(n) is wanted])
            for name, wanted in (("CUDAExecutionProvider", False), ("CPUExecutionProvider", True))
        ]
        return placement(SimpleNamespace(get_provider_graph_assignment_info=lambda: parts))

    require_placed(placed_with(lambda node: node.op_type == "Concat" and node.name.startswith(MASK_NODE)), CUDA)
    for op_type in ("Resize", "ArgMax"):
        with pytest.raises(DeviceError, match=rf"leaves \d+ of \d+ nodes to CPUExecutionProvider \(\d+ {op_type}\)"):
            require_placed(placed_with(lambda node, name=op_type: node.op_type == name), CUDA)
    with pytest.raises(DeviceError, match="Concat"):
        require_placed(placed_with(lambda node: node.op_type == "Concat"), CUDA)


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
    assert runtime.asked == [([("CUDAExecutionProvider", {"use_tf32": "0", "device_id": "0"})], 0)]
    assert capsys.readouterr().out == ""


def test_a_missing_gpu_is_told_by_the_driver_before_onnx_runtime_is_asked(bundle, monkeypatch):
    runtime = FakeRuntime()
    installed(monkeypatch, runtime)
    monkeypatch.setattr("medseg_trt.gpu.find_gpu", lambda number: None)
    with pytest.raises(DeviceError, match="there is no GPU cuda:0: "):
        open_session(bundle, "onnxruntime-cuda")
    assert runtime.asked == []


def test_a_plugin_provider_without_a_device_is_an_error(bundle, monkeypatch):
    library = ModuleType("onnxruntime_ep_nv_tensorrt_rtx")
    vars(library).update(get_ep_name=lambda: RTX.name, get_library_path=lambda: "/lib/rtx.so")
    runtime = FakeRuntime()
    installed(monkeypatch, runtime, library)
    with pytest.raises(DeviceError, match="TensorRT-RTX provider finds no device"):
        open_session(bundle, "onnxruntime-tensorrt-rtx")
    assert runtime.registered == [(RTX.name, "/lib/rtx.so")]


def test_the_gpu_is_given_the_dialect_that_it_reads(bundle):
    assert bundle.variant(choose(bundle, "onnxruntime-cuda")).dialect == "plain"
    assert bundle.variant(choose(bundle, "onnxruntime-tensorrt")).dialect == "canonical"
    chosen = choose(bundle, "onnxruntime-cuda", "fp32")
    assert (chosen.backend, chosen.executed, chosen.median_ms) == ("onnxruntime-cuda", False, None)


def test_every_provider_is_a_backend_and_known_to_onnx_runtime():
    assert set(PROVIDERS) == {name for name in BACKENDS if name.startswith("onnxruntime-")}
    assert {provider.name for provider in PROVIDERS.values()} <= set(onnxruntime.get_all_providers())


def test_an_error_in_a_run_is_one_line_and_not_another_run_on_the_cpu(bundle):
    session = OnnxRuntimeGpuSession(
        session_of(bundle, ["CPUExecutionProvider"]), "onnxruntime-cuda", "ONNX Runtime, CUDA"
    )
    image = np.zeros((1, 3, 32, 32), np.float32)
    assert session.run(image).shape == (1, 3, 32, 32)

    def full(*_):
        raise RuntimeError("CUDA failure 2: out of memory\nGPU=0")

    session._session = SimpleNamespace(run=full)
    with pytest.raises(DeviceError, match=r"^ONNX Runtime, CUDA: the GPU has not enough memory \(CUDA failure 2: "):
        session.run(image)


class FakeGpuRun:
    """A session of ONNX Runtime that computes in a stream of a fake GPU, with its input and output bound."""

    def __init__(self, gpu: FakeGpu, stream: int):
        self.gpu, self.stream, self.bound = gpu, stream, []

    def get_inputs(self):
        return [SimpleNamespace(name="pixel_values", shape=["batch", 3, 4, 4])]

    def run(self, outputs, feeds):
        return [np.zeros((len(feeds["pixel_values"]), 2, 4, 4), np.float32)]

    def io_binding(self):
        bind = lambda name, value: self.bound.append((name, value))  # noqa: E731
        return SimpleNamespace(bind_ortvalue_input=bind, bind_ortvalue_output=bind)

    def run_with_iobinding(self, binding, options):
        assert options.entries == {"disable_synchronize_execution_providers": "1"}
        self.gpu.note("run_with_iobinding")
        self.gpu.enqueue(self.stream, lambda: None, 1)


class FakeOptions:
    def __init__(self):
        self.entries = {}

    def add_run_config_entry(self, name, value):
        self.entries[name] = value


def test_the_networks_own_time_is_taken_in_our_stream_with_everything_bound(monkeypatch):
    gpu = FakeGpu()
    gpu.activate()
    stream = OwnStream(device=gpu, handle=gpu.new_stream())
    run = FakeGpuRun(gpu, stream.handle)
    values = SimpleNamespace(
        ortvalue_from_numpy=lambda batch, *device: ("input", batch.shape, device),
        ortvalue_from_shape_and_type=lambda shape, kind, *device: ("output", tuple(shape), device),
    )
    module = SimpleNamespace(OrtValue=values, RunOptions=FakeOptions)
    monkeypatch.setattr(onnxruntime_gpu, "require", lambda *_: module)
    session = OnnxRuntimeGpuSession(run, "onnxruntime-cuda", "ONNX Runtime", 1, stream)
    assert session.device == "GPU Fake"
    times = session.time_on_device(np.zeros((2, 3, 4, 4), np.float32), 0.0, 5)
    assert times is not None
    assert times.compute_ms == [1.0] * 5
    assert [(name, value[1], value[2]) for name, value in run.bound] == [
        ("pixel_values", (2, 3, 4, 4), ("cuda", 1)),
        ("logits", (2, 2, 4, 4), ("cuda", 1)),
    ]
    first = gpu.names().index("record_event")
    launch = ["record_event", "run_with_iobinding", "record_event"]
    assert gpu.names()[first : first + 7] == [*launch, *launch, "record_event"]  # two are in flight
    session.close()
    assert gpu.is_clean()


def test_a_session_is_given_our_stream_its_gpu_and_no_tf32(monkeypatch):
    runtime = FakeRuntime()
    runtime.get_available_providers = lambda: [provider.name for provider in PROVIDERS.values()]
    gpu = FakeGpu()
    gpu.activate()
    stream = OwnStream(device=gpu, handle=gpu.new_stream())
    kept = {"trt_engine_cache_enable": "1"}
    chosen = onnxruntime_gpu._choose(runtime, "onnxruntime-tensorrt", None, 1, stream, kept)
    expected_options = {"device_id": "1", "user_compute_stream": str(stream.handle)}
    assert chosen["providers"] == [
        ("TensorrtExecutionProvider", {**kept, **expected_options}),
        ("CUDAExecutionProvider", {"use_tf32": "0", **expected_options}),
    ]
    assert PROVIDERS["onnxruntime-tensorrt"].environment == {"NVIDIA_TF32_OVERRIDE": "0"}


def test_engines_are_kept_by_graph_weights_and_gpu_for_the_batches_that_infer_sends(bundle, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first, second = (bundle.content.variants[name] for name in list(bundle.content.variants)[:2])
    cache = EngineCache.of(bundle, first)
    assert cache == EngineCache.of(bundle, first)
    assert cache.folder != EngineCache.of(bundle, second).folder
    files = {**bundle.content.files, first.weights: FileEntry(sha256="0", bytes=1)}
    retrained = replace(bundle, content=replace(bundle.content, files=files))
    assert EngineCache.of(retrained, first).folder != cache.folder
    options = cache.options("trt", "Fake A")
    folder = Path(options.pop("trt_engine_cache_path"))
    assert folder.stat().st_mode & 0o777 == 0o700
    assert folder.is_relative_to(tmp_path)
    assert options == {
        "trt_engine_cache_enable": "1",
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(folder),
        "trt_profile_min_shapes": "pixel_values:1x3x32x32",
        "trt_profile_opt_shapes": "pixel_values:4x3x32x32",
        "trt_profile_max_shapes": "pixel_values:8x3x32x32",
    }
    assert cache.options("trt", "Fake B")["trt_engine_cache_path"] != str(folder)
    rtx = cache.options("nv", "Fake A")
    assert Path(rtx["nv_runtime_cache_path"]).is_dir()
    assert rtx["nv_profile_opt_shapes"] == "pixel_values:4x3x32x32"


def test_tensorrt_provider_session_requests_an_engine_cache(bundle, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    runtime = FakeRuntime()
    runtime.get_available_providers = lambda: [provider.name for provider in PROVIDERS.values()]
    installed(monkeypatch, runtime)
    with pytest.raises(DeviceError, match="took no node"):  # the fake computes on the CPU
        open_session(bundle, "onnxruntime-tensorrt")
    (((tensorrt, cuda), _),) = runtime.asked
    assert Path(tensorrt[1]["trt_engine_cache_path"]).is_relative_to(tmp_path)
    assert cuda == ("CUDAExecutionProvider", {"use_tf32": "0", "device_id": "0"})


def test_more_images_than_an_engine_takes_are_cut_up(bundle):
    session = session_of(bundle, ["CPUExecutionProvider"])
    images = np.random.default_rng(0).normal(size=(5, 3, 32, 32)).astype(np.float32)
    whole = OnnxRuntimeGpuSession(session, "onnxruntime-cuda", "ONNX Runtime, CUDA")
    sizes: list[int] = []

    def run(outputs, feeds):
        sizes.append(len(feeds["pixel_values"]))
        return session.run(outputs, feeds)

    cut = OnnxRuntimeGpuSession(session, "onnxruntime-tensorrt", "ONNX Runtime, TensorRT", most=2)
    cut._session = SimpleNamespace(run=run)
    np.testing.assert_allclose(cut.run(images), whole.run(images), atol=1e-6)
    assert sizes == [2, 2, 1]


@pytest.mark.parametrize(
    ("message", "error", "words"),
    [
        ("CUDA failure 2: out of memory ; GPU=0", DeviceError, "the GPU has not enough memory"),
        ("Failed to allocate memory for requested buffer of size 1024", DeviceError, "the GPU has not enough memory"),
        ("Fatal error: Foo is not a registered function/op", ArtefactError, "refuses"),
    ],
)
def test_a_gpu_without_memory_is_told_from_a_graph_that_is_refused(bundle, message, error, words, monkeypatch):
    runtime: Any = FakeRuntime()

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError(f"{message}\nmore")

    runtime.InferenceSession = refuse
    installed(monkeypatch, runtime)
    with pytest.raises(error, match=rf"{words}.*{message.partition(' ;')[0]}") as caught:
        open_session(bundle, "onnxruntime-cuda")
    assert "\n" not in str(caught.value)
