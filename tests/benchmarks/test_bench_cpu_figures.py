"""The CPU benchmark's arithmetic: errors in decibels, ratios of the medians of rounds, the choice of variants."""

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


def test_the_ratio_is_taken_within_a_round() -> None:
    speeds = FIGURES["compare_speeds"](rounds(), GROUPS, SQNR)
    assert (speeds["ours"], speeds["fastest_peer"]) == ("mine-int8", "openvino-nncf-int8-bf16")
    assert speeds["fastest peer"]["rounds"] == pytest.approx([1.3] * 5)  # the drift cancels


def test_one_slow_round_lowers_the_bound_but_not_the_median() -> None:
    samples = rounds()
    samples["mine-int8"][3] = [200.0] * 3
    against_peer = FIGURES["compare_speeds"](samples, GROUPS, SQNR)["fastest peer"]
    assert against_peer["ratio"] == pytest.approx(1.3)
    assert against_peer["lower_bound"] == pytest.approx(0.845)


def test_own_variant_with_low_sqnr_is_not_chosen_if_a_better_one_exists() -> None:
    assert FIGURES["compare_speeds"](rounds(), GROUPS, SQNR | {"mine-int8": 19.0})["ours"] == "mine-fp32"
    noisy = SQNR | {"mine-int8": 19.0, "mine-fp32": 18.0}
    speeds = FIGURES["compare_speeds"](rounds(), GROUPS, noisy)
    assert speeds["sqnr_db"] == {"ours": 19.0, "openvino-nncf-int8-bf16": 25.0}


def test_a_noisy_peer_is_still_a_peer() -> None:
    speeds = FIGURES["compare_speeds"](rounds(), GROUPS, SQNR | {"openvino-nncf-int8-bf16": 9.0})
    assert speeds["fastest_peer"] == "openvino-nncf-int8-bf16"
