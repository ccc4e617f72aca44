"""Smoothing keeps the function of every graph, whatever else reads a value between a producer and its GEMMs.

Each graph is a producer, zero to two ReLUs and one or two GEMMs. A further reader is added at every point: an operator,
the graph's own output, or a GEMM that stays float. The values that it reads must not change.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np
import pytest
from onnx_text import graph_of, largest_change, outputs_of

from medseg_trt.export.graph.gemms import gemms
from medseg_trt.export.graph.trace import INPUT, OnnxGraph
from medseg_trt.export.precision.calibrate import observed_graph
from medseg_trt.export.precision.smooth import Smoothing, smooth, smoothable

# Every changed constant is rounded once to float32, and sums are taken over other numbers: 2.1e-7 is the most that was
# measured, with ONNX Runtime on an x86 CPU. A factor that reaches one reader too many changes outputs by percents.
SAME = 2e-6
CHANNELS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Maker:
    """How an activation with channels is made of ``x``, and what can multiply it."""

    lines: str  # the last value is ``made``
    constants: Mapping[str, tuple[int, ...]]
    image: bool = False  # channels first, for convolutions

    @property
    def gemm(self) -> str:
        return "Conv" if self.image else "MatMul"

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (4, CHANNELS, 1, 1) if self.image else (CHANNELS, 4)


PLUGIN = 'plugin_namespace = "medseg", plugin_version = "1"'
VECTOR = (CHANNELS,)
MAKERS: Mapping[str, Maker] = {
    "conv": Maker(
        lines="made = Conv (x, kernel, bias)",
        constants={"kernel": (CHANNELS, CHANNELS, 1, 1), "bias": VECTOR},
        image=True,
    ),
    "group norm": Maker(
        lines="made = GroupNormalization <num_groups = 2> (x, scale, bias)",
        constants={"scale": VECTOR, "bias": VECTOR},
        image=True,
    ),
    "layer norm": Maker(
        lines="made = LayerNormalization <axis = -1> (x, scale, bias)", constants={"scale": VECTOR, "bias": VECTOR}
    ),
    "rms norm": Maker(lines="made = RMSNormalization <axis = -1> (x, scale)", constants={"scale": VECTOR}),
    "our rms norm": Maker(
        lines=f"made = medseg.RMSNorm <epsilon = 0.00001, {PLUGIN}> (x, scale)", constants={"scale": VECTOR}
    ),
    "sum and norm": Maker(
        lines=f"made, total = medseg.AddRMSNorm <epsilon = 0.00001, {PLUGIN}> (x, x, scale)\n seen = Neg (total)",
        constants={"scale": VECTOR},
    ),
    "swiglu": Maker(
        lines=f"between = MatMul (x, matrix)\n made = medseg.SwiGLU <{PLUGIN}> (between)",
        constants={"matrix": (CHANNELS, 2 * CHANNELS)},
    ),
}
READERS = ("nothing", "an operator", "the output", "a float GEMM")
CASES = [
    (maker, relus, gemm_count, point, reader)
    for maker, relus, gemm_count, reader in product(MAKERS, range(3), (1, 2), READERS)
    for point in range(1 if reader == "nothing" else relus + 1)
]


def random_constants(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Return numbers that no factor leaves as they are; channels differ thirtyfold."""
    rng = np.random.default_rng(0)
    return {
        name: (rng.normal(size=shape) * np.geomspace(1, 30, shape[0]).reshape(-1, *[1] * (len(shape) - 1))).astype(
            np.float32
        )
        for name, shape in shapes.items()
    }


IMAGES = np.random.default_rng(1).normal(size=(6, 3, 2, CHANNELS)).astype(np.float32)
ROOT = {"root": np.random.default_rng(2).normal(size=(CHANNELS, 3, 1, 1)).astype(np.float32)}
TOKENS = {"rows": np.array([1, 6, CHANNELS])}


