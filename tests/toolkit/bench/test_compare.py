"""Two generated reports side by side: what became faster, what became worse, and what cannot be compared."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from medseg_trt import cli
from medseg_trt.bench import compare
from medseg_trt.bench.accuracy_schema import Accuracy, SliceCounts, Verdict
from medseg_trt.bench.compare import (
    REFERENCE_ELSEWHERE,
    DiceChange,
    SpeedChange,
    cells,
    compare_reports,
    judge,
    withheld_factors,
)
from medseg_trt.bench.limits import Gate, judge_report, parse_gate, require
from medseg_trt.bench.missing import Missing
from medseg_trt.bench.schema import CaseFile, Images, Report, Row, Summary
from medseg_trt.bench.timing_schema import SCOPES, Latency, Scope, Speedup, Tier
from medseg_trt.errors import AccuracyGateError, InputError, MedsegError, SpeedGateError, UsageError
from medseg_trt.files import write_json
from medseg_trt.machine import Machine
from medseg_trt.metrics.intervals import Interval, median_of_rounds
from medseg_trt.spec import Classes, to_dict

CASES, SLICES, ROUNDS, RUNS = 12, 3, 20, 8
NOT_MEASURED = Missing(reason="generated")
NOWHERE: dict[Scope, Missing] = dict.fromkeys(SCOPES, NOT_MEASURED)


def latency(rng: np.random.Generator, drift: np.ndarray, median_ms: float) -> Latency:
    """Return times that follow the machine's drift, with jitter, and a hiccup in one of twenty."""
    jitter = np.exp(rng.normal(0, 0.03, (ROUNDS, RUNS)))
    hiccups = 1 + (rng.random((ROUNDS, RUNS)) < 0.05) * rng.exponential(2, (ROUNDS, RUNS))
    rounds = median_ms * drift[:, None] * jitter * hiccups
    p90, p95, p99 = np.percentile(rounds, [90, 95, 99]).tolist()
    return Latency(
        rounds_ms=tuple(map(tuple, rounds.tolist())),
        runs=rounds.size,
        mean_ms=float(rounds.mean()),
        min_ms=float(rounds.min()),
        max_ms=float(rounds.max()),
        median_ms=median_of_rounds(rounds.tolist()),
        p90_ms=p90,
        p95_ms=p95,
        p99_ms=p99,
        p90_estimate_ms=p90,
        p99_estimate_ms=None,
        variation=0.1,
        stable=True,
        warmup_runs=10,
        timer="generated",
    )


def accuracy(truth: np.random.Generator, rng: np.random.Generator, dice: float) -> Accuracy:
    """Return masks that are right on about this share of their pixels."""
    slices = []
    for case in range(CASES):
        there = int(truth.integers(2000, 6000))
        for number in range(SLICES):
            right = round(there * np.clip(dice + rng.normal(0, 0.004), 0, 1))
            slices.append(SliceCounts(case=f"case{case}", slice=number, counts=((right, there, there),)))
    return Accuracy(
        metric="Dice",
        mean_dice=dice,
        mean_iou=None,
        mean_hd95=None,
        hd95_unit=None,
        means=(),
        cases=(),
        slices=tuple(slices),
    )


def row(name: str, backend: str, precision: str, time: Latency, accurate: Accuracy, speed=NOT_MEASURED) -> Row:
    return Row(
        name=name,
        role="reference" if backend == "pytorch" else "variant",
        backend=backend,
        device="CPU",
        description=name,
        executed=True,
        statement="generated",
        precision=precision,
        compute="fp32",
        variant="",
        size_mb=1.0,
        failure=None,
        warnings=(),
        start=NOT_MEASURED,
        latency={**NOWHERE, "model": time},
        speedup={**NOWHERE, "model": speed},
        stages_ms={},
        throughput=NOT_MEASURED,
        memory=NOT_MEASURED,
        energy=NOT_MEASURED,
        agreement=NOT_MEASURED,
        accuracy=accurate,
        differences=(),
        verdict=NOT_MEASURED,
        worst=(),
        profile=NOT_MEASURED,
        roofline=NOT_MEASURED,
    )


