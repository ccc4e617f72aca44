"""The CPU benchmark's arithmetic: errors in decibels, bounds of medians, the verdict."""

import runpy
from math import inf
from pathlib import Path

import numpy as np
import pytest

FIGURES = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "bench_cpu_figures.py"))
GROUPS = {
    "pytorch-eager-fp32": "peer",
    "pytorch-eager-fp32-transunet": "peer",
    "openvino-nncf-int8-bf16": "peer",
    "mine-int8": "ours",
    "mine-fp32": "ours",
    "int8-gemm": "limit",
}
SQNR = {**dict.fromkeys(GROUPS, 60.0), "openvino-nncf-int8-bf16": 25.0, "mine-int8": 26.0}
VNNI = ("avx2", "avx512_vnni")


def rounds(**changed: float) -> dict[str, list[list[float]]]:
    """Return five rounds of three runs each, with a drift that hits all alike."""
    milliseconds = {
        "pytorch-eager-fp32": 1000.0,
        "pytorch-eager-fp32-transunet": 450.0,
        "openvino-nncf-int8-bf16": 130.0,
        "mine-int8": 100.0,
        "mine-fp32": 400.0,
        "int8-gemm": 1.0,
        **{name.replace("_", "-"): value for name, value in changed.items()},
    }
    drifts = (1.0, 1.1, 0.9, 1.3, 1.0)
    return {
        name: [[drift * value, drift * value, 5 * drift * value] for drift in drifts]
        for name, value in milliseconds.items()
    }


def test_sqnr_of_a_known_error() -> None:
    reference = np.array([3.0, -4.0], np.float32)
    assert FIGURES["sqnr_db"](reference * np.float32(1.1), reference) == pytest.approx(20, abs=1e-4)  # 1/10 of it all
    assert FIGURES["sqnr_db"](reference, reference) == inf


def test_verdict_takes_the_ratio_within_a_round() -> None:
    found = FIGURES["verdict"](rounds(), GROUPS, SQNR, VNNI)
    assert (found["ours"], found["fastest_peer"]) == ("mine-int8", "openvino-nncf-int8-bf16")
    assert found["fastest peer"]["rounds"] == pytest.approx([1.3] * 5)  # the drift cancels
    assert found["holds"]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"pytorch_eager_fp32": 880.0}, "8.80x pytorch-eager-fp32, not 9x"),
        ({"pytorch_eager_fp32_transunet": 290.0}, "2.90x pytorch-eager-fp32-transunet, not 3x"),
        ({"openvino_nncf_int8_bf16": 119.0}, "1.19x openvino-nncf-int8-bf16, not 1.2x"),
    ],
)
def test_verdict_fails_below_each_limit(changed: dict[str, float], reason: str) -> None:
    found = FIGURES["verdict"](rounds(**changed), GROUPS, SQNR, VNNI)
    assert not found["holds"]
    assert found["reasons"] == [reason]


def test_one_slow_round_breaks_the_bound_but_not_the_median() -> None:
    taken = rounds()
    taken["mine-int8"][3] = [200.0] * 3
    found = FIGURES["verdict"](taken, GROUPS, SQNR, VNNI)
    assert found["fastest peer"]["ratio"] == pytest.approx(1.3)
    assert found["reasons"] == ["lower bound against openvino-nncf-int8-bf16 0.845, not 1.1"]


def test_worse_logits_than_the_peer_fail() -> None:
    found = FIGURES["verdict"](rounds(), GROUPS, SQNR | {"mine-int8": 24.0}, VNNI)
    assert found["reasons"] == ["SQNR 24.0 dB, less than 25.0 dB of openvino-nncf-int8-bf16"]


def test_noisy_variant_is_not_the_best() -> None:
    assert FIGURES["verdict"](rounds(), GROUPS, SQNR | {"mine-int8": 19.0}, VNNI)["ours"] == "mine-fp32"


def test_noise_without_a_better_variant_fails() -> None:
    noisy = SQNR | {"mine-int8": 19.0, "mine-fp32": 18.0, "openvino-nncf-int8-bf16": 17.0}
    assert FIGURES["verdict"](rounds(), GROUPS, noisy, VNNI)["reasons"] == ["SQNR 19.0 dB, less than 20 dB"]


def test_noisy_peer_is_still_a_peer() -> None:
    found = FIGURES["verdict"](rounds(), GROUPS, SQNR | {"openvino-nncf-int8-bf16": 9.0}, VNNI)
    assert found["fastest_peer"] == "openvino-nncf-int8-bf16"


def test_no_verdict_without_fast_integers() -> None:
    found = FIGURES["verdict"](rounds(), GROUPS, SQNR, ("avx2", "avx512f"))
    assert not found["judged"]
    assert not found["holds"]
