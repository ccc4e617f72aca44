"""Measure the peaks of this machine: large matrix products, and a copy.

The products are a chain as in a language layer, run by each row's back-end in its number format. The peaks are achieved
figures, not theoretical ones: they are the roof for the networks measured in the same run.
Source: Williams, Waterman & Patterson 2009, "Roofline: An Insightful Visual Performance Model".
"""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from medseg_trt.bench.missing import Missing
from medseg_trt.bench.profile_schema import Peak, Roofline
from medseg_trt.bench.timing_schema import Latency
from medseg_trt.errors import MedsegError, require
from medseg_trt.machine import cores
from medseg_trt.sessions.session_request import SessionRequest
from medseg_trt.sessions.subprocess_session import ChildSession

OPSET = 18
CHANNELS = 3  # a session's input has as many
WIDTH, ROWS, LAYERS = 2048, 256, 4  # of the products; 256 tokens of three channels
COPY_BYTES = 1 << 28  # larger than any cache
REPEATS = 7  # the best of them is the peak


def peaks(executions: Sequence[tuple[str, str]], width: int = WIDTH, rows: int = ROWS) -> tuple[Peak, ...] | Missing:
    """Measure the peak of every arithmetic with the fastest back-end that runs it.

    Args:
        executions: (back-end, arithmetic) pairs; an arithmetic is fp32, bf16 or int8.
        width: of the matrices.
        rows: of the left matrix, in each of three channels.
    """
    try:
        require("onnx", "export")
    except MedsegError as error:
        return Missing(reason=str(error))
    copied, copy = _copy_rate()
    peak_of: dict[str, Peak] = {}
    for backend, arithmetic in dict.fromkeys(executions):
        try:
            rate, description = _gemm_rate(backend, arithmetic, width, rows)
        except MedsegError:  # not supported by this back-end; another one may
            continue
        if arithmetic not in peak_of or rate > peak_of[arithmetic].gmacs_per_s:
            words = f"{LAYERS} products of {CHANNELS * rows} x {width} by {width} x {width}, {description}"
            peak_of[arithmetic] = Peak(
                arithmetic=arithmetic, gmacs_per_s=rate, gemm=words, gbytes_per_s=copied, copy=copy
            )
    return tuple(peak_of.values()) or Missing(reason="no back-end here runs a plain matrix product")


def roofline(latency: Latency, macs: int, moved: int, peak: Peak) -> Roofline:
    """Return the share of the machine's peak that a network reaches, given its multiply-accumulates per byte moved."""
    intensity = macs / moved
    reached, roof = macs / latency.median_ms / 1e6, min(peak.gmacs_per_s, intensity * peak.gbytes_per_s)
    return Roofline(
        arithmetic=peak.arithmetic,
        macs=macs,
        bytes=moved,
        intensity=intensity,
        reached_gmacs_per_s=reached,
        roof_gmacs_per_s=roof,
        share=reached / roof,
    )


def _gemm_rate(backend: str, arithmetic: str, width: int, rows: int) -> tuple[float, str]:
    """Return 10^9 multiply-accumulates per second, and the description of the back-end."""
    compute = "bf16" if arithmetic == "bf16" else "fp32"
    image = np.random.default_rng(0).normal(0, 0.5, (1, CHANNELS, rows, width)).astype(np.float32)
    with TemporaryDirectory() as folder:
        path = Path(folder, "products.onnx")
        write_products(path, arithmetic, width, rows)
        precision = "int8" if arithmetic == "int8" else "fp32"
        request = SessionRequest(backend=backend, path=path, precision=precision, compute_dtype=compute)
        with ChildSession(request) as session:
            session.time(image, 0.0, 2)
            best_ms = min(session.time(image, 0.0, REPEATS))
            description = session.description
    return LAYERS * CHANNELS * rows * width**2 / best_ms / 1e6, description


def write_products(path: Path, arithmetic: str, width: int, rows: int) -> None:
    """Write a chain of matrix products in ONNX, each quantised before and after where ``arithmetic`` is int8."""
    from onnx import TensorProto, helper, numpy_helper, save

    random = np.random.default_rng(0)
    nodes: list[Any] = []
    constants: list[Any] = []
    value = "pixel_values"
    for layer in range(LAYERS):
        product = "logits" if layer == LAYERS - 1 else f"product{layer}"
        if arithmetic == "int8":
            arrays = {
                f"scale{layer}": np.array(4 / 255, np.float32),
                f"zero{layer}": np.array(128, np.uint8),
                f"weight{layer}": random.integers(-127, 128, (width, width), np.int8),
                f"weight_scale{layer}": np.full(width, width**-0.5 / 73, np.float32),
                f"weight_zero{layer}": np.zeros(width, np.int8),
            }
            scale, zero, weight, weight_scale, weight_zero = arrays
            nodes += [
                helper.make_node("QuantizeLinear", [value, scale, zero], [f"codes{layer}"]),
                helper.make_node("DequantizeLinear", [f"codes{layer}", scale, zero], [f"rounded{layer}"]),
                helper.make_node("DequantizeLinear", [weight, weight_scale, weight_zero], [f"matrix{layer}"], axis=1),
                helper.make_node("MatMul", [f"rounded{layer}", f"matrix{layer}"], [product]),
            ]
        else:
            arrays = {f"weight{layer}": random.normal(0, width**-0.5, (width, width)).astype(np.float32)}
            nodes.append(helper.make_node("MatMul", [value, f"weight{layer}"], [product]))
        constants += [numpy_helper.from_array(array, name) for name, array in arrays.items()]
        value = product
    shape = [1, CHANNELS, rows, width]
    graph = helper.make_graph(
        nodes,
        "products",
        [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)],
        constants,
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10), path)


def _copy_rate() -> tuple[float, str]:
    """Return 10^9 bytes per second, read and written, and how they were copied."""
    threads = cores()
    source = np.ones(COPY_BYTES // 8)
    target = np.zeros_like(source)
    parts = list(zip(np.array_split(source, threads), np.array_split(target, threads), strict=True))
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(REPEATS):
            began = time.perf_counter()
            list(pool.map(lambda pair: np.copyto(pair[1], pair[0]), parts))
            best = min(best, time.perf_counter() - began)
    return 2 * source.nbytes / best / 1e9, f"{COPY_BYTES >> 20} MiB by {threads} thread(s), bytes read and written"
