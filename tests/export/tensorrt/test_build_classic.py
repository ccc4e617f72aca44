"""What the builder is told: a fake library records it, as TensorRT-RTX and as classic TensorRT, which is not here."""

import sys
from dataclasses import replace
from enum import IntEnum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from medseg_trt.errors import ArtefactError, MedsegError
from medseg_trt.export.tensorrt import build as builder
from medseg_trt.export.tensorrt.build import LIBRARIES, build_engine
from medseg_trt.spec import EngineSpec

SPEC = EngineSpec(
    library="tensorrt",
    targets=("sm86",),
    opt_batch=2,
    max_batch=4,
    workspace_gib=0.5,
    optimization_level=5,
    stripped=True,
    version_compatible=True,
    hardware="ampere_plus",
)
LAYERS = "Layers:\nName: a, LayerType: kgen, Inputs: [], Constants: [], Outputs: []\n"


class Severity(IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class Base:
    def __init__(self) -> None: ...


class Fake:
    """As much of the library as the builder's code path uses; ``told`` is what it was told, in order."""

    def __init__(self, version: str = "10.15.1", *, errors: tuple[str, ...] = (), reads: bool = True) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.errors, self.reads = errors, reads
        self.module = ModuleType("tensorrt")
        flags = ("STRIP_PLAN", "REFIT", "VERSION_COMPATIBLE", "TF32", "REQUIRE_USER_ALLOCATION")
        for name, value in {
            "__version__": version,
            "ILogger": type("ILogger", (Base,), {"Severity": Severity}),
            "IProgressMonitor": Base,
            "Builder": self.builder,
            "OnnxParser": self.parser,
            "NetworkDefinitionCreationFlag": IntEnum("Flag", [("STRONGLY_TYPED", 1)]),
            "ProfilingVerbosity": SimpleNamespace(DETAILED="detailed"),
            "MemoryPoolType": SimpleNamespace(WORKSPACE="workspace"),
            "BuilderFlag": SimpleNamespace(**{name: name for name in flags}),
            "HardwareCompatibilityLevel": SimpleNamespace(AMPERE_PLUS="ampere plus"),
            "ComputeCapability": SimpleNamespace(SM86="86", SM120="120"),
        }.items():
            setattr(self.module, name, value)

    def builder(self, log: Any) -> Any:
        return SimpleNamespace(
            create_network=self.network,
            create_builder_config=lambda: Config(self),
            create_optimization_profile=self.profile,
            build_serialized_network=lambda network, config: self.build(log, config),
        )

    def network(self, flags: int) -> Any:
        self.tell("network", flags)
        return SimpleNamespace(num_inputs=1, get_input=lambda index: SimpleNamespace(shape=(-1, 3, 4, 4)))

    def parser(self, network: Any, log: Any) -> Any:
        error = SimpleNamespace(desc=lambda: "no such\noperator")
        return SimpleNamespace(parse=self.parse, num_errors=1, get_error=lambda index: error)

    def tell(self, *words: Any) -> None:
        self.told.append(words)

    def parse(self, data: bytes, path: str) -> bool:
        self.tell("parse", path)
        return self.reads

    def profile(self) -> Any:
        return SimpleNamespace(set_shape=lambda *words: self.tell("shape", *words))

    def build(self, log: Any, config: Any) -> bytes | None:
        for error in self.errors:
            log.log(Severity.ERROR, error)
        log.log(Severity.VERBOSE, LAYERS)
        config.progress_monitor.phase_start("all", None, 2)
        config.progress_monitor.step_complete("all", 0)
        config.progress_monitor.phase_finish("all")
        return None if self.errors else b"plan"


class Config:
    def __init__(self, fake: Fake) -> None:
        self.__dict__["fake"] = fake

    def __setattr__(self, name: str, value: Any) -> None:
        self.fake.tell(name, value)
        self.__dict__[name] = value

    def __getattr__(self, name: str) -> Any:
        if name == "create_timing_cache":
            return lambda content: SimpleNamespace(content=content)
        if name == "set_timing_cache":
            return lambda cache, ignore: self.fake.tell("cache", cache.content) or cache.content != b"stale"
        if name == "get_timing_cache":
            return lambda: SimpleNamespace(serialize=lambda: b"measured")
        return lambda *words: self.fake.tell(name, *words)


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 4, 4])
    answer = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3, 4, 4])
    nodes = [helper.make_node("Relu", ["x"], ["y"], name="relu")]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [value], [answer])), tmp_path / "g.onnx")
    return tmp_path / "g.onnx"


