import json
import os
import re
import signal
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from measured_here import SHORT, MeasuredHere
from tiny import write_pictures, write_volumes

from medseg_trt.bench import augmentation, benchmark, candidates, peaks, profiling, timings
from medseg_trt.bench.accuracy_schema import Verdict
from medseg_trt.bench.benchmark import ENDED, Bench, bench
from medseg_trt.bench.missing import Missing
from medseg_trt.bench.profile_schema import Profile, Roofline
from medseg_trt.bench.report_file import read_bench_report
from medseg_trt.bench.summary import summary
from medseg_trt.bench.timed_session import MeasuredSession
from medseg_trt.bench.timing_schema import SCOPES, Latency, Speedup
from medseg_trt.bundles.bundle import load_bundle
from medseg_trt.cli import cli, main
from medseg_trt.errors import AccuracyGateError, DeviceError, MedsegError, MissingExtraError, UsageError
from medseg_trt.files import write_json
from medseg_trt.sessions.backends import BACKENDS
from medseg_trt.spec import to_dict

CPU_BACKENDS = [name for name, backend in BACKENDS.items() if not backend.gpu]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_volumes(tmp_path_factory.mktemp("data"))


def labels_of(bundle: Path) -> dict[str, set[str]]:
    """Return what each back-end runs of a bundle, as ``--precision`` has it."""
    loaded, labels = load_bundle(bundle), defaultdict[str, set[str]](set)
    for execution in loaded.content.executions:
        precision = loaded.variant(execution).precision
        labels[execution.backend].add(candidates.precision_label(precision, execution.compute_dtype))
    return labels


def of(tiny_bundle, data, **changes):
    chosen = {"checkpoint": tiny_bundle.parent / "model" / "model.pt", "data": data, "split": "val", "tier": SHORT}
    return Bench(bundle=tiny_bundle, **(chosen | changes))


def measured_report(spec: Bench, scratch: Path) -> Any:
    """Return the report; what may be missing is not narrowed in every line of a test."""
    return bench(spec, scratch).report


def test_bench_report_has_accuracy_latency_memory_and_throughput_of_every_row(tiny_bundle, data, tmp_path, monkeypatch):
    monkeypatch.setattr(peaks, "COPY_BYTES", 1 << 20)
    monkeypatch.setattr(profiling, "peaks", lambda ways: peaks.peaks(ways, width=64, rows=8))
    monkeypatch.setattr(timings, "MIN_THROUGHPUT_S", 0.01)
    report = measured_report(of(tiny_bundle, data), tmp_path)
    reference, row = report.rows
    assert (reference.backend, row.backend) == ("pytorch", "onnxruntime")
    assert (reference.name, row.name) == ("pytorch fp32", "onnxruntime fp32")
    assert report.images.description == "5 slices of generated, split val"
    assert [(case.slices, case.height, case.width) for case in report.images.cases] == [(5, 36, 28)]
    assert 0 < row.agreement.max_abs_error < 1e-4
    assert row.agreement.labels >= 0.9999
    assert row.verdict.holds
    assert row.accuracy.mean_dice == pytest.approx(reference.accuracy.mean_dice, abs=1e-3)
    for measured_row in report.rows:
        assert measured_row.executed
        assert measured_row.failure is None
        for scope in ("model", "end-to-end"):
            assert isinstance(measured_row.latency[scope], Latency)
            assert measured_row.latency[scope].runs >= 10
            assert measured_row.latency[scope].warmup_runs >= 1
        assert isinstance(measured_row.latency["model+transfers"], Missing)  # a CPU transfers nothing, and says so
        assert measured_row.start.to_first_mask_ms == pytest.approx(
            measured_row.start.import_ms + measured_row.start.load_ms + measured_row.start.first_ms
        )
        assert measured_row.memory.peak_mb >= measured_row.memory.loaded_mb > 10
        assert [(way.batch, way.streams) for way in measured_row.throughput][:3] == [(1, 1), (4, 1), (8, 1)]
        assert all(way.images_per_s == pytest.approx(way.images / way.seconds) for way in measured_row.throughput)
        assert list(measured_row.stages_ms) == ["read", "prepare and restore", "run", "write"]
    assert reference.memory.peak_mb > row.memory.peak_mb  # PyTorch itself is larger than all of the other
    speed = row.speedup["model"]  # on a busy machine no factor is claimed
    assert isinstance(speed, Speedup) or speed.reason.startswith("no ratio is claimed: ")
    assert isinstance(row.profile, Profile)
    assert {part.part for part in row.profile.parts} >= {"resnet", "vit", "block", "decoder"}
    assert sum(layer.share for layer in row.profile.layers) == pytest.approx(1)
    assert isinstance(row.roofline, Roofline)
    assert row.roofline.macs == sum(part.macs for part in row.profile.parts) > 1e6
    on_disk = sum((tiny_bundle / name).stat().st_size for name in ("fp32.onnx", "weights-fp32.bin"))
    assert row.size_mb == pytest.approx(on_disk / 1e6)
    assert not [
        path for path in tmp_path.iterdir() if path.name != "report.json"
    ]  # masks were written here, and removed
    write_json(tmp_path / "report.json", to_dict(report))
    assert read_bench_report(tmp_path) == report


