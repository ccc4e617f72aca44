"""What every rule of ``fuse`` must leave alone: shapes that broadcast, other axes, orders, sizes and attributes.

Each graph is written in ONNX's text and differs in one thing from a form that is fused. Fused or not, the outputs stay
those of the graph before, and so do values that others read.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator
from onnx_text import graph_of, largest_change, outputs_of

from medseg_trt.export.graph.fusions.fuse import fuse
from medseg_trt.export.graph.trace import OnnxGraph

# A fused node adds up in another order than the nodes it replaces: 2e-7 measured, ONNX Runtime on an x86 CPU.
SAME = 2e-6
BATCH, TOKENS, WIDTH, HEADS = 2, 3, 8, 2
Case = tuple[str, int]  # the graph's text, and how many places are fused

RNG = np.random.default_rng(0)
WEIGHT = RNG.normal(size=WIDTH).astype(np.float32)
CONSTANTS: Mapping[str, np.ndarray] = {
    "weight": WEIGHT,
    "ones": np.ones(WIDTH, np.float32),
    "one": np.ones(1, np.float32),
    "nearly_ones": np.r_[np.ones(WIDTH - 1), 0.5].astype(np.float32),
    "of_tokens": RNG.normal(size=(TOKENS, WIDTH)).astype(np.float32),
    "of_rows": RNG.normal(size=(TOKENS, 1)).astype(np.float32),
    "single": RNG.normal(size=1).astype(np.float32),
    "residual": RNG.normal(size=(BATCH, TOKENS, WIDTH)).astype(np.float32),
    "zero": np.array([0]),
    "two": np.array([2]),
    "half": np.array([WIDTH // 2]),
    "whole": np.array([WIDTH]),
    "last": np.array([-1]),
    "step": np.array([1]),
    "backwards": np.array([-1]),
    "all": np.array([10**6]),
    "minus_half": np.array([-(WIDTH // 2)]),
    "third": np.array([3]),
    "fifth": np.array([5]),
    "seventh": np.array([7]),
}
ROWS = f"float[{BATCH},{TOKENS},{WIDTH}]"


def text(inputs: str, lines: str, outputs: str = "float[a,b,c] y") -> str:
    return f"g ({inputs}) => ({outputs}) {{ {lines} }}"


def norm_of(x: str, scale: str = "weight", attributes: str = "axis = -1, epsilon = 0.001") -> str:
    return f"y = RMSNormalization <{attributes}> ({x}, {scale})"


SUM_AND_NORM = f"total = Add (x, r) {norm_of('total')}"
SUMS: Mapping[str, Case] = {
    "as it is": (text(f"{ROWS} x, {ROWS} r", SUM_AND_NORM), 1),
    "twice the same": (text(f"{ROWS} x", f"total = Add (x, x) {norm_of('total')}"), 1),
    "the batch has a name": (text(f"float[n,{TOKENS},{WIDTH}] x, float[n,{TOKENS},{WIDTH}] r", SUM_AND_NORM), 1),
    "two names that may differ": (text(f"float[n,{TOKENS},{WIDTH}] x, float[m,{TOKENS},{WIDTH}] r", SUM_AND_NORM), 0),
    "sizes without a name": (text(f"float[?,{TOKENS},{WIDTH}] x, float[?,{TOKENS},{WIDTH}] r", SUM_AND_NORM), 0),
    "one image for all": (text(f"{ROWS} x, float[1,{TOKENS},{WIDTH}] r", SUM_AND_NORM), 0),
    "one token for all": (text(f"{ROWS} x, float[{BATCH},1,{WIDTH}] r", SUM_AND_NORM), 0),
    "one column for all": (text(f"{ROWS} x, float[{BATCH},{TOKENS},1] r", SUM_AND_NORM), 0),
    "both are repeated": (text(f"float[{BATCH},1,{WIDTH}] x, float[1,{TOKENS},{WIDTH}] r", SUM_AND_NORM), 0),
    "fewer axes": (text(f"{ROWS} x, float[{TOKENS},{WIDTH}] r", SUM_AND_NORM), 0),
    "fewer axes, first": (text(f"{ROWS} x, float[{WIDTH}] r", f"total = Add (r, x) {norm_of('total')}"), 0),
    "a constant": (text(f"{ROWS} x", f"total = Add (x, residual) {norm_of('total')}"), 0),
    "a difference": (text(f"{ROWS} x, {ROWS} r", f"total = Sub (x, r) {norm_of('total')}"), 0),
    "a sum behind another operator": (
        text(f"{ROWS} x, {ROWS} r", f"before = Add (x, r) total = Neg (before) {norm_of('total')}"),
        0,
    ),
    "others read the sum": (
        text(f"{ROWS} x, {ROWS} r", f"{SUM_AND_NORM} z = Neg (total)", "float[a,b,c] y, float[a,b,c] z"),
        1,
    ),
    "the sum is an output": (text(f"{ROWS} x, {ROWS} r", SUM_AND_NORM, "float[a,b,c] y, float[a,b,c] total"), 1),
    "two norms of one sum": (
        text(
            f"{ROWS} x, {ROWS} r",
            f"{SUM_AND_NORM} z = RMSNormalization <axis = -1> (total, ones)",
            "float[a,b,c] y, float[a,b,c] z",
        ),
        1,
    ),
    "others read the sum before the norm": (
        text(
            f"{ROWS} x, {ROWS} r",
            f"total = Add (x, r) z = Neg (total) {norm_of('total')}",
            "float[a,b,c] y, float[a,b,c] z",
        ),
        1,
    ),
}
NORMS: Mapping[str, Case] = {  # the number of norms on their own
    "as it is": (text(f"{ROWS} x", norm_of("x")), 1),
    "the last axis by its number": (text(f"{ROWS} x", norm_of("x", attributes="axis = 2")), 1),
    "the epsilon that ONNX means": (text(f"{ROWS} x", norm_of("x", attributes="axis = -1")), 1),
    "another axis": (text(f"{ROWS} x", norm_of("x", "of_tokens", "axis = 1")), 0),
    "another axis counted from the end": (text(f"{ROWS} x", norm_of("x", "of_tokens", "axis = -2")), 0),
    "two axes with one scale a column": (text(f"{ROWS} x", norm_of("x", "weight", "axis = -2")), 0),
    "all axes but the first with one scale a column": (text(f"{ROWS} x", norm_of("x", "weight", "axis = 1")), 0),
    "a scale for every token": (text(f"{ROWS} x", norm_of("x", "of_tokens")), 0),
    "one scale for all columns": (text(f"{ROWS} x", norm_of("x", "single")), 0),
    "a scale that is computed": (text(f"{ROWS} x", f"scale = Neg (weight) {norm_of('x', 'scale')}"), 0),
    "ones": (text(f"{ROWS} x", norm_of("x", "ones")), 1),
    "a single one": (text(f"{ROWS} x", norm_of("x", "one")), 1),
    "nearly ones, then scaled": (text(f"{ROWS} x", f"n = {norm_of('x', 'nearly_ones')[4:]} y = Mul (n, weight)"), 1),
    "ones, then scaled": (text(f"{ROWS} x", f"n = {norm_of('x', 'ones')[4:]} y = Mul (n, weight)"), 1),
    "ones, then scaled from the left": (text(f"{ROWS} x", f"n = {norm_of('x', 'ones')[4:]} y = Mul (weight, n)"), 1),
    "ones, then scaled by token": (text(f"{ROWS} x", f"n = {norm_of('x', 'ones')[4:]} y = Mul (n, of_rows)"), 1),
    "ones, then by more axes": (text(f"{ROWS} x", f"n = {norm_of('x', 'ones')[4:]} y = Mul (n, residual)"), 1),
    "ones, then squared": (text(f"{ROWS} x", f"n = {norm_of('x', 'ones')[4:]} y = Mul (n, n)"), 1),
    "scaled and read before": (
        text(
            f"{ROWS} x",
            f"n = {norm_of('x', 'ones')[4:]} y = Mul (n, weight) z = Neg (n)",
            "float[a,b,c] y, float[a,b,c] z",
        ),
        1,
    ),
    "scaled and an output before": (
        text(f"{ROWS} x", f"n = {norm_of('x', 'ones')[4:]} y = Mul (n, weight)", "float[a,b,c] y, float[a,b,c] n"),
        1,
    ),
}

SPLIT = "gate, up = Split <axis = -1, num_outputs = 2> (x)"
SILU = "opening = Sigmoid (gate) silu = Mul (gate, opening)"
SWIGLUS: Mapping[str, Case] = {
    "as it is": (text(f"{ROWS} x", f"{SPLIT} {SILU} y = Mul (silu, up)"), 1),
    "every product the other way": (
        text(f"{ROWS} x", f"{SPLIT} opening = Sigmoid (gate) silu = Mul (opening, gate) y = Mul (up, silu)"),
        1,
    ),
    "slices": (
        text(
            f"{ROWS} x",
            f"gate = Slice (x, zero, half, last) up = Slice (x, half, all, last, step) {SILU} y = Mul (silu, up)",
        ),
        1,
    ),
    "slices counted from the end": (
        text(
            f"{ROWS} x",
            f"gate = Slice (x, zero, minus_half, last) up = Slice (x, minus_half, whole, last) {SILU} "
            "y = Mul (silu, up)",
        ),
        1,
    ),
    "up and gate": (
        text(f"{ROWS} x", f"up, gate = Split <axis = -1, num_outputs = 2> (x) {SILU} y = Mul (silu, up)"),
        0,
    ),
    "of two tensors": (text(f"{ROWS} gate, {ROWS} up", f"{SILU} y = Mul (silu, up)"), 0),
    "up of another tensor": (
        text(
            f"{ROWS} x, {ROWS} other",
            f"{SPLIT} no, more = Split <axis = -1, num_outputs = 2> (other) {SILU} y = Mul (silu, more)",
        ),
        0,
    ),
    "the middle axis": (
        text(
            f"float[{BATCH},4,{WIDTH}] x", f"gate, up = Split <axis = 1, num_outputs = 2> (x) {SILU} y = Mul (silu, up)"
        ),
        0,
    ),
    "three parts": (
        text("float[2,3,12] x", f"gate, up, rest = Split <axis = -1, num_outputs = 3> (x) {SILU} y = Mul (silu, up)"),
        0,
    ),
    "a gap between the halves": (
        text(
            f"{ROWS} x",
            f"gate = Slice (x, zero, third, last) up = Slice (x, fifth, whole, last) {SILU} y = Mul (silu, up)",
        ),
        0,
    ),
    "halves that overlap": (
        text(
            f"{ROWS} x",
            f"gate = Slice (x, zero, half, last) up = Slice (x, third, seventh, last) {SILU} y = Mul (silu, up)",
        ),
        0,
    ),
    "every other column": (
        text(
            f"{ROWS} x",
            f"gate = Slice (x, zero, whole, last, two) up = Slice (x, half, whole, last) {SILU} y = Mul (silu, up)",
        ),
        0,
    ),
    "columns backwards": (
        text(
            f"{ROWS} x",
            f"gate = Slice (x, zero, half, last) up = Slice (x, last, third, last, backwards) {SILU} "
            "y = Mul (silu, up)",
        ),
        0,
    ),
    "the sigmoid of the other half": (
        text(f"{ROWS} x", f"{SPLIT} opening = Sigmoid (up) silu = Mul (gate, opening) y = Mul (silu, up)"),
        0,
    ),
    "another gate": (text(f"{ROWS} x", f"{SPLIT} silu = Gelu (gate) y = Mul (silu, up)"), 0),
    "a sum": (text(f"{ROWS} x", f"{SPLIT} {SILU} y = Add (silu, up)"), 0),
    "one column of up for all": (
        text(
            f"float[{BATCH},{TOKENS},5] x",
            f"gate = Slice (x, zero, half, last) up = Slice (x, half, all, last) {SILU} y = Mul (silu, up)",
        ),
        0,
    ),
    "others read the gate": (
        text(f"{ROWS} x", f"{SPLIT} {SILU} y = Mul (silu, up) z = Neg (silu)", "float[a,b,c] y, float[a,b,c] z"),
        1,
    ),
    "the gate is an output": (
        text(f"{ROWS} x", f"{SPLIT} {SILU} y = Mul (silu, up)", "float[a,b,c] y, float[a,b,c] silu"),
        1,
    ),
}


def feeds_of(graph: OnnxGraph) -> dict[str, np.ndarray]:
    """Return random numbers for every input; a size with a name or without one is ``BATCH``."""
    rng = np.random.default_rng(1)
    shapes = {
        str(value.name): [size if isinstance(size, int) else BATCH for size in value.shape or ()]
        for value in graph.model.graph.inputs
    }
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def computed(graph: OnnxGraph, feeds: Mapping[str, np.ndarray], by_reference: bool) -> dict[str, np.ndarray]:
    """Return the outputs; ONNX's reference runs what ONNX Runtime refuses, a scale of several axes."""
    if not by_reference:
        return outputs_of(graph, feeds)
    outputs = ReferenceEvaluator(ir.to_proto(graph.model)).run(None, dict(feeds))
    return {str(output.name): np.asarray(one) for output, one in zip(graph.model.graph.outputs, outputs, strict=True)}


