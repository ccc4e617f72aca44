"""The stored results keep the limits that they were measured for; a result that is worse fails here."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
MIB = 1 << 20
# How many times as fast as these the fastest of our networks is, on a processor with VNNI or AMX. The measurement had
# 9.25, 1.224 and 3.73; a fifth of a round's drift cancels in the ratio, and 1.22 is the lower bound of the second.
SPEEDS = {"pytorch-eager-fp32": 9.0, "fastest peer": 1.2, "pytorch-eager-fp32-transunet": 3.0}
LOWEST_BOUND = 1.1  # of the ratio to the fastest peer, at 95 %: faster beyond doubt
MIN_SQNR_DB = 20.0  # a tenth of the reference's amplitude
# infer may have the weights one and a half times, for the tensor that is being converted, and 250 MB of libraries.
INFER_FACTOR, INFER_MB = 1.5, 250
FACTORS = {"fp16": 4.0}  # a CPU computes fp16 graphs in fp32, with copies of the weights: 3.8 measured
# Engines: the weights' own size (235 MB in 8 bits, 472 MB in 16) and what kernels need beside them.
PLAN_MB = {"fp16": 500, "int8": 275, "int8+fp16": 275, "w8a16+fp16": 320}
BUILD_S, BUILD_MB = 20, 3000  # of the process that builds one engine: it fits beside others on a small machine
# Of the layer as it is stored and of the layer in the type of the block file: each is in memory once, and the largest
# tensor, less than a quarter of them, is there a second time while it is joined, reordered, dequantised or checked.
LAYER_FACTOR = 1.25
# The affine rung has 0.44 % of the block's products; the rest is what the ratio of two measurements drifts.
AFFINE_OVER_PLAIN = 1.05
FLAT_MB = 25  # of ten times as many images: 19 measured, while the names of all images were kept
HOST_US = 40  # an engine of a millisecond is not to wait for Python: at most 4 % of it
LAYER_BYTES = 96 * MIB  # libraries that only larger tensors make PyTorch use, and the memory allocator's slack


def speed_on_a_cpu(result: dict[str, Any]) -> list[str]:
    speeds, sqnr = result["verdict"], result["verdict"]["sqnr_db"]
    failed = [name for name, limit in SPEEDS.items() if speeds[name]["ratio"] < limit]
    failed += ["lower bound"] if speeds["fastest peer"]["lower_bound"] < LOWEST_BOUND else []
    return failed + (["SQNR"] if sqnr["ours"] < max(MIN_SQNR_DB, *sqnr.values()) else [])


def memory_of_infer(result: dict[str, Any]) -> list[str]:
    return [
        row["precision"]
        for row in result["infer"]
        if row["anonymous_mb"] > FACTORS.get(row["precision"], INFER_FACTOR) * row["weights_mb"] + INFER_MB
    ]


def engines(result: dict[str, Any]) -> list[str]:
    return [
        row["precision"]
        for row in result["rows"]
        if row["plan_mb"] > PLAN_MB[row["precision"]]
        or row["wall_s"] > BUILD_S
        or row["peak_resident_mb"] > BUILD_MB
        or row["differing_bytes"]
    ]


def memory_of_extract(result: dict[str, Any]) -> list[str]:
    return [
        row["layout"]
        for row in result["rows"]
        if row["added_bytes"] > LAYER_FACTOR * (row["layer_bytes_stored"] + row["block_bytes"]) + LAYER_BYTES
    ]


def cost_of_the_affine_rung(result: dict[str, Any]) -> list[str]:
    ratios = {name: ratio for name, (ratio, _, _) in result["ratios"].items() if "affine ÷" in name}
    return [name for name, ratio in ratios.items() if ratio > AFFINE_OVER_PLAIN] if ratios else ["not measured"]


def memory_of_an_archive(result: dict[str, Any]) -> list[str]:
    peaks = result["peak_mb"]
    failed = [name for name in ("whole", "resumed") if peaks[name] - peaks["tenth"] > FLAT_MB]
    return failed + [name for name in ("killed", "same_bytes") if not result[name]]


def host_cost(result: dict[str, Any]) -> list[str]:
    return [name for name, cost in result["microseconds"].items() if cost > HOST_US]


CHECKS: list[tuple[str, Callable[[dict[str, Any]], list[str]]]] = [
    ("bench_cpu", speed_on_a_cpu),
    ("bench_cpu", memory_of_infer),
    ("engines", engines),
    ("archive", memory_of_an_archive),
    ("bench_block", cost_of_the_affine_rung),
    ("host_cost", host_cost),
    ("block_extract_memory", memory_of_extract),
]


def stored(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("name", "failed"), CHECKS)
def test_a_stored_result_keeps_its_limits(name, failed):
    assert failed(stored(name)) == []


@pytest.mark.parametrize(
    ("name", "failed", "path", "value"),
    [
        ("bench_cpu", speed_on_a_cpu, ("verdict", "pytorch-eager-fp32", "ratio"), 8.8),
        ("bench_cpu", speed_on_a_cpu, ("verdict", "fastest peer", "ratio"), 1.19),
        ("bench_cpu", speed_on_a_cpu, ("verdict", "fastest peer", "lower_bound"), 0.845),
        ("bench_cpu", speed_on_a_cpu, ("verdict", "pytorch-eager-fp32-transunet", "ratio"), 2.9),
        ("bench_cpu", speed_on_a_cpu, ("verdict", "sqnr_db", "ours"), 19.0),
        ("bench_cpu", speed_on_a_cpu, ("verdict", "sqnr_db", "openvino-nncf-int8-bf16"), 25.0),
        ("bench_cpu", memory_of_infer, ("infer", 1, "anonymous_mb"), 700.0),
        ("engines", engines, ("rows", 1, "plan_mb"), 276.0),
        ("engines", engines, ("rows", 0, "wall_s"), 21.0),
        ("engines", engines, ("rows", 0, "peak_resident_mb"), 3001.0),
        ("engines", engines, ("rows", 0, "differing_bytes"), 1),
        (
            "bench_block",
            cost_of_the_affine_rung,
            ("ratios", "ours, auto, block affine ÷ ours, plain TransUNet", 0),
            1.06,
        ),
        ("bench_block", cost_of_the_affine_rung, ("ratios",), {}),
        ("host_cost", host_cost, ("microseconds", "pixels, with two kernels"), 107.3),  # arguments checked every time
        ("archive", memory_of_an_archive, ("peak_mb", "whole"), 160.0),
        ("archive", memory_of_an_archive, ("same_bytes",), False),
        ("archive", memory_of_an_archive, ("killed",), False),
        ("block_extract_memory", memory_of_extract, ("rows", 0, "added_bytes"), 2 << 30),
    ],
)
def test_a_worse_result_fails(name, failed, path, value):
    result = copy.deepcopy(stored(name))
    *outer, last = path
    part = result
    for key in outer:
        part = part[key]
    part[last] = value
    assert failed(result) != []
