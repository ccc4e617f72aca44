"""Store weights in eight or four bits; DequantizeLinear nodes of the graph dequantise them.

Eight bits: symmetric, one scale per output channel. Four bits: symmetric, one scale per block of up to 128 weights that
are summed together, chosen for the least squared error. Activations do not change.
Sources: Frantar et al. 2023, GPTQ, for blocks; Nagel et al. 2021, "A white paper on neural network quantization", §3.1,
for the search of the scale.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy import ndarray

from medseg_trt.export.graph.gemms import Gemm, gemms
from medseg_trt.export.graph.onnx_graph import KEPT_METADATA, OnnxGraph, add_constant
from medseg_trt.progress import LOG

INT8_MAX = 127  # -128 is not used, so that negating a weight negates its quantised value
INT4_MIN, INT4_MAX = -8, 7
FP8_MAX = 448  # of e4m3; there are no infinities
MIN_MAGNITUDE = 2.0**-100  # smaller weights count as zeros: their scale would not be a normal float32 number
TYPE_NAMES = {np.dtype(np.int8): "int8", np.dtype(ml_dtypes.int4): "int4", np.dtype(ml_dtypes.float8_e4m3fn): "fp8"}
BLOCK_SIZES = (128, 64, 32)  # the first that divides the number of summed weights is used
SHRINKS = np.linspace(0.7, 1.0, 13, dtype=np.float32)  # of the scale that covers the whole block
CHUNK_COLUMNS = 512  # of a matrix, searched together; limits memory


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantisedWeight:
    """A quantised weight and its scales."""

    values: ndarray  # int8, ml_dtypes.int4 or float8_e4m3fn, in the weight's shape
    scales: ndarray  # float32: (output channels,), or the weight's shape with blocks in place of the input axis
    axis: int  # of DequantizeLinear
    block_size: int = 0  # 0: one scale per index of ``axis``

    def dequantised(self) -> ndarray:
        """Return the output of DequantizeLinear, in float64."""
        scales = self.scales.astype(np.float64)
        if self.block_size:
            return self.values.astype(np.float64) * np.repeat(scales, self.block_size, self.axis)
        shape = [-1 if axis == self.axis else 1 for axis in range(self.values.ndim)]
        return self.values.astype(np.float64) * scales.reshape(shape)


WeightQuantiser = Callable[[ndarray, Gemm], QuantisedWeight]


def to_w8a16(graph: OnnxGraph, names: Collection[str]) -> OnnxGraph:
    """Return a copy in which the weights of the named GEMMs are stored in eight bits."""
    return with_quantised_weights(graph, dict.fromkeys(names, per_channel))


def to_w4a16(graph: OnnxGraph, names: Collection[str]) -> OnnxGraph:
    """Return a copy in which the weights of the named GEMMs are stored in four bits.

    Eight bits are used, and logged, for convolutions and for matrices whose input axis no block size divides.
    """
    chosen = [gemm for gemm in gemms(graph) if gemm.name in names]
    for gemm in chosen:
        if not block_size(gemm):
            LOG.info("%s uses 8 bits instead of 4: no block size fits its shape %s", gemm.name, list(gemm.weight_shape))
    return with_quantised_weights(graph, {gemm.name: per_block if block_size(gemm) else per_channel for gemm in chosen})


def per_channel(weight: ndarray, gemm: Gemm) -> QuantisedWeight:
    """Round a weight to -127 … 127, half to even, with one scale per output channel; a channel of zeros has scale 1."""
    scales = _channel_scales(weight, gemm, INT8_MAX)
    quotients = weight / scales
    np.rint(quotients, out=quotients)
    np.clip(quotients, -INT8_MAX, INT8_MAX, out=quotients)
    return QuantisedWeight(values=quotients.astype(np.int8), scales=scales.reshape(-1), axis=gemm.output_axis)


def per_channel_fp8(weight: ndarray, gemm: Gemm) -> QuantisedWeight:
    """Round a weight to e4m3, with one scale per output channel; a channel of zeros has scale 1."""
    scales = _channel_scales(weight, gemm, FP8_MAX)
    values = (weight / scales).clip(-FP8_MAX, FP8_MAX).astype(ml_dtypes.float8_e4m3fn)
    return QuantisedWeight(values=values, scales=scales.reshape(-1), axis=gemm.output_axis)


def per_block(weight: ndarray, gemm: Gemm) -> QuantisedWeight:
    """Round a matrix to four bits; each block uses the scale of SHRINKS with the least squared error."""
    axis, size = gemm.input_axis, block_size(gemm)
    summed_first = np.moveaxis(weight, axis, 0)  # (inputs, outputs)
    values = np.empty(summed_first.shape, ml_dtypes.int4)
    scales = np.empty((len(summed_first) // size, summed_first.shape[1]), np.float32)
    for start in range(0, summed_first.shape[1], CHUNK_COLUMNS):
        columns = slice(start, start + CHUNK_COLUMNS)
        blocks = summed_first[:, columns].reshape(-1, size, scales[:, columns].shape[1])
        best_scales, rounded = _least_error(blocks)
        scales[:, columns] = best_scales
        values[:, columns] = rounded.reshape(len(summed_first), -1).astype(ml_dtypes.int4)
    return QuantisedWeight(
        values=np.moveaxis(values, 0, axis), scales=np.moveaxis(scales, 0, axis), axis=axis, block_size=size
    )


def block_size(gemm: Gemm) -> int:
    """Return how many summed weights share a scale in four bits; 0 where no block size fits."""
    if gemm.op_type == "Conv":
        return 0
    return next((size for size in BLOCK_SIZES if gemm.weight_shape[gemm.input_axis] % size == 0), 0)


def with_quantised_weights(graph: OnnxGraph, quantisers: Mapping[str, WeightQuantiser]) -> OnnxGraph:
    """Return a copy in which the named GEMMs read their weights through DequantizeLinear.

    GEMMs that share a weight share its quantised values. A float weight without readers is removed.
    """
    model = graph.model.clone()
    nodes = {node.name: node for node in model.graph}
    dequantised: dict[tuple[str, int, WeightQuantiser], ir.Value] = {}
    for gemm in gemms(graph):
        if gemm.name not in quantisers:
            continue
        node, key = nodes[gemm.name], (gemm.weight, gemm.output_axis, quantisers[gemm.name])
        weight = model.graph.initializers.get(gemm.weight)
        if key not in dequantised:
            assert weight is not None  # ``gemms`` returned it, and a reader is left
            assert weight.const_value is not None
            quantised = quantisers[gemm.name](weight.const_value.numpy(), gemm)
            dequantised[key] = _insert_dequantiser(model.graph, node, weight, quantised)
        node.replace_input_with(1, dequantised[key])
        if weight is not None and not weight.uses():
            del model.graph.initializers[gemm.weight]
    return OnnxGraph(model=model)


def _channel_scales(weight: ndarray, gemm: Gemm, max_value: int) -> ndarray:
    """Return the scales that map each output channel to the whole range, in a shape that broadcasts to the weight's."""
    others = tuple(axis for axis in range(weight.ndim) if axis != gemm.output_axis)
    largest = np.maximum(weight.max(axis=others, keepdims=True), -weight.min(axis=others, keepdims=True))
    return np.where(largest > MIN_MAGNITUDE, largest / np.float32(max_value), np.float32(1)).astype(np.float32)


