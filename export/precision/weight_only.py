"""Store weights in eight or four bits and decode them in the graph, by ONNX's own DequantizeLinear alone.

Eight bits: symmetric, one scale per output channel. Four bits: symmetric, one scale per block of up to 128 weights that
are summed together, chosen for the least squared error. Activations stay what they were.
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

INT8_MAX = 127  # -128 stays unused, so that negating a weight negates its code
INT4_MIN, INT4_MAX = -8, 7
FP8_MAX = 448  # of e4m3; there are no infinities
NOTHING = 2.0**-100  # weights below are zeros; their scale would leave the normal float32 numbers
CODE_NAMES = {np.dtype(np.int8): "int8", np.dtype(ml_dtypes.int4): "int4", np.dtype(ml_dtypes.float8_e4m3fn): "fp8"}
BLOCK_SIZES = (128, 64, 32)  # the first that divides the number of summed weights
SHRINKS = np.linspace(0.7, 1.0, 13, dtype=np.float32)  # of the scale that covers the whole block
CHUNK_COLUMNS = 512  # of a matrix that are searched at once, to bound memory


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantisedWeight:
    """A weight as integers and their scales."""

    codes: ndarray  # int8, ml_dtypes.int4 or float8_e4m3fn, in the weight's shape
    scales: ndarray  # float32: (output channels,), or the weight's shape with blocks in place of the input axis
    axis: int  # of DequantizeLinear
    block_size: int = 0  # 0: one scale per index of ``axis``

    def decoded(self) -> ndarray:
        """Return what DequantizeLinear makes of them, in float64."""
        scales = self.scales.astype(np.float64)
        if self.block_size:
            return self.codes.astype(np.float64) * np.repeat(scales, self.block_size, self.axis)
        shape = [-1 if axis == self.axis else 1 for axis in range(self.codes.ndim)]
        return self.codes.astype(np.float64) * scales.reshape(shape)


WeightQuantiser = Callable[[ndarray, Gemm], QuantisedWeight]


def to_w8a16(graph: OnnxGraph, names: Collection[str]) -> OnnxGraph:
    """Return a copy in which the named GEMMs hold their weights in eight bits."""
    return with_quantised_weights(graph, dict.fromkeys(names, per_channel))


def to_w4a16(graph: OnnxGraph, names: Collection[str]) -> OnnxGraph:
    """Return a copy in which the named GEMMs hold their weights in four bits.

    Kernels of convolutions, and matrices whose sums no block size divides, take eight; a line in the log says so.
    """
    chosen = [gemm for gemm in gemms(graph) if gemm.name in names]
    for gemm in chosen:
        if not block_size(gemm):
            LOG.info("%s takes 8 bits instead of 4: its %s has no blocks", gemm.name, list(gemm.weight_shape))
    return with_quantised_weights(graph, {gemm.name: per_block if block_size(gemm) else per_channel for gemm in chosen})


def per_channel(weight: ndarray, gemm: Gemm) -> QuantisedWeight:
    """Round a weight to -127 … 127, half to even, with one scale per output channel; a channel of zeros has scale 1."""
    scales = _channel_scales(weight, gemm, INT8_MAX)
    quotients = weight / scales
    np.rint(quotients, out=quotients)
    np.clip(quotients, -INT8_MAX, INT8_MAX, out=quotients)
    return QuantisedWeight(codes=quotients.astype(np.int8), scales=scales.reshape(-1), axis=gemm.output_axis)


def per_channel_fp8(weight: ndarray, gemm: Gemm) -> QuantisedWeight:
    """Round a weight to e4m3, with one scale per output channel; a channel of zeros has scale 1."""
    scales = _channel_scales(weight, gemm, FP8_MAX)
    codes = (weight / scales).clip(-FP8_MAX, FP8_MAX).astype(ml_dtypes.float8_e4m3fn)
    return QuantisedWeight(codes=codes, scales=scales.reshape(-1), axis=gemm.output_axis)


def per_block(weight: ndarray, gemm: Gemm) -> QuantisedWeight:
    """Round a matrix to four bits; every block takes the scale, of those in SHRINKS, with the least squared error."""
    axis, size = gemm.input_axis, block_size(gemm)
    summed_first = np.moveaxis(weight, axis, 0)  # (inputs, outputs)
    codes = np.empty(summed_first.shape, ml_dtypes.int4)
    scales = np.empty((len(summed_first) // size, summed_first.shape[1]), np.float32)
    for start in range(0, summed_first.shape[1], CHUNK_COLUMNS):
        part = slice(start, start + CHUNK_COLUMNS)
        blocks = summed_first[:, part].reshape(-1, size, scales[:, part].shape[1])
        chosen, rounded = _least_error(blocks)
        scales[:, part] = chosen
        codes[:, part] = rounded.reshape(len(summed_first), -1).astype(ml_dtypes.int4)
    return QuantisedWeight(
        codes=np.moveaxis(codes, 0, axis), scales=np.moveaxis(scales, 0, axis), axis=axis, block_size=size
    )


def block_size(gemm: Gemm) -> int:
    """Return how many summed weights share a scale in four bits, or 0 where there are no such blocks."""
    if gemm.op_type == "Conv":
        return 0
    return next((size for size in BLOCK_SIZES if gemm.weight_shape[gemm.input_axis] % size == 0), 0)


def with_quantised_weights(graph: OnnxGraph, coders: Mapping[str, WeightQuantiser]) -> OnnxGraph:
    """Return a copy in which the named GEMMs read their weights through DequantizeLinear.

    GEMMs that share a weight share its codes; a float weight that nothing reads any more is dropped.
    """
    model = graph.model.clone()
    nodes = {node.name: node for node in model.graph}
    decoded: dict[tuple[str, int, WeightQuantiser], ir.Value] = {}
    for gemm in gemms(graph):
        if gemm.name not in coders:
            continue
        node, key = nodes[gemm.name], (gemm.weight, gemm.output_axis, coders[gemm.name])
        weight = model.graph.initializers.get(gemm.weight)
        if key not in decoded:
            assert weight is not None  # ``gemms`` found it, and the last reader has not come yet
            assert weight.const_value is not None
            codes = coders[gemm.name](weight.const_value.numpy(), gemm)
            decoded[key] = _decode(model.graph, node, weight, codes)
        node.replace_input_with(1, decoded[key])
        if weight is not None and not weight.uses():
            del model.graph.initializers[gemm.weight]
    return OnnxGraph(model=model)


def _channel_scales(weight: ndarray, gemm: Gemm, largest_code: int) -> ndarray:
    """Return the scales that let each output channel use all codes, in a shape that broadcasts to the weight's."""
    others = tuple(axis for axis in range(weight.ndim) if axis != gemm.output_axis)
    largest = np.maximum(weight.max(axis=others, keepdims=True), -weight.min(axis=others, keepdims=True))
    return np.where(largest > NOTHING, largest / np.float32(largest_code), np.float32(1)).astype(np.float32)