def report(seed: int = 0, machine: float = 1.0, slower: float = 1.0, dice: float = 0.9) -> Report:
    """Return a report of a machine that drifts; of a variant that is so much slower, or has this Dice."""
    rng, truth = np.random.default_rng(seed), np.random.default_rng(99)
    drift = machine * np.exp(0.2 * np.sin(np.arange(ROUNDS) / 3) + np.cumsum(rng.normal(0, 0.02, ROUNDS)))
    rows = (
        row("PyTorch", "pytorch", "fp32", latency(rng, drift, 80.0), accuracy(np.random.default_rng(99), rng, 0.9)),
        row("ORT int8", "onnxruntime", "int8", latency(rng, drift, 20.0 * slower), accuracy(truth, rng, dice)),
    )
    cases = tuple(
        CaseFile(case=f"case{case}", slices=SLICES, height=64, width=64, sha256=f"{case:064x}") for case in range(CASES)
    )
    return Report(
        created="2026-11-25T00:00:00+00:00",
        commands=("generated",),
        tier=Tier(name="quick", warmup_ms=200.0, warmup_runs=10, duration_s=3.0, min_runs=10, starts=1),
        batch=1,
        reference="generated",
        images=Images(
            description="generated",
            timed="none",
            data="generated",
            split="val",
            labelled=True,
            slices=CASES * SLICES,
            cases=cases,
        ),
        classes=Classes(names=("background", "disc")),
        machine=Machine(
            processor="generated", cores=2, memory_mb=None, system="", python="3.11", governor=None, load=None
        ),
        versions={"numpy": "2.0"},
        digests={},
        peaks=NOT_MEASURED,
        rows=rows,
        summary=Summary(holds=True, headline="generated", lines=(), fastest="ORT int8"),
    )


def speed_of(before: Report, after: Report) -> SpeedChange:
    change = compare_reports(before, after).rows[1].speed["model"]
    assert isinstance(change, SpeedChange)
    return change


def dice_of(before: Report, after: Report) -> DiceChange:
    change = compare_reports(before, after).rows[1].dice
    assert isinstance(change, DiceChange)
    return change


def reason(missing: object) -> str:
    assert isinstance(missing, Missing)
    return missing.reason


def test_a_slow_hour_of_the_machine_is_no_change():
    """Half as fast altogether: the latencies say so, the speeds against the reference do not."""
    speed = speed_of(report(0), report(1, machine=2.0))
    assert isinstance(speed.latency, Interval)
    assert isinstance(speed.judged, Interval)
    assert speed.latency.high < 0.6
    assert speed.judged is speed.against_reference
    assert speed.judged.low < 1 < speed.judged.high


SEEDS = 60
MOST_ALARMS = 10  # of 60 at 5 %: 3 are expected, and more than this come less than once in 2,000 times


def count_slower(slower: float) -> int:
    pairs = ((report(2 * seed, machine=1.3), report(2 * seed + 1, slower=slower)) for seed in range(SEEDS))
    judged = [speed_of(*pair).judged for pair in pairs]
    return sum(isinstance(change, Interval) and change.high < 1 for change in judged)


def test_compare_detects_a_3_percent_slowdown_with_few_false_alarms(monkeypatch):
    monkeypatch.setattr("medseg_trt.metrics.intervals.RESAMPLES", 1000)
    assert count_slower(1.0) <= MOST_ALARMS
    assert count_slower(1.03) >= 0.95 * SEEDS


def test_compare_detects_a_dice_drop_of_0_01_with_few_false_alarms():
    worse = [dice_of(report(seed), report(seed + 50, dice=0.89)).change for seed in range(10)]
    assert all(change.high < 0 for change in worse)
    assert np.mean([change.estimate for change in worse]) == pytest.approx(-0.01, abs=0.002)
    same = [dice_of(report(seed), report(seed + 50)) for seed in range(20)]
    assert (
        sum(dice_change.change.high < 0 for dice_change in same) <= 5
    )  # of 20 at 5 %; more than 5 come once in 3,000 times
    assert {(dice_change.unit, dice_change.change.units) for dice_change in same} == {("cases", CASES)}


@pytest.mark.parametrize(
    ("after", "gate", "error"),
    [
        (report(1), "speed=0.95x,dice=-0.005", None),
        (report(1, slower=1 / 1.5), "speed=1.2x", None),
        (report(1, slower=1.1), "speed=0.97x", SpeedGateError),
        (report(1), "speed=1x", SpeedGateError),  # as fast as before: not surely
        (report(1, dice=0.89), "dice=-0.005", AccuracyGateError),
        (report(1, dice=0.89, slower=1.1), "speed=0.97x,dice=-0.005", AccuracyGateError),
    ],
)
def test_a_gate_ends_with_its_exit_code(tmp_path, after, gate, error):
    write_json(tmp_path / "a.json", to_dict(report(0)))
    write_json(tmp_path / "b" / "report.json", to_dict(after))
    arguments = ["compare", str(tmp_path / "a.json"), str(tmp_path / "b"), "--gate", gate]
    ran = CliRunner().invoke(cli.cli, arguments)
    assert type(ran.exception) is (error or type(None)), ran.output
    assert "ORT int8" in ran.stdout
    printed = json.loads(CliRunner().invoke(cli.cli, [*arguments, "--json"]).stdout)
    assert all(limit["holds"] for limit in printed["gate"]) is (error is None)
    assert error is None or error.exit_code == {SpeedGateError: 4, AccuracyGateError: 3}[error]