def _insert_dequantiser(graph: ir.Graph, reader: ir.Node, weight: ir.Value, quantised: QuantisedWeight) -> ir.Value:
    """Insert the quantised weight and its DequantizeLinear before ``reader``; return the dequantised weight."""
    type_name = TYPE_NAMES[quantised.values.dtype]
    zero_points = np.zeros(quantised.scales.shape, quantised.values.dtype)
    inputs = [
        add_constant(graph, f"{weight.name}_{type_name}", quantised.values),
        add_constant(graph, f"{weight.name}_{type_name}_scale", quantised.scales),
        add_constant(graph, f"{weight.name}_{type_name}_zero_point", zero_points),
    ]
    attributes = {"axis": quantised.axis} | ({"block_size": quantised.block_size} if quantised.block_size else {})
    output = ir.Value(name=f"{inputs[0].name}_decoded", shape=weight.shape, type=ir.TensorType(ir.DataType.FLOAT))
    name = f"{output.name}_DequantizeLinear"
    metadata = {KEPT_METADATA: reader.metadata_props.get(KEPT_METADATA, "")}
    node = ir.node("DequantizeLinear", inputs, attributes, outputs=[output], name=name, metadata_props=metadata)
    graph.insert_before(reader, node)
    return output


def _least_error(blocks: ndarray) -> tuple[ndarray, ndarray]:
    """Return the best scales (blocks, outputs) and the values (blocks, size, outputs) rounded with them."""
    largest = np.abs(blocks).max(axis=1)
    full = np.where(largest > MIN_MAGNITUDE, largest / np.float32(INT4_MAX), np.float32(1))
    least_error = np.full(full.shape, np.inf, np.float32)
    scales = full.copy()
    for shrink in SHRINKS:
        candidate = full * shrink
        values = np.rint(blocks / candidate[:, None]).clip(INT4_MIN, INT4_MAX)
        error = np.square(values * candidate[:, None] - blocks).sum(axis=1)
        scales = np.where(error < least_error, candidate, scales)
        least_error = np.minimum(least_error, error)
    return scales, np.rint(blocks / scales[:, None]).clip(INT4_MIN, INT4_MAX)