@pytest.mark.usefixtures("measured_here")
def test_without_a_checkpoint_the_bundles_own_float_network_is_the_reference(tiny_bundle, data, tmp_path):
    report = measured_report(of(tiny_bundle, data, checkpoint=None, backends=("openvino", "onnxruntime")), tmp_path)
    assert [(row.name, row.role) for row in report.rows] == [
        ("onnxruntime fp32", "reference"),
        ("openvino fp32", "variant"),
    ]
    assert report.reference.startswith("the bundle's fp32 network")
    assert "no checkpoint was given" in report.reference


@pytest.mark.usefixtures("measured_here")
def test_the_gain_and_the_cost_of_augmentation_are_measured_on_the_same_slices(tiny_bundle, data, tmp_path):
    report = measured_report(of(tiny_bundle, data, tta="flips"), tmp_path)
    gain = report.augmentation
    assert gain is not None
    assert gain.network == report.rows[1].name
    judged = report.rows[1].verdict
    assert isinstance(judged, Verdict)
    assert gain.before == pytest.approx(judged.candidate)
    assert gain.low <= gain.after - gain.before <= gain.high
    assert gain.ms_after > gain.ms_before > 0
    assert str(gain).startswith(f"tta flips with {gain.network}: Dice {gain.before:.4f} → ")
    with pytest.raises(UsageError, match="no test-time augmentation"):
        measured_report(of(tiny_bundle, data, tta="shear"), tmp_path)


@pytest.mark.usefixtures("measured_here")
def test_augmentation_that_finds_no_memory_is_a_warning_and_all_rows_are_measured(
    tiny_bundle, data, tmp_path, monkeypatch
):
    def fails(_batch):
        raise DeviceError("fake: the GPU has not enough memory")

    monkeypatch.setattr(augmentation, "averaged", lambda *_: fails)
    report = measured_report(of(tiny_bundle, data, tta="flips"), tmp_path)
    assert report.augmentation is None
    (warning,) = (text for text in report.warnings if "tta" in text)
    assert re.fullmatch(r"not measured: tta flips with .*: fake: the GPU has not enough memory", warning)
    assert all(isinstance(row.latency["model"], Latency) for row in report.rows)


@pytest.mark.usefixtures("measured_here")
def test_images_without_masks_and_noise_will_do(tiny_bundle, tmp_path):
    unlabelled = write_pictures(tmp_path / "pictures", count=3) / "images"
    for folder, description in (
        (unlabelled, "3 slices of images, without masks"),
        (None, "8 slices of generated noise"),
    ):
        report = measured_report(of(tiny_bundle, folder), tmp_path)
        assert report.images.description == description
        assert not report.images.labelled
        assert report.rows[1].accuracy.metric == "agreement with the reference in Dice"
        assert any("no masks" in line for line in report.summary.lines)


def turned(original, calls):
    def run(session, batch):
        logits = original(session, batch)
        calls.append(session.backend)
        return logits if session.backend == "pytorch" else np.ascontiguousarray(logits[:, ::-1])

    return run


def test_bench_does_not_time_a_network_with_wrong_masks(tiny_bundle, data, tmp_path, monkeypatch, measured_here):
    calls: list[str] = []
    timed: list[str] = []
    monkeypatch.setattr(MeasuredHere, "run", turned(MeasuredHere.run, calls))
    original = MeasuredHere.time_end_to_end

    def time_end_to_end(session, *rest):
        timed.append(session.backend)
        assert closed == ["onnxruntime"]  # before the others are timed
        return original(session, *rest)

    closed, close = list[str](), MeasuredHere.close
    monkeypatch.setattr(MeasuredHere, "close", lambda session: closed.append(session.backend) or close(session))
    monkeypatch.setattr(MeasuredHere, "time_end_to_end", time_end_to_end)
    report = measured_report(of(tiny_bundle, data), tmp_path)
    _, row = report.rows
    assert isinstance(row.verdict, Verdict)
    assert not row.verdict.holds
    assert set(timed) == {"pytorch"}
    assert row.latency["model"] == Missing(reason="its masks differ from the reference's, so it is not timed")
    assert not report.summary.holds
    assert report.summary.fastest is None
    assert row.worst  # where it went wrong can be looked at


