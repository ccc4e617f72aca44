"""``bench`` with back-ends of GPUs: what can run is timed on the device, what cannot is a row that says why."""

import json
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from fakes.bundles import rehash, with_engine
from fakes.trt import FakeTrt
from measured_here import SHORT
from tiny import write_volumes

from medseg_trt.bench import candidates
from medseg_trt.bench.benchmark import NO_PEAK_OF_GPUS, Bench, bench
from medseg_trt.bench.layer_times import PROFILERS, summed_up
from medseg_trt.bench.measure import HOST_CLOCK
from medseg_trt.bench.missing import Missing
from medseg_trt.bench.profile_schema import Profile
from medseg_trt.bench.schema import Row
from medseg_trt.bench.timing_schema import Latency, Speedup
from medseg_trt.bench.timings import CUDA_EVENTS, NO_DEVICE_TIME
from medseg_trt.bundles.bundle import load_bundle
from medseg_trt.cli import cli
from medseg_trt.engines.fingerprint import FOLDER
from medseg_trt.engines.gpu import Gpu
from medseg_trt.export.engine_layers import LAYERS_SUFFIX, EngineLayer, LayerReport
from medseg_trt.export.graph.gemms import gemms
from medseg_trt.export.graph.node_costs import node_costs
from medseg_trt.export.graph.onnx_graph import OnnxGraph
from medseg_trt.files import write_json
from medseg_trt.sessions.backends import BACKENDS
from medseg_trt.spec import to_dict

GPU = Gpu(name="Fake GPU", sm="sm89", cuda="13.0", driver="580.65")
ENGINE = "tensorrt-rtx fp32"


@pytest.fixture
def engine_bundle(tiny_bundle, tmp_path):
    return with_engine(tiny_bundle, tmp_path / "model.medseg")


@pytest.fixture
def rows(engine_bundle, tmp_path, monkeypatch, measured_here):
    """Return a function that measures the bundle beside a GPU, or beside none, and returns the rows by name."""
    data = write_volumes(tmp_path / "data", count=2)

    def measure(gpu: Gpu | None, version: str | None = FakeTrt.__version__, **changes) -> dict[str, Row]:
        monkeypatch.setattr(candidates, "find_gpu", lambda: gpu)
        monkeypatch.setattr(candidates, "installed_version", lambda _: version)
        what = Bench(bundle=engine_bundle, checkpoint=None, data=data, split="val", tier=SHORT, max_dice_drop=0.3)
        report = bench(replace(what, **changes), tmp_path).report
        return {row.name: row for row in report.rows}

    return measure


def test_an_engine_is_timed_with_copies_and_without(machine, rows):
    row = rows(GPU)[ENGINE]
    assert (row.executed, row.device, row.failure) == (True, "GPU Fake GPU", None)
    assert row.statement == f"built for sm89 by TensorRT-RTX {FakeTrt.__version__}, run here"
    alone, whole = row.latency["model"], row.latency["model+transfers"]
    assert isinstance(alone, Latency)
    assert isinstance(whole, Latency)
    assert (alone.timer, whole.timer) == (CUDA_EVENTS, HOST_CLOCK)
    assert alone.median_ms == 1.0  # the fake device counts pieces of work: the network is one
    assert isinstance(row.latency["end-to-end"], Latency)
    assert isinstance(row.speedup["model+transfers"], Speedup)  # against the CPU's model, which copies nothing
    assert isinstance(row.throughput, tuple)
    assert [(each.streams, each.threads) for each in row.throughput][-1][1] is None  # callers share the session
    assert isinstance(row.profile, Profile)
    assert row.roofline == Missing(reason=NO_PEAK_OF_GPUS)
    assert machine.gpu.is_clean()


def test_without_a_gpu_an_engine_is_a_row_that_was_built_alone(rows):
    found = rows(None)
    row = found[ENGINE]
    assert not row.executed
    assert "built for sm89" in row.statement
    assert "not executed: no NVIDIA GPU is here." in row.statement
    assert "a simulation" in row.statement
    for each in (*row.latency.values(), *row.speedup.values(), row.verdict, row.throughput, row.profile):
        assert each == Missing(reason=row.statement)
    assert row.size_mb == pytest.approx(4096 / 1e6)