def build(fake: Fake, graph: Path, monkeypatch: pytest.MonkeyPatch, cache: Path | None = None) -> Any:
    monkeypatch.setitem(sys.modules, "tensorrt", fake.module)
    steps: list[tuple[str, int, int]] = []
    built = build_engine(graph, graph.with_suffix(".plan"), SPEC, lambda *step: steps.append(step), cache)
    assert steps == [("all", 0, 2), ("all", 1, 2), ("all", 2, 2)]
    return built


def test_the_builder_gets_every_option(graph, monkeypatch):
    fake = Fake()
    built = build(fake, graph, monkeypatch)
    for words in (
        ("network", 2),  # strongly typed, which is the first bit but one
        ("parse", str(graph)),
        ("profiling_verbosity", "detailed"),
        ("builder_optimization_level", 5),
        ("set_memory_pool_limit", "workspace", 1 << 29),
        ("set_flag", "STRIP_PLAN"),
        ("set_flag", "REFIT"),
        ("set_flag", "VERSION_COMPATIBLE"),
        ("clear_flag", "TF32"),  # float32 products keep their fraction
        ("hardware_compatibility_level", "ampere plus"),
        ("shape", "x", (1, 3, 4, 4), (2, 3, 4, 4), (4, 3, 4, 4)),
    ):
        assert words in fake.told
    assert not any("compute_capabilit" in str(words[0]) for words in fake.told)  # it builds for the GPU that is here
    assert (built.version, built.layers, built.repairs) == ("10.15.1", LAYERS, ())
    assert graph.with_suffix(".plan").read_bytes() == b"plan"


def rtx_is_told(graph: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Return what TensorRT-RTX is told for engines of two kinds of GPUs."""
    fake = Fake("1.7.1.116")
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake.module)
    spec = EngineSpec(library="tensorrt-rtx", targets=("sm86", "sm120"))
    build_engine(graph, graph.with_suffix(".plan"), spec, lambda *_: None, None)
    return fake.told


def test_tensorrt_rtx_is_to_build_what_can_be_captured(graph, monkeypatch):
    """It refuses an engine that would allocate while it runs, which a capture does not allow."""
    told = rtx_is_told(graph, monkeypatch)
    assert ("set_flag", "REQUIRE_USER_ALLOCATION") in told
    assert ("set_compute_capability", "120", 1) in told


def test_build_without_the_user_allocation_flag_is_detected(graph, monkeypatch):
    without = {**LIBRARIES, "tensorrt-rtx": replace(LIBRARIES["tensorrt-rtx"], flags=())}
    monkeypatch.setattr(builder, "LIBRARIES", without)
    with pytest.raises(AssertionError):
        test_tensorrt_rtx_is_to_build_what_can_be_captured(graph, monkeypatch)


def test_a_library_without_the_flag_is_strongly_typed_anyway(graph, monkeypatch):
    fake = Fake("11.4.0")
    vars(fake.module)["NetworkDefinitionCreationFlag"] = SimpleNamespace()
    build(fake, graph, monkeypatch)
    assert ("network", 0) in fake.told


def test_timings_are_saved_and_stale_ones_are_ignored_with_a_warning(graph, monkeypatch, tmp_path, caplog):
    cache = tmp_path / "timings" / "a.cache"
    fake = Fake()
    build(fake, graph, monkeypatch, cache)
    assert ("cache", b"") in fake.told
    assert cache.read_bytes() == b"measured"
    build(fake, graph, monkeypatch, cache)
    assert ("cache", b"measured") in fake.told
    assert caplog.text == ""
    cache.write_bytes(b"stale")
    build(fake, graph, monkeypatch, cache)
    assert fake.told[-2:] != [("cache", b"stale")]
    assert [words for words in fake.told if words[0] == "cache"][-2:] == [("cache", b"stale"), ("cache", b"")]
    assert "another GPU or version" in caplog.text


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("CUDA initialization failure with error: 35", "--backend tensorrt-rtx"),
        ("Requested amount of GPU memory: out of memory", "too little free memory"),
        ("something that nobody\nhas seen", "something that nobody has seen"),
    ],
)
def test_a_failure_is_explained_in_one_line(graph, monkeypatch, error, words):
    with pytest.raises(MedsegError, match=words) as caught:
        build(Fake(errors=(error,)), graph, monkeypatch)
    assert "\n" not in str(caught.value)
    assert not graph.with_suffix(".plan").exists()


def test_an_unreadable_graph_is_an_error_with_the_parsers_message(graph, monkeypatch):
    with pytest.raises(ArtefactError, match=r"10\.3\.0 does not read g\.onnx: no such operator"):
        build(Fake("10.3.0", reads=False), graph, monkeypatch)