@pytest.mark.parametrize(
    ("text", "gate"),
    [
        ("speed=1.2x,dice=-0.005", Gate(speed=1.2, dice=-0.005)),
        ("speed=1.2", Gate(speed=1.2)),
        (" Dice = -0.01 ", Gate(dice=-0.01)),
        ("dice=0,speed=2X", Gate(speed=2.0, dice=0.0)),
    ],
)
def test_parse_gate_reads_speed_and_dice_limits(text, gate):
    assert parse_gate(text) == gate


@pytest.mark.parametrize(
    "text",
    [
        "",
        "speed",
        "speed=",
        "speed=fast",
        "speed=-1x",
        "speed=0",
        "speed=inf",
        "speed=nan",
        "dice=x",
        "dice=-5",
        "dice=nan",
        "hd95=1",
        "speed=1x,speed=2x",
        "speed=1x;dice=0",
        "dice=-0.5x",
    ],
)
def test_a_gate_that_cannot_be_read_says_how_to_write_one(text):
    with pytest.raises(UsageError, match=r"cannot be read; write for example speed=1.2x,dice=-0.005"):
        parse_gate(text)


def other_classes(original: Report) -> Report:
    return replace(original, classes=Classes(names=("background", "bar")))


def other_backend(original: Report) -> Report:
    return replace(original, rows=tuple(replace(old_row, backend="openvino") for old_row in original.rows))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (other_classes, UsageError, "of the classes background, disc, the second of background, bar"),
        (other_backend, InputError, "no network is in both reports: the first has PyTorch, ORT int8"),
    ],
)
def test_compare_refuses_reports_without_common_data(change, error, words):
    with pytest.raises(error, match=words):
        compare_reports(report(), change(report()))


def with_cases(original: Report, change) -> Report:
    cases = tuple(change(index, case) for index, case in enumerate(original.images.cases))
    return replace(original, images=replace(original.images, cases=cases))


def test_other_images_are_compared_on_those_in_both():
    half = with_cases(report(1), lambda index, case: replace(case, sha256="x" * 64) if index % 2 else case)
    comparison = compare_reports(report(), half)
    assert "6 of 12 and 7 are in both" in comparison.notes[0]
    assert dice_of(report(), half).change.units == CASES // 2
    none = with_cases(report(1), lambda index, case: replace(case, sha256=f"{100 + index:064x}"))
    comparison = compare_reports(report(), none)
    assert "no image is in both" in reason(comparison.rows[1].dice)
    with pytest.raises(AccuracyGateError, match=r"dice cannot be judged .* no image is in both"):
        require(judge(comparison, Gate(dice=-0.005)))
    require(judge(comparison, Gate(speed=0.9)))  # their speeds can be


def test_limits_are_put_to_the_variants_whatever_the_reference_is():
    after = report(1)
    after = replace(after, rows=(replace(after.rows[0], backend="onnxruntime"), after.rows[1]))
    judged = judge(compare_reports(report(), after), Gate(speed=0.5))
    assert [(limit.name, limit.holds) for limit in judged] == [("ORT int8", True)]


def test_comparison_notes_list_missing_rows_machines_and_versions():
    after = report(1)
    machine = replace(after.machine, processor="another", cores=8)
    after = replace(after, machine=machine, versions={"numpy": "2.1"}, rows=after.rows[:1])
    comparison = compare_reports(report(), after)
    assert comparison.notes == (
        "in the first report alone: ORT int8",
        "the machines differ: generated, 2 cores, and another, 8 cores",
        "other versions: numpy 2.0 → 2.1",
    )


def test_other_batches_other_machines_and_unlabelled_images_are_not_compared():
    batches = compare_reports(report(), replace(report(1), batch=4)).rows[1]
    assert "the batches are 1 and 4 images" in reason(batches.speed["model"])
    elsewhere = replace(report(1), machine=replace(report().machine, processor="another"))
    refused = compare_reports(report(), elsewhere)
    assert "it ran on CPU generated and on CPU another" in reason(speed_of(report(), elsewhere).judged)
    assert cells(refused)[1][3:5] == ("–", "–")
    assert any("it ran on CPU generated" in line for line in withheld_factors(refused))
    with pytest.raises(SpeedGateError, match="speed cannot be judged"):
        require(judge(refused, Gate(speed=0.5)))
    unlabelled = replace(report(1), images=replace(report().images, labelled=False))
    assert "have no masks" in reason(compare_reports(report(), unlabelled).rows[1].dice)
    assert compare_reports(report(), report(1)).rows[1].speed["end-to-end"] == NOT_MEASURED


