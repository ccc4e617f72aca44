"""Every way to run a bundle is tried. Most networks here are a line of NumPy behind the interface of a child."""

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from medseg_trt.building import executions
from medseg_trt.building.contract import Contract
from medseg_trt.building.executions import ExecutionTrials, try_executions
from medseg_trt.building.reference import Reference
from medseg_trt.building.reference_images import JudgedImages, ReferenceImages
from medseg_trt.bundles.bundle import load_bundle
from medseg_trt.bundles.manifest import Variant
from medseg_trt.devices import CPU, ComputeDevice
from medseg_trt.errors import AccuracyGateError, ArtefactError, DeviceError, UsageError
from medseg_trt.network_spec import ModelSpec
from medseg_trt.sessions.backends import BACKENDS
from medseg_trt.sessions.session_request import SessionRequest
from medseg_trt.sessions.subprocess_session import ChildSession
from medseg_trt.spec import BuildSpec, Classes, Preprocessing

SIZE = (16, 16)
IMAGES = np.random.default_rng(0).normal(size=(6, 3, *SIZE)).astype(np.float32)
GOLDEN = IMAGES[:1]
CONTRACT = Contract(
    model=ModelSpec(image_size=SIZE, num_classes=3),
    preprocessing=Preprocessing(image_size=SIZE),
    classes=Classes(names=("background", "disc", "bar")),
)


def network(batch: np.ndarray) -> np.ndarray:
    return np.stack([batch[:, 0] + batch[:, 1], batch[:, 1] - batch[:, 2], 0.5 * batch[:, 2]], axis=1)


def wrong(batch: np.ndarray) -> np.ndarray:
    return network(batch)[:, ::-1].copy()


def nearly(batch: np.ndarray) -> np.ndarray:
    """Return logits that are off by more than any order of additions, and make the same masks."""
    return 1.01 * network(batch)


@dataclass
class Machine:
    """What would happen here to a graph, by its file, or by (file, back-end, type of the float parts)."""

    times_ms: dict = field(default_factory=dict)
    answers: dict = field(default_factory=dict)
    errors: dict = field(default_factory=dict)
    dies_on_opening: dict = field(default_factory=dict)  # which opening is the one that it dies of
    openings: list = field(default_factory=list)
    open_now: int = 0
    devices: set = field(default_factory=set)  # (back-end, device) of every opening


@pytest.fixture
def machine(monkeypatch) -> Machine:
    """Take the place of the child processes; every graph is right and takes 10 ms unless the machine says otherwise."""
    machine = Machine()

    class Child(ChildSession):
        def __init__(self, request: SessionRequest) -> None:
            backend, compute = request.backend, request.compute_dtype
            self.key = (request.path.name, backend, compute)
            machine.devices.add((backend, str(request.device)))
            machine.openings.append(self.key)
            if machine.openings.count(self.key) == self.of(machine.dies_on_opening, 0):
                raise ArtefactError(f"{request.name} was killed by signal 11; it is not used")
            if error := self.of(machine.errors, None):
                raise error
            self.description = f"{backend} {request.precision} in {compute}"
            machine.open_now += 1

        def of(self, table: dict, otherwise):
            return table.get(self.key, table.get(self.key[0], otherwise))

        def run(self, batch: np.ndarray) -> np.ndarray:
            return self.of(machine.answers, network)(batch)

        def time(self, batch: np.ndarray, duration_s: float, min_runs: int) -> list[float]:
            time_ms = self.of(machine.times_ms, 10.0)
            return [time_ms.pop(0) if isinstance(time_ms, list) else time_ms]

        def close(self) -> None:
            machine.open_now -= 1

    monkeypatch.setattr(executions, "ChildSession", Child)
    monkeypatch.setattr(executions, "is_installed", lambda backend: True)
    return machine


def graphs(*names: str) -> dict[str, Variant]:
    """Return variants; ``int8/plain`` is the precision and the dialect."""
    pairs = (name.partition("/") for name in names)
    return {
        f"{precision}-{dialect or 'canonical'}": Variant(
            precision=precision,
            dialect=dialect or "canonical",
            graph=f"{precision}-{dialect or 'canonical'}.onnx",
            weights=f"weights-{precision}.bin",
            passes={},
        )
        for precision, _, dialect in pairs
    }