@pytest.mark.usefixtures("measured_here")
def test_a_wrong_network_ends_the_command_with_3_after_the_report_was_written(tiny_bundle, data, tmp_path, monkeypatch):
    monkeypatch.setattr(MeasuredHere, "run", turned(MeasuredHere.run, []))
    command = [
        "bench",
        "--bundle",
        tiny_bundle,
        "--ckpt",
        tiny_bundle.parent / "model" / "model.pt",
        "--data",
        data,
        "--duration-s",
        "0",
        "-o",
        tmp_path / "report",
    ]
    ran = CliRunner().invoke(cli, [*map(str, command)])
    assert isinstance(ran.exception, AccuracyGateError)
    assert str(ran.exception) == (
        f"other masks than the reference's: onnxruntime fp32; see {tmp_path / 'report' / 'index.html'}"
    )
    assert not read_bench_report(tmp_path / "report").summary.holds
    assert "does not hold" in (tmp_path / "report" / "index.html").read_text(encoding="utf-8")


def test_a_process_that_is_killed_in_the_middle_is_an_explained_failure(tiny_bundle, data, tmp_path, monkeypatch):
    original = MeasuredSession.time_end_to_end

    def killed(self, way, duration_s, min_runs):
        if self.backend == "onnxruntime":
            os.kill(self.process_id, signal.SIGKILL)
        return original(self, way, duration_s, min_runs)

    monkeypatch.setattr(MeasuredSession, "time_end_to_end", killed)
    monkeypatch.setattr(timings, "MIN_THROUGHPUT_S", 0.01)
    report = measured_report(of(tiny_bundle, data, profile=False), tmp_path)
    reference, row = report.rows
    assert row.failure == (
        "onnxruntime with fp32.onnx was killed by signal 9 (SIGKILL); the machine may have run out of memory; "
        "it is not used"
    )
    assert isinstance(row.latency["model"], Latency)  # what was measured before is kept
    assert row.latency["end-to-end"] == Missing(reason=row.failure)
    assert row.accuracy.mean_dice is not None
    assert isinstance(reference.latency["end-to-end"], Latency)
    assert not report.summary.holds
    assert "onnxruntime fp32: not to be used" in report.summary.headline
    assert f"failed. {row.failure}" in report.summary.lines[0]


@pytest.mark.usefixtures("measured_here")
def test_a_back_end_that_is_not_installed_is_a_row_that_was_not_executed(built, tmp_path, monkeypatch):
    labels = labels_of(built.bundle)
    absent, other = CPU_BACKENDS if labels[CPU_BACKENDS[0]] - labels[CPU_BACKENDS[1]] else CPU_BACKENDS[::-1]
    names = {f"{absent} {label}" for label in labels[absent] - labels[other]}  # bf16, or INT8 where products saturate
    monkeypatch.setattr(candidates, "is_installed", lambda backend: backend != absent)
    report = measured_report(of(built.bundle, built.data, checkpoint=built.checkpoint, max_dice_drop=0.3), tmp_path)
    missing = [row for row in report.rows if not row.executed]
    assert {row.name for row in missing} == names != set()
    row, *_ = missing
    assert row.statement == f"not executed: {absent} is not installed here; it ran at the build, on another machine"
    assert (row.device, row.failure) == ("none", None)
    assert all(row.latency[scope] == Missing(reason=row.statement) for scope in SCOPES)
    assert row.accuracy == row.verdict == row.memory == row.energy == row.throughput == Missing(reason=row.statement)
    assert report.summary.holds  # what was not run is nobody's failure, and the summary names it
    assert any(line == f"{row.name}: {row.statement}." for line in report.summary.lines)


@pytest.mark.usefixtures("measured_here")
def test_named_back_ends_give_a_row_for_every_precision_on_each(built, tmp_path):
    report = measured_report(
        of(built.bundle, built.data, checkpoint=built.checkpoint, max_dice_drop=0.3, backends=("openvino",)), tmp_path
    )
    labels = labels_of(built.bundle)["openvino"]
    assert sorted(row.name for row in report.rows[1:]) == sorted(f"openvino {label}" for label in labels)
    assert len(labels) > 3


@pytest.mark.parametrize(
    ("backends", "kind", "message"),
    [
        (("coreml",), UsageError, "no back-end is called 'coreml'; choose from: onnxruntime, openvino"),
        (("openvino",), MissingExtraError, r"pip install 'medseg-trt\[openvino\]'"),
    ],
)
def test_a_named_back_end_that_cannot_run_is_an_error(
    tiny_bundle, data, tmp_path, monkeypatch, backends, kind, message
):
    monkeypatch.setattr(candidates, "is_installed", lambda name: name != "openvino")
    with pytest.raises(kind, match=message):
        measured_report(of(tiny_bundle, data, backends=backends), tmp_path)


