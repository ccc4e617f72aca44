"""Balance the channels of an activation before quantisation: divide each channel, and multiply its weights.

The division is folded into the constants that produce the activation: the weight of a norm, the rows of a kernel, the
up half of a gate-up matrix. A positive factor commutes with a ReLU between them. The function stays the same and no
node is added. Each activation is evaluated on real values, and changed only where this reduces the rounding error.
Sources: Xiao et al. 2023, "SmoothQuant", eq. 4; Nagel et al. 2019, "Data-free quantization", §4.1, for convolutions.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from jaxtyping import Float32
from numpy import ndarray

from medseg_trt.export.graph.gemms import Gemm, gemms
from medseg_trt.export.graph.onnx_graph import add_constant
from medseg_trt.export.graph.trace import OnnxGraph
from medseg_trt.export.precision.calibrate import NUM_BINS, Histogram, Observe, mean_squared_error
from medseg_trt.export.precision.weight_only import per_channel

CHANNEL_INPUTS: Mapping[str, tuple[int, ...]] = {  # inputs whose first axis is the channels of the output
    "LayerNormalization": (1, 2),
    "GroupNormalization": (1, 2),
    "RMSNormalization": (1,),
    "RMSNorm": (1,),
    "AddRMSNorm": (2,),
    "Conv": (1, 2),
}
CHANNELS_FIRST = ("GroupNormalization", "Conv")
ALPHAS = (0.25, 0.5, 0.75)  # how much of the difficulty moves from the activation to the weight
MAX_ERROR_SHARE = 0.95  # of the squared error before; a smaller reduction is not applied
ROWS_PER_IMAGE = 64  # of an activation, evenly spaced, on which factors are evaluated
MAX_COLUMNS = 1024  # of a weight, evenly spaced


@dataclass(frozen=True, kw_only=True, slots=True)
class Smoothing:
    """How the smoothing of one activation changes the rounding error."""

    value: str  # the activation
    alpha: float | None  # None: not changed
    error_before: float  # squared error of the products due to 8-bit rounding, relative to their squares
    error_after: float


@dataclass(frozen=True, kw_only=True, slots=True)
class _Constant:
    """A part of a constant input whose entries along one axis are the channels of an activation."""

    node: ir.Node
    index: int
    axis: int = 0
    start: int = 0  # of the channels on that axis; they reach to its end


@dataclass(frozen=True, kw_only=True, slots=True)
class _Candidate:
    """An activation whose channels can be scaled by constants."""

    value: str
    readers: tuple[Gemm, ...]
    divided: tuple[_Constant, ...]
    multiplied: tuple[_Constant, ...]


def smooth(
    graph: OnnxGraph,
    names: Collection[str],
    observe: Observe,
    images: Float32[ndarray, "images 3 height width"],
    max_error_share: float = MAX_ERROR_SHARE,
) -> tuple[OnnxGraph, tuple[Smoothing, ...]]:
    """Return a copy of a float graph with a smaller rounding error, and the result for every candidate activation.

    Calibrate the copy: ranges of the original graph do not apply to it.

    Args:
        graph: float.
        names: of the GEMMs to be quantised; an activation that another node reads does not change.
        observe: runs ``observed_graph(graph, smoothable(graph, names))``.
        images: the calibration images.
        max_error_share: largest squared error afterwards, as a share of that before, with which a change is applied.
    """
    copy = OnnxGraph(model=graph.model.clone())
    candidates = tuple(_candidates(copy, names))
    samples = _samples(observe, images, candidates)
    graph_copy = copy.model.graph
    return copy, tuple(
        _smooth(graph_copy, candidate, *samples[candidate.value], max_error_share) for candidate in candidates
    )


def smoothable(graph: OnnxGraph, names: Collection[str]) -> tuple[str, ...]:
    """Return the activations that only the named GEMMs read, and whose channels can be scaled by constants alone."""
    return tuple(candidate.value for candidate in _candidates(graph, names))


def _candidates(graph: OnnxGraph, names: Collection[str]) -> Iterator[_Candidate]:
    readers = dict[str, list[Gemm]]()
    nodes = {node.name: node for node in graph.model.graph}
    for gemm in gemms(graph):
        if gemm.name in names and not nodes[gemm.name].attributes.get_int(
            "transA", 0
        ):  # its channels are the last axis
            readers.setdefault(gemm.activation, []).append(gemm)
    for value in [value for node in graph.model.graph for value in node.outputs]:
        of_value = tuple(readers.get(str(value.name), ()))
        if not of_value or len(value.uses()) != len(of_value) or value.is_graph_output():
            continue
        if divided := _producing_constants(value, of_value[0]):
            multiplied = tuple(_Constant(node=nodes[gemm.name], index=1, axis=gemm.input_axis) for gemm in of_value)
            yield _Candidate(value=str(value.name), readers=of_value, divided=divided, multiplied=multiplied)


def _producing_constants(value: ir.Value, reader: Gemm) -> tuple[_Constant, ...]:
    """Return the constants that scale the channels of a value; empty where there are none."""
    node, channels = value.producer(), reader.weight_shape[reader.input_axis]
    while node is not None and node.op_type == "Relu":
        value = _input(node, 0)
        node = value.producer() if _has_one_reader(value) else None
    if node is None or value is not node.outputs[0] or (node.op_type in CHANNELS_FIRST) != (reader.op_type == "Conv"):
        return ()
    if node.op_type == "SwiGLU":
        return _up_half(_input(node, 0), channels)
    indices = [
        index for index in CHANNEL_INPUTS.get(node.op_type, ()) if index < len(node.inputs) and node.inputs[index]
    ]
    ranks = {index: 4 if node.op_type == "Conv" and index == 1 else 1 for index in indices}
    if all(_is_constant(_input(node, index), channels, rank) for index, rank in ranks.items()):
        return tuple(_Constant(node=node, index=index) for index in indices)
    return ()


def _up_half(gate_up: ir.Value, channels: int) -> tuple[_Constant, ...]:
    """Return the columns of the matrix that produce ``up``, the factor of SwiGLU without a sigmoid."""
    node = gate_up.producer()
    if node is None or node.op_type != "MatMul" or not _has_one_reader(gate_up) or not _input(node, 1).is_initializer():
        return ()
    if _shape(_input(node, 1))[1:] != (2 * channels,):
        return ()
    return (_Constant(node=node, index=1, axis=1, start=channels),)


def _has_one_reader(value: ir.Value) -> bool:
    """Whether exactly one input of one node reads a value that is no output of the graph."""
    return len(value.uses()) == 1 and not value.is_graph_output()


def _is_constant(value: ir.Value, channels: int, rank: int) -> bool:
    """Whether the first axis of a constant of this rank is the channels."""
    return value.is_initializer() and len(_shape(value)) == rank and _shape(value)[0] == channels


def _samples(
    observe: Observe, images: ndarray, candidates: Sequence[_Candidate]
) -> dict[str, tuple[Float32[ndarray, "rows channels"], Float32[ndarray, " channels"]]]:
    """Return rows of every candidate's activation, and the largest magnitude of each channel on all images."""
    rows = {candidate.value: list[ndarray]() for candidate in candidates}
    largest = dict[str, ndarray]()
    for image in images:
        values = observe(image[None])
        for candidate in candidates:
            channels_last = np.moveaxis(values[candidate.value], candidate.readers[0].channel_axis, -1)
            flat = channels_last.reshape(-1, channels_last.shape[-1])
            rows[candidate.value].append(flat[np.linspace(0, len(flat) - 1, ROWS_PER_IMAGE).astype(int)])
            largest[candidate.value] = np.maximum(largest.get(candidate.value, np.float32(0)), np.abs(flat).max(axis=0))
    return {name: (np.concatenate(rows[name]), largest[name]) for name in rows}