def tried(variants: dict[str, Variant], device: ComputeDevice = CPU, **spec) -> ExecutionTrials:
    judged = JudgedImages(inputs=IMAGES, sizes=(SIZE,) * 6, spacings=(None,) * 6, cases=tuple("abcdef"), truths=None)
    images = ReferenceImages(verified=IMAGES, description="generated noise", judged=judged, calibration=None)
    reference = Reference(network=network, contract=CONTRACT, images=images, spec=BuildSpec(**spec), device=device)
    return try_executions(Path("bundle"), variants, BuildSpec(**spec), reference, (GOLDEN, network(GOLDEN)))


def test_on_a_gpu_its_back_ends_are_verified_and_timed_too_and_engines_are_not(machine):
    machine.times_ms = {("fp32-plain.onnx", "onnxruntime-cuda", "fp32"): 1.0}
    trials = tried(graphs("fp32", "fp32/plain"), ComputeDevice("cuda", 1))
    backends = {backend for _, backend, _ in ways(trials)}
    assert backends == {name for name, kind in BACKENDS.items() if not kind.engines}
    assert ways(trials)[0] == ("fp32-plain", "onnxruntime-cuda", "fp32")
    assert {device for _, device in machine.devices} == {"cuda:1"}
    assert {backend for _, backend, _ in ways(tried(graphs("fp32", "fp32/plain")))} == {"onnxruntime", "openvino"}


def test_a_back_end_of_gpus_that_does_not_run_is_a_line_and_no_failure(machine):
    machine.errors = {("fp32-plain.onnx", "onnxruntime-cuda", "fp32"): DeviceError("took no node")}
    trials = tried(graphs("fp32", "fp32/plain"), ComputeDevice("cuda"))
    assert "fp32-plain with onnxruntime-cuda in fp32: took no node" in trials.rejected


def ways(tried: ExecutionTrials) -> list[tuple[str, str, str]]:
    return [(trial.variant, trial.backend, trial.compute_dtype) for trial in tried.executions]


@pytest.mark.parametrize(
    ("times_ms", "first"),
    [
        ({"fp32-canonical.onnx": 10.0, "int8-canonical.onnx": 9.6}, "fp32-canonical"),  # 4 % is not worth it
        ({"fp32-canonical.onnx": 10.0, "int8-canonical.onnx": 9.4}, "int8-canonical"),
        ({"fp32-canonical.onnx": 10.0, "int8-canonical.onnx": 12.0}, "fp32-canonical"),
    ],
)
def test_integers_go_first_only_where_they_are_clearly_faster(machine, times_ms, first):
    machine.times_ms = times_ms
    trials = tried(graphs("fp32", "int8"))
    assert trials.executions[0].variant == first
    assert len(trials.executions) == 2


def test_the_fastest_float_is_what_integers_must_beat(machine):
    machine.times_ms = {"fp32-canonical.onnx": 20.0, "fp16-canonical.onnx": 10.0, "int8-canonical.onnx": 9.8}
    trials = tried(graphs("fp32", "fp16", "int8"))
    assert [trial.variant for trial in trials.executions] == ["fp16-canonical", "int8-canonical", "fp32-canonical"]


def test_without_a_float_the_fastest_is_first(machine):
    machine.times_ms = {"int8-canonical.onnx": 10.0, "int8-uint8.onnx": 9.9}
    assert [trial.variant for trial in tried(graphs("int8", "int8/uint8")).executions] == [
        "int8-uint8",
        "int8-canonical",
    ]


def test_execution_time_is_the_better_of_two_interleaved_measurements(machine):
    machine.times_ms = {"fp32-canonical.onnx": [10.0, 30.0], "fp16-canonical.onnx": [40.0, 20.0]}
    trials = tried(graphs("fp32", "fp16"))
    assert [trial.median_ms for trial in trials.executions] == [10.0, 20.0]
    timed = machine.openings[2:]  # two to compare them, and then in turn
    assert timed == machine.openings[:2] * 2