def on_device(original: Report, *devices: str) -> Report:
    rows = zip(original.rows, devices, strict=True)
    return replace(original, rows=tuple(replace(old_row, device=device) for old_row, device in rows))


def test_no_ratio_is_formed_between_two_devices():
    cpu, gpu = on_device(report(), "CPU", "CPU"), on_device(report(1), "CPU", "GPU A")
    assert "it ran on CPU generated and on GPU A" in reason(speed_of(cpu, gpu).judged)
    with pytest.raises(SpeedGateError, match="speed cannot be judged"):
        require(judge(compare_reports(cpu, gpu), Gate(speed=0.5)))
    other = on_device(report(1), "CPU", "GPU B")
    assert "it ran on GPU A and on GPU B" in reason(speed_of(gpu, other).judged)
    # The row ran on one GPU in both reports, and the reference beside it on the processor.
    change = speed_of(on_device(report(), "CPU", "GPU A"), gpu)
    assert reason(change.against_reference) == REFERENCE_ELSEWHERE
    assert change.judged is change.latency


def test_a_planted_ratio_between_devices_is_noticed(monkeypatch):
    monkeypatch.setattr(compare, "_device", lambda *_: "anything")
    with pytest.raises(AssertionError):
        test_no_ratio_is_formed_between_two_devices()


def test_compare_detects_changed_ground_truth_masks():
    after = report(1)
    before = after.rows[1].accuracy
    assert isinstance(before, Accuracy)
    redrawn = replace(before.slices[0], counts=((1, 2, 3),))
    accurate = replace(before, slices=(redrawn, *before.slices[1:]))
    after = replace(after, rows=(after.rows[0], replace(after.rows[1], accuracy=accurate)))
    assert "masks of the data folder differ" in reason(compare_reports(report(), after).rows[1].dice)


def judged_report(speed: tuple[float, float, float], drop: tuple[float, float, float]) -> Report:
    original = report()
    verdict = Verdict(
        holds=True,
        reference=0.9,
        candidate=0.9 - drop[0],
        drop=drop[0],
        drop_low=drop[1],
        drop_high=drop[2],
        limit=0.005,
        confidence=0.9,
        unit="cases",
        pairs=12,
        words="generated",
    )
    speedup = Speedup(ratio=speed[0], low=speed[1], high=speed[2], confidence=0.9, rounds=20)
    variant = replace(original.rows[1], verdict=verdict, speedup={**NOWHERE, "model": speedup})
    slow = replace(variant, name="slow", speedup=NOWHERE)
    return replace(original, rows=(original.rows[0], slow, variant))


@pytest.mark.parametrize(
    ("speed", "drop", "error"),
    [
        ((4.0, 3.9, 4.1), (0.001, -0.001, 0.003), None),
        ((1.25, 1.19, 1.31), (0.001, -0.001, 0.003), SpeedGateError),
        ((4.0, 3.9, 4.1), (0.001, -0.005, 0.007), AccuracyGateError),
        ((1.0, 0.9, 1.1), (0.02, 0.01, 0.03), AccuracyGateError),
    ],
)
def test_bench_gate_applies_dice_to_all_rows_and_speed_to_the_fastest(speed, drop, error: type[MedsegError] | None):
    """Dice to every one, speed to the fastest; the unfavourable end of the interval counts."""
    judged = judge_report(judged_report(speed, drop), Gate(speed=1.2, dice=-0.005))
    assert [(limit.name, limit.quantity) for limit in judged] == [
        ("slow", "dice"),
        ("ORT int8", "dice"),
        ("ORT int8", "speed"),
    ]
    if error is None:
        require(judged)
    else:
        with pytest.raises(error):
            require(judged)


def test_speed_gate_fails_if_only_the_reference_ran():
    alone = replace(report(), rows=report().rows[:1], summary=replace(report().summary, fastest=None))
    with pytest.raises(SpeedGateError, match="only the reference ran here"):
        require(judge_report(alone, Gate(speed=1.0)))


def test_a_file_that_is_no_report_is_one_line(tmp_path: Path):
    (tmp_path / "a.json").write_text("{}")
    ran = CliRunner().invoke(cli.cli, ["compare", str(tmp_path / "a.json"), str(tmp_path / "none.json")])
    assert isinstance(ran.exception, MedsegError)
    assert "schema" in str(ran.exception)