def _smooth(
    graph: ir.Graph, candidate: _Candidate, rows: ndarray, largest: ndarray, max_error_share: float
) -> Smoothing:
    readers = candidate.readers
    weights = [
        _some_outputs(_numpy(constant), gemm) for constant, gemm in zip(candidate.multiplied, readers, strict=True)
    ]
    of_weight = np.max(
        [np.abs(_by_channel(weight, gemm)).max(axis=1) for weight, gemm in zip(weights, readers, strict=True)],
        axis=0,
    )
    factors = {alpha: _factors(largest, of_weight, alpha) for alpha in ALPHAS}
    before = _error(rows, weights, readers, np.ones_like(largest))
    errors = {alpha: _error(rows, weights, readers, factors[alpha]) for alpha in ALPHAS}
    alpha = min(errors, key=errors.__getitem__)
    if not errors[alpha] < max_error_share * before:
        return Smoothing(value=candidate.value, alpha=None, error_before=before, error_after=before)
    for constant in candidate.divided:
        _scale(graph, constant, 1 / factors[alpha].astype(np.float64))
    for constant in candidate.multiplied:
        _scale(graph, constant, factors[alpha].astype(np.float64))
    return Smoothing(value=candidate.value, alpha=alpha, error_before=before, error_after=errors[alpha])