def fused_counts(source: str, constants: Mapping[str, np.ndarray], by_reference: bool = False) -> dict[str, int]:
    """Fuse a graph, check that every output stays what it was, and return what was fused."""
    used = {name: values for name, values in constants.items() if any(word == name for word in words(source))}
    graph = graph_of(source, used)
    feeds = feeds_of(graph)
    copy, results = fuse(graph)
    before, after = (computed(one, feeds, by_reference) for one in (graph, copy))
    assert largest_change(before, after) < SAME
    return {rule: result.count for rule, result in results.items()}


def words(source: str) -> Sequence[str]:
    return "".join(letter if letter.isalnum() or letter == "_" else " " for letter in source).split()


@pytest.mark.parametrize("name", SUMS)
def test_a_norm_takes_a_sum_of_two_equal_shapes_and_no_other(name):
    source, fused = SUMS[name]
    counts = fused_counts(source, CONSTANTS)
    assert counts["add_rms_norms"] == fused
    assert counts["add_rms_norms"] + counts["rms_norms"] == source.count("RMSNormalization")


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_is_of_the_last_axis_with_one_scale_a_column(name):
    source, fused = NORMS[name]
    counts = fused_counts(source, CONSTANTS, by_reference="of_tokens" in source or "axis = 1" in source)
    assert (counts["rms_norms"], counts["add_rms_norms"]) == (fused, 0)


@pytest.mark.parametrize("name", SWIGLUS)
def test_swiglu_is_of_the_two_halves_of_one_tensor_gate_first(name):
    source, fused = SWIGLUS[name]
    assert fused_counts(source, CONSTANTS)["swiglus"] == fused