def _decode(graph: ir.Graph, reader: ir.Node, weight: ir.Value, codes: QuantisedWeight) -> ir.Value:
    """Put the codes and their DequantizeLinear before ``reader`` and return the decoded weight."""
    bits = CODE_NAMES[codes.codes.dtype]
    inputs = [
        add_constant(graph, f"{weight.name}_{bits}", codes.codes),
        add_constant(graph, f"{weight.name}_{bits}_scale", codes.scales),
        add_constant(graph, f"{weight.name}_{bits}_zero_point", np.zeros(codes.scales.shape, codes.codes.dtype)),
    ]
    attributes = {"axis": codes.axis} | ({"block_size": codes.block_size} if codes.block_size else {})
    output = ir.Value(name=f"{inputs[0].name}_decoded", shape=weight.shape, type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node(
        "DequantizeLinear", inputs, attributes, outputs=[output], name=f"{output.name}_DequantizeLinear",
        metadata_props={KEPT_METADATA: reader.metadata_props.get(KEPT_METADATA, "")},
    )  # fmt: skip
    graph.insert_before(reader, node)
    return output


def _least_error(blocks: ndarray) -> tuple[ndarray, ndarray]:
    """Return the scales (blocks, outputs) and the codes (blocks, size, outputs) of the best shrink of each."""
    largest = np.abs(blocks).max(axis=1)
    full = np.where(largest > NOTHING, largest / np.float32(INT4_MAX), np.float32(1))
    best = np.full(full.shape, np.inf, np.float32)
    scales = full.copy()
    for shrink in SHRINKS:
        tried = full * shrink
        codes = np.rint(blocks / tried[:, None]).clip(INT4_MIN, INT4_MAX)
        error = np.square(codes * tried[:, None] - blocks).sum(axis=1)
        scales = np.where(error < best, tried, scales)
        best = np.minimum(best, error)
    return scales, np.rint(blocks / scales[:, None]).clip(INT4_MIN, INT4_MAX)