def test_every_backend_gets_its_dialects_and_the_float_types_that_make_sense(machine):
    every = graphs("fp32", "fp32/plain", "fp16/plain", "int8", "int8/plain", "int8/uint8", "w4a16/plain")
    trials = tried(every, precisions=("fp32", "fp16", "int8", "w4a16"))
    assert set(ways(trials)) == {
        ("fp32-canonical", "onnxruntime", "fp32"),
        ("fp32-plain", "openvino", "fp32"),  # bf16 was not asked for
        ("fp16-plain", "openvino", "fp32"),
        ("int8-canonical", "onnxruntime", "fp32"),
        ("int8-uint8", "onnxruntime", "fp32"),
        ("int8-plain", "openvino", "fp32"),
        ("int8-plain", "openvino", "bf16"),  # what eight bits leave over
        ("w4a16-plain", "openvino", "fp32"),
        ("w4a16-plain", "openvino", "bf16"),
    }
    assert all(trial.executed for trial in trials.executions)
    assert trials.rejected == ()
    assert machine.open_now == 0


def test_bf16_runs_the_float32_graph(machine):
    both = graphs("fp32", "fp32/plain")
    assert ("fp32-plain", "openvino", "bf16") in ways(tried(both, precisions=("fp32", "bf16")))
    assert ways(tried(both, precisions=("bf16",))) == [("fp32-plain", "openvino", "bf16")]


def test_only_the_backend_that_was_named_is_tried(machine):
    trials = tried(graphs("fp32", "fp32/plain"), backend="openvino")
    assert ways(trials) == [("fp32-plain", "openvino", "fp32")]
    assert {backend for _, backend, _ in machine.openings} == {"openvino"}


def test_an_unknown_backend_lists_the_known_ones(machine):
    with pytest.raises(UsageError, match="choose one of: auto, onnxruntime, openvino"):
        tried(graphs("fp32"), backend="coreml")


def test_a_backend_of_gpus_is_for_infer(machine):
    with pytest.raises(
        UsageError, match="a build tries onnxruntime-cuda with --device cuda alone; leave --backend out"
    ):
        tried(graphs("fp32"), backend="onnxruntime-cuda")
    assert machine.openings == []


def test_one_that_draws_other_masks_is_dropped_with_its_reason(machine, caplog):
    machine.answers["int8-uint8.onnx"] = wrong
    trials = tried(graphs("int8", "int8/uint8"))
    assert ways(trials) == [("int8-canonical", "onnxruntime", "fp32")]
    (reason,) = trials.rejected
    assert reason.startswith("int8-uint8 with onnxruntime in fp32: onnxruntime int8 in fp32 draws other masks")
    assert "int8-uint8 with onnxruntime in fp32 is not used" in caplog.text


def test_execution_that_crashes_on_opening_is_rejected_with_its_reason(machine):
    machine.dies_on_opening["fp32-plain.onnx"] = 1
    trials = tried(graphs("fp32", "fp32/plain"))
    assert ways(trials) == [("fp32-canonical", "onnxruntime", "fp32")]
    assert trials.rejected == (
        "fp32-plain with openvino in fp32: openvino with fp32-plain.onnx was killed by signal 11; it is not used",
    )


@pytest.mark.parametrize("opening", [2, 3])
def test_execution_that_crashes_during_timing_is_rejected(machine, opening):
    machine.dies_on_opening["fp32-plain.onnx"] = opening
    trials = tried(graphs("fp32", "fp32/plain"))
    assert ways(trials) == [("fp32-canonical", "onnxruntime", "fp32")]
    assert "was killed by signal 11" in trials.rejected[0]


def test_unsupported_compute_dtype_is_rejected_without_a_warning(machine, caplog):
    machine.errors["fp32-plain.onnx", "openvino", "bf16"] = DeviceError("this processor has no bfloat16 arithmetic")
    trials = tried(graphs("fp32", "fp32/plain"), precisions=("fp32", "bf16"))
    assert len(trials.executions) == 2
    assert trials.rejected == ("fp32-plain with openvino in bf16: this processor has no bfloat16 arithmetic",)
    assert caplog.text == ""


def test_nothing_that_can_run_is_an_error_with_every_reason(machine):
    machine.errors["fp32-plain.onnx"] = DeviceError("this processor has no bfloat16 arithmetic")
    with pytest.raises(DeviceError, match=r"nothing here can run .* fp32-plain with openvino in bf16: this processor"):
        tried(graphs("fp32", "fp32/plain"), precisions=("bf16",))