@pytest.mark.parametrize(
    ("gpu", "version", "words"),
    [
        (replace(GPU, sm="sm86"), FakeTrt.__version__, "was built for sm89"),
        (GPU, "1.6.0.1", "1.6.0.1"),
        (replace(GPU, cuda="12.4"), FakeTrt.__version__, "goes up to CUDA 12.4"),
    ],
)
def test_an_engine_that_does_not_fit_says_why(rows, gpu, version, words):
    row = rows(gpu, version)[ENGINE]
    assert not row.executed
    assert words in row.statement


@pytest.mark.parametrize("backend", [name for name, kind in BACKENDS.items() if kind.gpu and not kind.engines])
def test_a_provider_of_gpus_that_is_named_is_a_row_too(rows, engine_bundle, backend, monkeypatch):
    monkeypatch.setattr(candidates, "is_installed", lambda _: True)
    row = rows(None, backends=(backend,))[f"{backend} fp32"]
    assert not row.executed
    assert row.statement == "not executed: no NVIDIA GPU is here"


def test_a_back_end_that_does_not_tell_its_own_time_says_so(machine, rows, monkeypatch):
    monkeypatch.setattr("medseg_trt.sessions.tensorrt.TensorRtSession.time_on_device", lambda *_: None)
    row = rows(GPU)[ENGINE]
    assert row.latency["model"] == Missing(reason=NO_DEVICE_TIME)
    assert isinstance(row.latency["model+transfers"], Latency)


def test_the_command_ends_well_where_an_engine_cannot_run(engine_bundle, tmp_path, monkeypatch, measured_here):
    monkeypatch.setattr(candidates, "find_gpu", lambda: None)
    command = ["bench", "--bundle", engine_bundle, "--tier", "quick", "--duration-s", "0", "-o", tmp_path / "report"]
    ran = CliRunner().invoke(cli, [*map(str, command)], catch_exceptions=False)
    assert ran.exit_code == 0, ran.output
    report = json.loads((tmp_path / "report/report.json").read_text())
    assert [row["executed"] for row in report["rows"] if row["name"] == ENGINE] == [False]


def test_the_layers_of_an_engine_are_timed_by_the_library_and_led_back_to_the_graph(machine, engine_bundle, tmp_path):
    graph = OnnxGraph(model=ir.load(engine_bundle / "fp32.onnx"))
    product = next(gemm for gemm in gemms(graph) if gemm.part == "block")
    layer = EngineLayer(
        name="__myl_Fc_myl0_1",
        kind="kgen",
        kernel="a kernel",
        inputs=(),
        constants=(),
        outputs=(),
        nodes=(product.name,),
        bytes=1000,
    )
    report = LayerReport(layers=(layer,), outcomes=(), unread=0)
    write_json(engine_bundle / FOLDER / f"fp32-rtx{LAYERS_SUFFIX}", to_dict(report))
    rehash(engine_bundle)
    machine.trt.layer_ms = {layer.name: 0.75, "nobody's": 0.25}
    image = np.zeros((1, 3, *load_bundle(engine_bundle).preprocessing.image_size), np.float32)
    tool, steps = PROFILERS["tensorrt-rtx"](engine_bundle, "fp32", "fp32", image, tmp_path)
    assert tool == "TensorRT-RTX IProfiler"
    assert [(step.ms, step.bytes) for step in steps] == [(0.75, 1000), (0.25, None)]
    profile = summed_up(tool, steps, node_costs(graph))
    assert isinstance(profile, Profile)
    assert profile.layers[0].part == "block"
    assert (profile.layers[0].macs, profile.layers[0].share) == (product.macs, 0.75)
    assert profile.layers[1].kind == "unknown"
    assert machine.gpu.is_clean()
