"""Where the time goes: steps led back to the network's parts, and the roof over them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medseg_trt.bench import layer_times, peaks
from medseg_trt.bench.layer_times import WARM_UP, Step, profile, steps_of_trace, summed_up
from medseg_trt.bench.measure import RoundTimes, latency
from medseg_trt.bench.missing import Missing
from medseg_trt.bench.profile_schema import Peak, Profile
from medseg_trt.errors import DeviceError
from medseg_trt.export.graph.node_costs import NodeCost
from medseg_trt.sessions.session_request import SessionRequest
from medseg_trt.sessions.subprocess_session import ChildSession

COSTS = (
    NodeCost(names=("node_conv", "conv"), part="resnet", macs=100, bytes=10),
    NodeCost(names=("node_conv_1", "conv_1"), part="decoder", macs=300, bytes=20),
    NodeCost(names=("node_add", "add"), part="decoder", macs=0, bytes=0),
)


def profile_of(steps: Sequence[Step]) -> Any:
    """Sum up steps of which some took time."""
    return summed_up("tool", steps, COSTS)


def step(name: str, ms: float, kind: str = "Convolution") -> Step:
    return Step(name=name, kind=kind, kernel="k", ms=ms, bytes=None)


def test_steps_are_led_back_to_the_longest_name_they_begin_with():
    steps = [step("conv_nchwc", 1.0), step("node_conv_1/WithoutBiases", 2.0), step("Reorder", 1.0)]
    profiled = summed_up("tool", steps, COSTS)
    assert isinstance(profiled, Profile)
    assert [(layer.name, layer.part, layer.macs) for layer in profiled.layers] == [
        ("node_conv_1/WithoutBiases", "decoder", 300),
        ("conv_nchwc", "resnet", 100),
        ("Reorder", "other", None),
    ]
    assert [(part.part, part.ms, part.share, part.macs) for part in profiled.parts] == [
        ("decoder", 2.0, 0.5, 300),
        ("resnet", 1.0, 0.25, 100),
        ("other", 1.0, 0.25, 0),
    ]
    assert profiled.total_ms == 4


def test_unnamed_profiler_step_gets_the_part_of_equal_neighbours():
    steps = [step("conv", 1.0), step("Mul_1", 1.0), step("conv_1", 1.0), step("Mul_2", 1.0), step("add", 1.0)]
    part_of = {layer.name: layer.part for layer in profile_of(steps).layers}
    assert part_of == {"conv": "resnet", "Mul_1": "other", "conv_1": "decoder", "Mul_2": "decoder", "add": "decoder"}


def test_reorder_steps_have_no_macs():
    (layer,) = profile_of([step("node_conv_reorder", 1.0, kind="Reorder")]).layers
    assert (layer.part, layer.macs) == ("resnet", None)


def test_without_a_step_that_took_time_there_is_no_profile():
    assert summed_up("tool", [step("conv", 0.0)], COSTS) == Missing(reason="tool lists no step that took time")


def event(name: str, index: str, microseconds: int) -> dict:
    arguments = {
        "node_index": index,
        "op_name": "Conv",
        "provider": "CPU",
        "parameter_size": "1",
        "activation_size": "2",
        "output_size": "4",
    }
    return {"cat": "Node", "name": name, "dur": microseconds, "args": arguments}


def test_the_runs_of_the_warm_up_are_not_in_a_trace():
    cold = [event("conv_kernel_time", "3", 9_000_000)] * WARM_UP
    warm = [event("conv_kernel_time", "3", microseconds) for microseconds in (1000, 1500, 2000)]
    other = [{"cat": "Session", "name": "model_run", "dur": 1}, {**event("conv_fence_before", "3", 5)}]
    (traced,) = steps_of_trace([*cold, *other, *warm])
    assert (traced.name, traced.ms, traced.bytes) == ("conv", 1.5, 7)


def test_profiling_failure_is_reported_as_missing_with_its_reason(tmp_path):
    profiled = profile(tmp_path / "none.onnx", "onnxruntime", "fp32", "fp32", np.zeros((1, 3, 8, 8), np.float32), COSTS)
    assert isinstance(profiled, Missing)
    assert profiled.reason.startswith("onnxruntime could not be profiled: ")
    assert "none.onnx" in profiled.reason


def test_backend_without_profiler_is_reported_as_missing():
    profiled = profile(Path("x"), "onnxruntime-cuda", "fp32", "fp32", np.zeros((1, 3, 8, 8), np.float32), COSTS)
    assert profiled == Missing(reason="onnxruntime-cuda has no profiler of layers here")


def test_openvino_profile_attributes_times_to_every_network_part(tiny_bundle):
    from onnx_ir import load

    from medseg_trt.export.graph.gemms import total_macs
    from medseg_trt.export.graph.node_costs import node_costs
    from medseg_trt.export.graph.trace import OnnxGraph

    graph = OnnxGraph(model=load(tiny_bundle / "fp32-plain.onnx"))
    costs = node_costs(graph)
    assert sum(cost.macs for cost in costs) == total_macs(graph)
    tool, steps = layer_times.PROFILERS["openvino"](
        tiny_bundle / "fp32-plain.onnx", "fp32", "fp32", np.zeros((1, 3, 32, 32), np.float32), tiny_bundle, 0
    )
    profiled = summed_up(tool, steps, costs)
    assert isinstance(profiled, Profile)
    assert tool.startswith("OpenVINO ")
    assert {part.part for part in profiled.parts if part.ms} >= {"resnet", "vit", "block", "decoder"}
    shares = {part.part: part.share for part in profiled.parts}
    assert shares.get("other", 0) < 0.5  # most steps are led back


def test_a_network_is_put_under_the_lower_of_both_roofs():
    peak = Peak(arithmetic="fp32", gmacs_per_s=100.0, gemm="", gbytes_per_s=10.0, copy="")
    alone = latency(RoundTimes(rounds_ms=[[2.0] * 10]), "CPU")
    assert alone is not None
    memory_bound = peaks.roofline(alone, 40_000_000, 10_000_000, peak)
    assert (memory_bound.intensity, memory_bound.reached_gmacs_per_s, memory_bound.roof_gmacs_per_s) == (4, 20, 40)
    assert memory_bound.share == 0.5
    compute_bound = peaks.roofline(alone, 40_000_000, 100_000, peak)
    assert compute_bound.roof_gmacs_per_s == 100


class Multiplier(ChildSession):
    """A child that multiplies at a known rate, if it can at all."""

    milliseconds = {"onnxruntime": 4.0, "openvino": 2.0}

    def __init__(self, request: SessionRequest) -> None:
        import onnx

        onnx.checker.check_model(onnx.load(request.path))
        if request.compute_dtype == "bf16" and request.backend == "onnxruntime":
            raise DeviceError("no bfloat16")
        self.backend, self.description = request.backend, f"{request.backend} {request.precision}"

    def time(self, batch: np.ndarray, duration_s: float, min_runs: int) -> list[float]:
        return [self.milliseconds[self.backend]] * min_runs

    def close(self) -> None:
        pass


def test_the_peak_is_that_of_the_fastest_back_end(monkeypatch):
    monkeypatch.setattr(peaks, "ChildSession", Multiplier)
    monkeypatch.setattr(peaks, "COPY_BYTES", 1 << 16)
    ways = [("onnxruntime", "fp32"), ("openvino", "fp32"), ("onnxruntime", "int8"), ("onnxruntime", "bf16")]
    measured = peaks.peaks(ways, width=32, rows=8)
    assert isinstance(measured, tuple)
    assert [(peak.arithmetic, peak.gmacs_per_s) for peak in measured] == [
        ("fp32", 4 * 3 * 8 * 32**2 / 2.0 / 1e6),
        ("int8", 4 * 3 * 8 * 32**2 / 4.0 / 1e6),
    ]
    assert "openvino fp32" in measured[0].gemm
    assert all(peak.gbytes_per_s > 0 for peak in measured)
    assert peaks.peaks([("onnxruntime", "bf16")], width=32, rows=8) == Missing(
        reason="no back-end here runs a plain matrix product"
    )


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ("12, 300\n4711, 1024\n", 1024 * 1.048576),
        ("12, 300\n", Missing(reason="nvidia-smi does not list the process; inside a container it often cannot")),
        ("4711, [N/A]\n", Missing(reason="nvidia-smi does not list the process; inside a container it often cannot")),
        ("", Missing(reason="nvidia-smi does not list the process; inside a container it often cannot")),
    ],
)
def test_device_memory_is_read_from_nvidias_own_tool(table, expected):
    from medseg_trt.bench.gpu_memory import used_mb

    assert used_mb(table, 4711) == expected