@pytest.mark.usefixtures("measured_here")
def test_a_reference_that_does_not_start_ends_with_its_reason(tiny_bundle, data, tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise MedsegError("no memory for it")

    monkeypatch.setattr(MeasuredHere, "__init__", refuse)
    with pytest.raises(MedsegError, match="the reference does not start: no memory for it"):
        measured_report(of(tiny_bundle, data), tmp_path)


def test_data_of_other_classes_is_refused(tiny_bundle, tmp_path):
    lesions = write_pictures(tmp_path / "lesions")
    with pytest.raises(UsageError, match="has the classes background, lesion, but the network knows background, disc"):
        measured_report(of(tiny_bundle, lesions), tmp_path)


@pytest.mark.usefixtures("measured_here")
def test_a_bundle_of_another_checkpoint_is_said(tiny_bundle, built, data, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "bundle_candidates", lambda *_, **__: [])
    warnings = benchmark._candidates(of(tiny_bundle, data), replace_source(tiny_bundle))[2]
    assert warnings == ["model.medseg was not built from model.pt, but from another checkpoint"]


def replace_source(folder):
    from medseg_trt.bundles.bundle import load_bundle

    bundle = load_bundle(folder)
    return replace(bundle, content=replace(bundle.content, source={**bundle.content.source, "sha256": "0" * 64}))


def test_the_json_of_the_command_is_the_report(tiny_bundle, data, tmp_path, measured_here):
    command = ["bench", "--bundle", tiny_bundle, "--data", data, "--tier", "quick", "-o", tmp_path / "r", "--json"]
    ran = CliRunner().invoke(cli, [*map(str, command)], catch_exceptions=False)
    assert ran.exit_code == 0
    assert json.loads(ran.stdout) == json.loads((tmp_path / "r" / "report.json").read_text(encoding="utf-8"))
    assert {path.name for path in (tmp_path / "r").iterdir()} == {"report.json", "report.md", "index.html"}


class Impatient(MeasuredHere):
    """A session that is interrupted in one of its turns."""

    turns = 0  # of all rows, in the scope that is asked for
    last, scope = 0, "time"

    def turn(self, scope: str) -> None:
        Impatient.turns += scope == self.scope
        if scope == self.scope and Impatient.turns > self.last:
            raise KeyboardInterrupt

    def time(self, batch: np.ndarray, duration_s: float, min_runs: int) -> list[float]:
        self.turn("time")
        return super().time(batch, duration_s, min_runs)

    def time_end_to_end(self, case, duration_s, min_runs):
        self.turn("time_end_to_end")
        return super().time_end_to_end(case, duration_s, min_runs)


@pytest.mark.parametrize(("scope", "last"), [("time", 8), ("time_end_to_end", 9)])
def test_an_interrupt_keeps_what_was_measured(tiny_bundle, data, tmp_path, monkeypatch, measured_here, scope, last):
    monkeypatch.setattr(timings, "MeasuredSession", Impatient)
    monkeypatch.setattr(Impatient, "turns", 0)
    monkeypatch.setattr(Impatient, "scope", scope)
    monkeypatch.setattr(Impatient, "last", last)
    command = ["bench", "--bundle", tiny_bundle, "--data", data, "--tier", "quick", "--duration-s", "0"]
    monkeypatch.setattr(sys, "argv", ["medseg-trt", *map(str, command), "-o", str(tmp_path / "report")])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 130
    report = json.loads((tmp_path / "report/report.json").read_text())
    assert ENDED in report["warnings"]
    (row, *_) = report["rows"]
    assert len(row["latency"][{"time": "model", "time_end_to_end": "end-to-end"}[scope]]["rounds_ms"]) > 0
    if scope == "time":
        assert "reason" in row["latency"]["end-to-end"]
    assert row["profile"] == {"reason": ENDED}
    assert (tmp_path / "report/index.html").is_file()
    assert list(tmp_path.rglob(".partial-*")) == []


def test_an_interrupt_before_anything_was_timed_leaves_no_report(
    tiny_bundle, data, tmp_path, monkeypatch, measured_here
):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("medseg_trt.bench.benchmark.compare_all", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench(of(tiny_bundle, data), tmp_path)
    assert list(tmp_path.rglob(".partial-*")) == []


def test_masks_that_hold_are_not_called_wrong_where_nothing_was_timed(measured):
    report = measured.report
    rows = [replace(row, latency=dict.fromkeys(SCOPES, Missing(reason=ENDED))) for row in report.rows]
    said = summary(rows, report.tier, labelled=True)
    assert said.holds
    assert said.headline.startswith("Masks hold, but nothing was timed: ")
    assert all(row.name in said.headline for row in rows[1:] if row.executed)
