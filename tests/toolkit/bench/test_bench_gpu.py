"""``bench`` with back-ends of GPUs: what can run is timed on the device, what cannot is a row that says why."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner
from fakes.bundles import rehash, with_engine
from fakes.trt import FakeTrt
from measured_here import SHORT, MeasuredHere
from tiny import write_volumes

from medseg_trt.bench import benchmark, candidates, gpu_peaks, measure, timings
from medseg_trt.bench.benchmark import Bench, bench
from medseg_trt.bench.gpu_clocks import GpuClock
from medseg_trt.bench.layer_times import PROFILERS, summed_up
from medseg_trt.bench.limits import Gate, judge_report, require
from medseg_trt.bench.measure import HOST_CLOCK, RoundTimes
from medseg_trt.bench.missing import Missing
from medseg_trt.bench.profile_schema import Peak, Profile, Roofline
from medseg_trt.bench.report.page import markdown_page
from medseg_trt.bench.report.write import cells
from medseg_trt.bench.schema import Report, Row
from medseg_trt.bench.timing_schema import NO_OVERLAP, SCOPES, Latency, OnGpu, Speedup
from medseg_trt.bench.timings import CUDA_EVENTS, NO_DEVICE_TIME, Timings, speedups
from medseg_trt.bundles.bundle import load_bundle
from medseg_trt.bundles.manifest import ENGINES_FOLDER
from medseg_trt.cli import cli
from medseg_trt.devices import CPU, parse_device
from medseg_trt.errors import DeviceError, SpeedGateError
from medseg_trt.export.engine_layers import LAYERS_SUFFIX, EngineLayer, LayerReport
from medseg_trt.export.graph.gemms import gemms
from medseg_trt.export.graph.node_costs import node_costs
from medseg_trt.export.graph.onnx_graph import OnnxGraph
from medseg_trt.files import write_json
from medseg_trt.gpu import Gpu, listed_gpus
from medseg_trt.sessions import pytorch, subprocess_session
from medseg_trt.sessions.backends import BACKENDS
from medseg_trt.sessions.device_times import DeviceTimes
from medseg_trt.sessions.pytorch_forms import EAGER, PEERS_ON_GPU
from medseg_trt.sessions.session_request import SessionRequest
from medseg_trt.spec import to_dict
from medseg_trt.train import torch_device

GPU = Gpu(name="Fake GPU", sm="sm89", cuda="13.0", driver="580.65")
ENGINE = "tensorrt-rtx fp32"


@pytest.fixture
def engine_bundle(tiny_bundle, tmp_path):
    return with_engine(tiny_bundle, tmp_path / "model.medseg")


class Rows:
    """Measures the bundle beside a GPU, or beside none, and returns the rows by name."""

    def __init__(self, spec: Bench, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._spec, self._scratch, self._monkeypatch = spec, scratch, monkeypatch
        self.reports: list[Report] = []

    def __call__(self, gpu: Gpu | None, version: str | None = FakeTrt.__version__, **changes: Any) -> dict[str, Row]:
        self._monkeypatch.setattr(benchmark, "find_gpu", lambda *_: gpu)
        self._monkeypatch.setattr(candidates, "installed_version", lambda _: version)
        self.reports.append(bench(replace(self._spec, **changes), self._scratch).report)
        return {row.name: row for row in self.reports[-1].rows}


@pytest.fixture
def rows(engine_bundle, tmp_path, monkeypatch, measured_here) -> Rows:
    data = write_volumes(tmp_path / "data", count=2)
    spec = Bench(bundle=engine_bundle, checkpoint=None, data=data, split="val", tier=SHORT, max_dice_drop=0.3)
    return Rows(spec, tmp_path, monkeypatch)


def test_an_engine_is_timed_with_copies_and_without(machine, rows, monkeypatch):
    monkeypatch.setattr(timings, "read_clock", lambda _: GpuClock(1980, ()))
    row = rows(GPU)[ENGINE]
    assert (row.executed, row.device, row.failure) == (True, "GPU Fake GPU", None)
    assert row.statement == f"built for sm89 by TensorRT-RTX {FakeTrt.__version__}, run here"
    alone, whole = row.latency["model"], row.latency["model+transfers"]
    assert isinstance(alone, Latency)
    assert isinstance(whole, Latency)
    assert (alone.timer, whole.timer) == (CUDA_EVENTS, HOST_CLOCK)
    assert alone.median_ms == 1.0  # the fake device counts pieces of work: the network is one
    assert isinstance(row.latency["end-to-end"], Latency)
    for refused in row.speedup.values():  # the reference ran on the CPU
        assert isinstance(refused, Missing)
        assert "the reference ran on CPU and this on GPU Fake GPU" in refused.reason
    on_gpu = row.on_gpu
    assert isinstance(on_gpu, OnGpu)
    assert (on_gpu.upload_ms, on_gpu.download_ms, on_gpu.held_back_by) == (1.0, 1.0, ())
    assert on_gpu.sm_mhz == (1980,) * len(alone.rounds_ms)
    assert isinstance(on_gpu.images_per_s, float)
    assert on_gpu.images_per_s > 0
    shown = markdown_page(rows.reports[-1])
    assert "| on a GPU | enqueue ms | upload ms | download ms | images per second, copies overlapping |" in shown
    assert f"| {ENGINE} | {on_gpu.enqueue_ms:.3f} | 1.000 | 1.000 | {on_gpu.images_per_s:.1f} |" in shown
    assert isinstance(row.throughput, tuple)
    assert [(throughput.streams, throughput.threads) for throughput in row.throughput][-1][
        1
    ] is None  # callers share the session
    assert isinstance(row.profile, Profile)
    assert isinstance(row.roofline, Missing)  # never the processor's peaks
    assert "the peaks of the GPU were not measured" in row.roofline.reason
    assert machine.gpu.is_clean()


@pytest.mark.usefixtures("machine")
def test_an_engine_is_compared_with_the_peaks_of_its_own_device(rows, monkeypatch):
    peak = Peak(arithmetic="fp32", gmacs_per_s=1.0, gemm="", gbytes_per_s=1e9, copy="", device="GPU Fake GPU")
    monkeypatch.setattr(gpu_peaks, "gpu_peaks", lambda _: (peak,))
    monkeypatch.setattr(torch_device, "torch_device", lambda _: torch.device("cpu"))
    row = rows(GPU)[ENGINE]
    assert isinstance(row.roofline, Roofline)
    assert row.roofline.roof_gmacs_per_s == 1.0
    assert row.roofline.reached_gmacs_per_s == row.roofline.macs / 1.0 / 1e6  # 1 ms, see above
    measured = rows.reports[-1].peaks
    assert isinstance(measured, tuple)
    assert {peak.device for peak in measured} == {"CPU", "GPU Fake GPU"}


def test_without_a_gpu_an_engine_is_a_row_that_was_built_alone(rows):
    row_of = rows(None)
    row = row_of[ENGINE]
    assert not row.executed
    assert "built for sm89" in row.statement
    assert f"not executed: {listed_gpus().words}." in row.statement
    assert "a simulation" in row.statement
    for figure in (*row.latency.values(), *row.speedup.values(), row.verdict, row.throughput, row.profile):
        assert figure == Missing(reason=row.statement)
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
    assert row.statement == f"not executed: {listed_gpus().words}"


class PyTorchOnGpu(MeasuredHere):
    """PyTorch on a GPU that is not there: it runs on the CPU, and says otherwise."""

    def __init__(self, request: SessionRequest) -> None:
        is_pytorch = request.backend == "pytorch"
        here = replace(request, device=CPU, compute_dtype="fp32") if is_pytorch else request
        super().__init__(replace(here, form=EAGER))
        if is_pytorch and request.device.kind == "cuda":
            self.device = "GPU Fake GPU"

    def time_on_device(self, batch, duration_s, min_runs):
        if self.backend != "pytorch":
            return super().time_on_device(batch, duration_s, min_runs)
        return DeviceTimes(compute_ms=[2.0 + 0.001 * number for number in range(min_runs)], enqueue_ms=[0.5] * min_runs)


@pytest.fixture
def pytorch_on_gpu(monkeypatch, rows):
    """Let PyTorch have the GPU too; ``measured_here``, on which ``rows`` depends, comes before."""
    assert pytorch.torch_device(CPU) == torch.device("cpu")  # imported before what follows takes its place
    monkeypatch.setattr(timings, "MeasuredSession", PyTorchOnGpu)
    monkeypatch.setattr("medseg_trt.train.torch_device.torch_device", lambda _: torch.device("cuda", 0))
    monkeypatch.setattr(gpu_peaks, "gpu_peaks", lambda _: ())


def test_pytorch_on_the_gpu_is_the_reference_and_every_row_there_has_three_scopes(
    machine, rows, pytorch_on_gpu, tiny_bundle
):
    by_name = rows(GPU, checkpoint=tiny_bundle.parent / "model" / "model.pt")
    reference, *others = by_name.values()
    assert (reference.name, reference.role, reference.device) == ("pytorch fp32", "reference", "GPU Fake GPU")
    peers = {(row.compute, row.variant) for row in others if row.role == "peer" and row.device != "CPU"}
    assert peers == set(PEERS_ON_GPU)
    for row in by_name.values():
        if row.device == "GPU Fake GPU":
            assert all(isinstance(row.latency[scope], Latency) for scope in SCOPES), row.name
            assert row.role == "reference" or isinstance(row.speedup["model"], Speedup), row.name
        else:
            assert not any(isinstance(speed, Speedup) for speed in row.speedup.values()), row.name
    beside = by_name["pytorch fp32 on the CPU"]
    assert (beside.role, beside.device) == ("peer", "CPU")
    engine = by_name[ENGINE].speedup["model"]
    assert isinstance(engine, Speedup)
    assert engine.ratio == pytest.approx(2.0, abs=0.02)  # of the device's times, not of the CPU's


def test_missing_device_time_fails_the_three_scopes_test(machine, rows, pytorch_on_gpu, tiny_bundle, monkeypatch):
    monkeypatch.setattr("medseg_trt.sessions.tensorrt.TensorRtSession.time_on_device", lambda *_: None)
    with pytest.raises(AssertionError, match=ENGINE):
        test_pytorch_on_the_gpu_is_the_reference_and_every_row_there_has_three_scopes(
            machine, rows, pytorch_on_gpu, tiny_bundle
        )


@pytest.mark.usefixtures("machine", "pytorch_on_gpu")
def test_a_row_whose_network_runs_in_one_stream_says_that_its_throughput_was_not_measured(rows, tiny_bundle):
    reference = rows(GPU, checkpoint=tiny_bundle.parent / "model" / "model.pt")["pytorch fp32"]
    assert isinstance(reference.on_gpu, OnGpu)
    assert reference.on_gpu.images_per_s == NO_OVERLAP
    assert "not measured: the network runs in one stream" in markdown_page(rows.reports[-1])


def test_the_headline_names_the_device_and_the_fastest_peer(machine, rows, pytorch_on_gpu, tiny_bundle):
    kept = rows.reports
    rows(GPU, checkpoint=tiny_bundle.parent / "model" / "model.pt")
    summary = kept[-1].summary
    assert summary.fastest == ENGINE
    assert summary.headline.startswith(f"On GPU Fake GPU, {ENGINE} is 2.0")
    assert "The fastest peer, pytorch" in summary.headline
    judged = judge_report(kept[-1], Gate(speed=1.5))
    assert [(limit.name, limit.holds) for limit in judged] == [(ENGINE, True)]


def test_a_ratio_between_devices_is_refused_by_the_headline_and_by_the_gate(machine, rows):
    """A CPU's 900 ms divided by an engine's 1 ms is no speed-up."""
    rows(GPU, backends=("tensorrt-rtx", "onnxruntime"))
    report = rows.reports[-1]
    assert "times as fast" not in report.summary.headline
    assert "--device cpu or --device cuda" in report.summary.headline
    with pytest.raises(SpeedGateError, match=r"cannot be judged against 1\.2x: no ratio is claimed: the ref"):
        require(judge_report(report, Gate(speed=1.2)))
    assert [row[4] for row in cells(report)] == ["–", "–"]


def test_a_planted_ratio_between_devices_is_caught(monkeypatch):
    monkeypatch.setattr(timings, "other_device", lambda *_: None)
    with pytest.raises(AssertionError):
        assert refused_between_devices()
    monkeypatch.undo()
    assert refused_between_devices()


def refused_between_devices() -> bool:
    latency = measure.latency(RoundTimes(rounds_ms=[[1.0, 1.1]] * 8), "GPU")
    assert latency is not None
    both = [Timings(start=Missing(reason="generated"), latency={"model": latency}) for _ in range(2)]
    return isinstance(speedups(both[0], both[1], "CPU", "GPU A")["model"], Missing)


@pytest.mark.parametrize(
    ("asked", "executed", "words"),
    [("cpu", False, "not executed: --device cpu."), ("cuda", True, "run here"), ("auto", True, "run here")],
)
def test_the_device_that_was_asked_for_decides_which_rows_run(machine, rows, asked, executed, words, monkeypatch):
    monkeypatch.setattr(benchmark, "require_gpu", lambda _: GPU)
    row = rows(GPU, device=parse_device(asked))[ENGINE]
    assert row.executed is executed
    assert words in row.statement


def test_a_gpu_that_is_asked_for_and_missing_is_an_error(rows):
    with pytest.raises(DeviceError, match=r"there is no GPU cuda:3: "):
        rows(None, device=parse_device("cuda:3"))


def test_backend_without_device_time_reports_model_latency_as_missing(machine, rows, monkeypatch):
    monkeypatch.setattr("medseg_trt.sessions.tensorrt.TensorRtSession.time_on_device", lambda *_: None)
    row = rows(GPU)[ENGINE]
    assert row.latency["model"] == Missing(reason=NO_DEVICE_TIME)
    assert isinstance(row.latency["model+transfers"], Latency)


def test_the_command_ends_well_where_an_engine_cannot_run(engine_bundle, tmp_path, monkeypatch, measured_here):
    monkeypatch.setattr(benchmark, "find_gpu", lambda *_: None)
    command = ["bench", "--bundle", engine_bundle, "--tier", "quick", "--duration-s", "0", "-o", tmp_path / "report"]
    ran = CliRunner().invoke(cli, [*map(str, command)], catch_exceptions=False)
    assert ran.exit_code == 0, ran.output
    report = json.loads((tmp_path / "report/report.json").read_text())
    assert [row["executed"] for row in report["rows"] if row["name"] == ENGINE] == [False]


def test_layers_are_timed_on_the_gpu_that_was_asked_for(engine_bundle, tmp_path, monkeypatch):
    asked = list[tuple[str, int]]()

    def refuse(bundle, execution, *, cuda):
        asked.append((execution.backend, cuda))
        raise DeviceError("enough")

    monkeypatch.setattr(subprocess_session, "open_execution", refuse)
    image = np.zeros((1, 3, *load_bundle(engine_bundle).preprocessing.image_size), np.float32)
    with pytest.raises(DeviceError):
        PROFILERS["tensorrt-rtx"](engine_bundle, "fp32", "fp32", image, tmp_path, 1)
    assert asked == [("tensorrt-rtx", 1)]


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
    write_json(engine_bundle / ENGINES_FOLDER / f"fp32-rtx{LAYERS_SUFFIX}", to_dict(report))
    rehash(engine_bundle)
    machine.trt.layer_ms = {layer.name: 0.75, "nobody's": 0.25}
    image = np.zeros((1, 3, *load_bundle(engine_bundle).preprocessing.image_size), np.float32)
    tool, steps = PROFILERS["tensorrt-rtx"](engine_bundle, "fp32", "fp32", image, tmp_path, 0)
    assert tool == "TensorRT-RTX IProfiler"
    assert [(step.ms, step.bytes) for step in steps] == [(0.75, 1000), (0.25, None)]
    profile = summed_up(tool, steps, node_costs(graph))
    assert isinstance(profile, Profile)
    assert profile.layers[0].part == "block"
    assert (profile.layers[0].macs, profile.layers[0].share) == (product.macs, 0.75)
    assert profile.layers[1].kind == "unknown"
    assert machine.gpu.is_clean()