def test_a_precision_that_nothing_runs_rightly_fails_the_build(machine):
    machine.answers = {"int8-canonical.onnx": wrong, "int8-uint8.onnx": wrong}
    with pytest.raises(AccuracyGateError, match="draws other masks"):
        tried(graphs("fp32", "int8", "int8/uint8"))
    assert machine.open_now == 0


def test_float32_must_be_exact_and_the_others_need_not(machine):
    machine.answers["int8-canonical.onnx"] = nearly
    trials = tried(graphs("fp32", "int8"))
    verified = {trial.variant: trial.verification for trial in trials.executions}
    assert verified["fp32-canonical"].gate is None
    gate = verified["int8-canonical"].gate
    assert gate is not None
    assert gate.holds
    assert verified["int8-canonical"].max_abs_error > 1e-4
    machine.answers["fp32-canonical.onnx"] = nearly
    with pytest.raises(AccuracyGateError, match="logits differ"):
        tried(graphs("fp32"))


def test_golden_error_limit_is_derived_from_the_measured_error(machine):
    machine.answers["int8-canonical.onnx"] = nearly
    error_by_variant = {trial.variant: trial.golden_error for trial in tried(graphs("fp32", "int8")).executions}
    assert error_by_variant["fp32-canonical"] == pytest.approx(10 * 1e-4)
    assert error_by_variant["int8-canonical"] == pytest.approx(2 * 0.01 * np.abs(network(GOLDEN)).max(), rel=1e-3)


def test_missing_backend_is_verified_by_another_one_and_ranked_last(machine, monkeypatch):
    monkeypatch.setattr(executions, "is_installed", lambda backend: backend != "openvino")
    machine.times_ms = {"fp32-plain.onnx": 1.0}
    trials = tried(graphs("fp32", "fp32/plain"))
    here, elsewhere = trials.executions
    assert (here.backend, here.executed) == ("onnxruntime", True)
    assert (elsewhere.backend, elsewhere.executed, elsewhere.median_ms) == ("openvino", False, None)
    assert elsewhere.verification.by == "onnxruntime fp32 in fp32"
    assert {backend for _, backend, _ in machine.openings} == {"onnxruntime"}


def test_crashing_child_process_rejects_only_its_execution(tiny_bundle, monkeypatch):
    class Dying(ChildSession):
        def run(self, batch: np.ndarray) -> np.ndarray:
            if self.backend == "openvino":
                os.kill(self.process_id, signal.SIGSEGV)
            return super().run(batch)

        def time(self, batch: np.ndarray, duration_s: float, min_runs: int) -> Sequence[float]:
            return super().time(batch, 0.0, 1)

    monkeypatch.setattr(executions, "ChildSession", Dying)
    bundle = load_bundle(tiny_bundle)
    image, logits = bundle.golden()
    judged = JudgedImages(inputs=image, sizes=((32, 32),), spacings=(None,), cases=("a",), truths=None)
    contract = Contract(model=bundle.content.model, preprocessing=bundle.preprocessing, classes=bundle.classes)
    images = ReferenceImages(verified=image, description="generated noise", judged=judged, calibration=None)
    spec = BuildSpec()
    reference = Reference(
        network=lambda batch: np.repeat(logits, len(batch), 0), contract=contract, images=images, spec=spec
    )
    with monkeypatch.context() as patch:
        patch.setattr(
            Reference,
            "check_logits",
            lambda reference, run: {
                "images": "generated noise",
                "num_images": 1,
                "max_abs_error": float(np.abs(run(image) - logits).max()),
                "agreement": 1.0,
            },
        )
        trials = try_executions(tiny_bundle, bundle.content.variants, spec, reference, (image, logits))
    assert ways(trials) == [("fp32", "onnxruntime", "fp32")]
    assert trials.executions[0].verification.max_abs_error <= 1e-4
    assert trials.rejected == (
        "fp32-plain with openvino in fp32: openvino with fp32-plain.onnx was killed by signal 11 (SIGSEGV); "
        "it is not used",
    )