def written(maker: Maker, relus: int, gemm_count: int, point: int, reader: str) -> tuple[OnnxGraph, list[str]]:
    """Return a graph, and the names of the GEMMs that are to multiply codes."""
    points = ["made", *(f"open{index}" for index in range(1, relus + 1))]
    lines = [maker.lines, *(f"{one} = Relu ({old})" for old, one in pairwise(points))]
    shapes, outputs = dict(maker.constants), []
    for index in range(gemm_count):
        shapes[f"weight{index}"] = maker.weight_shape
        lines.append(f"answer{index} = {maker.gemm} ({points[-1]}, weight{index})")
        outputs.append(f"answer{index}")
    if reader == "an operator":
        lines.append(f"other = Neg ({points[point]})")
        outputs.append("other")
    elif reader == "the output":
        outputs.append(points[point])
    elif reader == "a float GEMM":
        shapes["other_weight"] = maker.weight_shape
        lines.append(f"other = {maker.gemm} ({points[point]}, other_weight)")
        outputs.append("other")
    outputs += ["seen"] if "seen =" in maker.lines else []
    graph = text_graph("\n".join(lines), random_constants(shapes), outputs, maker.image)
    return graph, [gemm.name for gemm in gemms(graph) if gemm.output.startswith("answer")]


def text_graph(
    lines: str, constants: Mapping[str, np.ndarray], outputs: Sequence[str], image: bool = False
) -> OnnxGraph:
    """Return a graph whose ``x`` is (1, channels, 2, 8) for an image, and else (1, tokens, channels)."""
    first, more = (f"Conv ({INPUT}, root)", ROOT) if image else (f"Reshape ({INPUT}, rows)", TOKENS)
    results = ", ".join(f"float{'[a,b,c,d]' if image else '[a,b,c]'} {name}" for name in outputs)
    made = f"<float[1,{CHANNELS},2,{CHANNELS}] made>" if image else ""  # ONNX infers no shape of a GroupNormalization
    text = f"g (float[1,3,2,{CHANNELS}] {INPUT}) => ({results}) {made} {{ x = {first}\n {lines} }}"
    return graph_of(text, {**constants, **more})


def smoothed(graph: OnnxGraph, names: list[str]) -> tuple[OnnxGraph, tuple[Smoothing, ...]]:
    """Smooth every candidate, whatever it gains."""
    watched = observed_graph(graph, smoothable(graph, names))
    return smooth(graph, names, lambda batch: outputs_of(watched, {INPUT: batch}), IMAGES, max_error_share=np.inf)


@pytest.mark.parametrize("maker_name", MAKERS)
def test_other_readers_read_the_same_values(maker_name):
    maker = MAKERS[maker_name]
    for _, relus, gemm_count, point, reader in [case for case in CASES if case[0] == maker_name]:
        where = f"{maker_name}, {relus} ReLUs, {gemm_count} GEMMs, {reader} reads point {point}"
        graph, names = written(maker, relus, gemm_count, point, reader)
        assert len(names) == gemm_count, where
        copy, smoothings = smoothed(graph, names)
        before, after = (outputs_of(variant, {INPUT: IMAGES[:1]}) for variant in (graph, copy))
        assert largest_change(before, after) < SAME, where
        assert len(smoothings) == (reader == "nothing"), where  # without another reader there is one candidate
        assert all(smoothing.alpha is not None for smoothing in smoothings), where
        assert (copy.model.graph.initializers.keys() != graph.model.graph.initializers.keys()) == bool(smoothings), (
            where
        )