def _factors(of_activation: ndarray, of_weight: ndarray, alpha: float) -> Float32[ndarray, " channels"]:
    """Return what to divide each channel by; a channel whose activations or weights are all zero keeps its scale."""
    used = (of_activation > 0) & (of_weight > 0)
    raw = np.where(used, of_activation, 1) ** alpha / np.where(used, of_weight, 1) ** (1 - alpha)
    return np.where(used, raw / np.exp(np.log(raw[used]).mean()) if used.any() else 1, 1).astype(np.float32)


def _error(rows: ndarray, weights: Sequence[ndarray], readers: Sequence[Gemm], factors: ndarray) -> float:
    """Return the squared rounding error of all products, relative to the squares of the products."""
    smooth_rows = rows / factors
    low, high = min(float(smooth_rows.min()), 0.0), max(float(smooth_rows.max()), 0.0)
    histogram = Histogram(counts=np.zeros(NUM_BINS), zeros=0, low=low, high=high).with_values(smooth_rows)
    step = np.float32(mean_squared_error(histogram).bound / 127 or 1.0)
    rounded_rows = np.rint(smooth_rows / step).clip(-127, 127) * step
    error = square = 0.0
    for weight, gemm in zip(weights, readers, strict=True):
        shape = [-1 if axis == gemm.input_axis else 1 for axis in range(weight.ndim)]
        quantised = per_channel(weight * factors.reshape(shape), gemm)
        exact = rows @ _by_channel(weight, gemm)
        error += float(np.square(rounded_rows @ _by_channel(quantised.dequantised(), gemm) - exact).sum())
        square += float(np.square(exact).sum())
    return error / square if square else 0.0


def _some_outputs(weight: ndarray, gemm: Gemm) -> ndarray:
    outputs = weight.shape[gemm.output_axis]
    chosen = np.unique(np.linspace(0, outputs - 1, min(outputs, MAX_COLUMNS)).astype(int))
    return np.take(weight, chosen, axis=gemm.output_axis)


def _by_channel(weight: ndarray, gemm: Gemm) -> Float32[ndarray, "channels outputs"]:
    """Return a weight as a matrix; every tap of a kernel is a separate column."""
    first = np.moveaxis(weight, gemm.input_axis, 0)
    return first.reshape(len(first), -1).astype(np.float32)


def _scale(graph: ir.Graph, constant: _Constant, factors: ndarray) -> None:
    """Replace a constant of the node by a scaled copy, multiplied in float64 and rounded once."""
    old = _input(constant.node, constant.index)
    values = _numpy(constant).astype(np.float64)
    where = tuple(slice(constant.start if axis == constant.axis else 0, None) for axis in range(values.ndim))
    values[where] *= factors.reshape([-1 if axis == constant.axis else 1 for axis in range(values.ndim)])
    new = add_constant(graph, f"{old.name}_smooth", values.astype(np.float32))
    constant.node.replace_input_with(constant.index, new)
    if not old.uses() and old.name is not None:
        del graph.initializers[old.name]


def _numpy(constant: _Constant) -> ndarray:
    value = _input(constant.node, constant.index)
    assert value.const_value is not None  # ``_candidates`` returns constants only
    return value.const_value.numpy()


def _shape(value: ir.Value) -> tuple[int, ...]:
    assert value.shape is not None
    return tuple(value.shape.numpy())


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None  # a required input
    return value