OTHER_GRAPHS: Mapping[str, tuple[str, Mapping[str, tuple[int, ...]], list[str]]] = {
    # lines, constants, outputs; the GEMMs named "answer…" are to be rounded
    "gate and up are an output as well": (
        f"between = MatMul (x, matrix)\n made = medseg.SwiGLU <{PLUGIN}> (between)\n answer = MatMul (made, weight)",
        {"matrix": (CHANNELS, 2 * CHANNELS), "weight": (CHANNELS, 4)},
        ["answer", "between"],
    ),
    "gate and up are read by another": (
        f"between = MatMul (x, matrix)\n made = medseg.SwiGLU <{PLUGIN}> (between)\n answer = MatMul (made, weight)\n"
        "other = Neg (between)",
        {"matrix": (CHANNELS, 2 * CHANNELS), "weight": (CHANNELS, 4)},
        ["answer", "other"],
    ),
    "a residual sum around the GEMM": (
        "made = LayerNormalization <axis = -1> (x, scale, bias)\n answer = MatMul (made, weight)\n"
        "other = Add (answer, made)",
        {"scale": VECTOR, "bias": VECTOR, "weight": (CHANNELS, CHANNELS)},
        ["other"],
    ),
    "one constant for two norms and both GEMMs": (
        "made = LayerNormalization <axis = -1> (x, scale, scale)\n answer = MatMul (made, weight)\n"
        "made2 = LayerNormalization <axis = -1> (answer, scale)\n answer2 = MatMul (made2, weight)\n"
        "other = Mul (x, scale)",
        {"scale": VECTOR, "weight": (CHANNELS, CHANNELS)},
        ["answer2", "other"],
    ),
    "one weight for a rounded GEMM and a float one": (
        "made = LayerNormalization <axis = -1> (x, scale, bias)\n answer = MatMul (made, weight)\n"
        "other = MatMul (x, weight)",
        {"scale": VECTOR, "bias": VECTOR, "weight": (CHANNELS, 4)},
        ["answer", "other"],
    ),
    "a chain in which one matrix is both multiplied and divided": (
        f"made = LayerNormalization <axis = -1> (x, scale, bias)\n answer_between = MatMul (made, matrix)\n"
        f"gated = medseg.SwiGLU <{PLUGIN}> (answer_between)\n answer = MatMul (gated, weight)",
        {"scale": VECTOR, "bias": VECTOR, "matrix": (CHANNELS, 2 * CHANNELS), "weight": (CHANNELS, 4)},
        ["answer"],
    ),
    "a scale for every token and channel, as many tokens as channels": (
        "square = Slice (x, starts, ends, axes)\n tall = Concat <axis = 1> (x, square)\n"
        "made = LayerNormalization <axis = 1> (tall, scale)\n answer = MatMul (made, weight)",
        {"scale": (CHANNELS, CHANNELS), "weight": (CHANNELS, 4)},
        ["answer"],
    ),
    "a GEMM that transposes its activation": (
        "square = Slice (x, starts, ends, axes)\n tall = Concat <axis = 1> (x, square)\n"
        "matrix = Reshape (tall, two_axes)\n made = LayerNormalization <axis = -1> (matrix, scale)\n"
        "answer = Gemm <transA = 1> (made, weight)\n whole = Unsqueeze (answer, first_axis)",
        {"scale": VECTOR, "weight": (CHANNELS, 4)},
        ["whole"],
    ),
    "a GEMM that reads the sum beside its norm": (
        f"made, total = medseg.AddRMSNorm <epsilon = 0.00001, {PLUGIN}> (x, x, scale)\nanswer = MatMul (total, weight)",
        {"scale": VECTOR, "weight": (CHANNELS, 4)},
        ["answer", "made"],
    ),
}
INTEGERS = {
    "starts": np.array([0]),
    "ends": np.array([2]),
    "axes": np.array([1]),
    "two_axes": np.array([CHANNELS, CHANNELS]),
    "first_axis": np.array([0]),
}


@pytest.mark.parametrize("name", OTHER_GRAPHS)
def test_shared_constants_and_values_do_not_change_for_other_readers(name):
    lines, shapes, outputs = OTHER_GRAPHS[name]
    integers = {key: value for key, value in INTEGERS.items() if key in lines}
    graph = text_graph(lines, random_constants(shapes) | integers, outputs)
    names = [gemm.name for gemm in gemms(graph) if gemm.output.startswith("answer")]
    assert names
    copy, _ = smoothed(graph, names)
    before, after = (outputs_of(variant, {INPUT: IMAGES[:1]}) for variant in (graph, copy))
    assert largest_change(before, after) < SAME
