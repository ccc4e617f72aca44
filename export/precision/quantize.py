"""Choose the precision of every GEMM, and convert the graph to it.

INT8 is written as QuantizeLinear and DequantizeLinear around float operators; a back-end replaces them by its integer
kernels. Activations are quantised per tensor, weights symmetrically per output channel. Biases, norms, attention and
sums stay in float. So do a few layers, see ``sensitive_layers``; the accuracy gate may return more layers to float.
Sources: Jacob et al. 2018; Wu et al. 2020, "Integer quantization for deep learning inference".
"""

import importlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from medseg_trt.errors import UsageError
from medseg_trt.export.graph.gemms import PART_NAMES, gemms, stored_weight, total_macs
from medseg_trt.export.graph.onnx_graph import KEPT_METADATA, OnnxGraph, add_constant
from medseg_trt.export.precision.calibrate import Calibration, Range
from medseg_trt.export.precision.half import TYPES
from medseg_trt.export.precision.weight_only import (
    FP8_MAX,
    WeightQuantiser,
    per_channel,
    per_channel_fp8,
    with_quantised_weights,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheme:
    """A precision: ``function(graph, names, **options)`` returns a copy with the named GEMMs in it."""

    function: str  # "module:name", imported when it is used
    options: Mapping[str, Any] = field(default_factory=dict)
    parts: tuple[str, ...] = PART_NAMES  # to which it applies where no part is named
    only: tuple[str, ...] = PART_NAMES  # parts that support it
    needs_calibration: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantFormat:
    """How quantised values are written for a back-end. INT8 weights are the same bytes in all formats."""

    activation_type: type[Any]  # symmetric np.int8 or ml_dtypes.float8_e4m3fn, or asymmetric np.uint8
    weight_quantiser: WeightQuantiser = per_channel
    quantises_conv_outputs: bool = False  # after the ReLU, where one follows


TRANSFORMERS = ("vit", "block")  # a chain of convolutions in fp8 loses most of its significant digits
SCHEMES: Mapping[str, Scheme | None] = {  # in the order in which a mix is applied; None: as traced
    "fp32": None,
    "int8": Scheme(function="medseg_trt.export.precision.quantize:to_int8", needs_calibration=True),
    "fp8": Scheme(
        function="medseg_trt.export.precision.quantize:to_fp8",
        parts=TRANSFORMERS,
        only=TRANSFORMERS,
        needs_calibration=True,
    ),
    "w8a16": Scheme(function="medseg_trt.export.precision.weight_only:to_w8a16", parts=("block",)),
    "w4a16": Scheme(function="medseg_trt.export.precision.weight_only:to_w4a16", parts=("block",)),
    "fp16": Scheme(function="medseg_trt.export.precision.half:to_half", options={"dtype": "fp16"}),
    "bf16": Scheme(function="medseg_trt.export.precision.half:to_half", options={"dtype": "bf16"}),
}
# Quantised weights for GEMMs, and fp16 for what they leave in float.
QUANTISED_AND_HALF = ("int8+fp16", "fp8+fp16", "w8a16+fp16", "w4a16+fp16")
QUANT_FORMATS: Mapping[str, QuantFormat] = {
    "int8": QuantFormat(activation_type=np.int8),  # the only one that TensorRT reads
    "uint8": QuantFormat(activation_type=np.uint8),  # OpenVINO 2026.4 computes symmetric concatenated maps wrongly
    "uint8_outputs": QuantFormat(  # ONNX Runtime has integer convolutions only where outputs are quantised
        activation_type=np.uint8, quantises_conv_outputs=True
    ),
}
FP8_FORMAT = QuantFormat(activation_type=ml_dtypes.float8_e4m3fn, weight_quantiser=per_channel_fp8)
STORED_AS: Mapping[ir.DataType, str] = {  # the type of a stored weight; int8 where activations are quantised too
    ir.DataType.FLOAT: "fp32",
    ir.DataType.INT8: "w8a16",
    ir.DataType.FLOAT8E4M3FN: "fp8",
    ir.DataType.INT4: "w4a16",
    ir.DataType.FLOAT16: "fp16",
    ir.DataType.BFLOAT16: "bf16",
}


def parse_precision(text: str) -> dict[str, str]:
    """Return the scheme of every part of the network for ``int8`` or for a mix such as ``vit=int8,block=w8a16``.

    A part that a mix does not name is in fp32. Without a part, the weight-only schemes apply to the language block
    alone. The scheme after a ``+`` applies to everything else.

    Raises:
        UsageError: an unknown part or scheme, or a part named twice.
    """
    known = (*SCHEMES, *QUANTISED_AND_HALF)
    if "=" not in text:
        first, *others = scheme_components(_known(text, known, "precision"))
        scheme, other = SCHEMES[first], others[0] if others else "fp32"
        return {part: text if scheme is not None and part in scheme.parts else other for part in PART_NAMES}
    chosen = dict[str, str]()
    for item in text.split(","):
        part, _, name = (word.strip() for word in item.partition("="))
        if _known(part, PART_NAMES, "part of the network") in chosen:
            raise UsageError(f"{text!r} names {part} twice")
        chosen[part] = _known(name, known, "precision")
        scheme = SCHEMES[scheme_components(name)[0]]
        if scheme is not None and part not in scheme.only:
            raise UsageError(f"{name} is for the {' and the '.join(scheme.only)}; choose another precision for {part}")
    return dict.fromkeys(PART_NAMES, "fp32") | chosen


def scheme_components(scheme: str) -> list[str]:
    """Return the keys of ``SCHEMES`` that a scheme such as ``int8+fp16`` consists of."""
    return scheme.split("+")


def needs_calibration(precision: Mapping[str, str]) -> bool:
    """Return whether the scheme of a part needs the ranges of activations."""
    schemes = (SCHEMES[name] for scheme in precision.values() for name in scheme_components(scheme))
    return any(scheme is not None and scheme.needs_calibration for scheme in schemes)


def values_to_calibrate(graph: OnnxGraph, precision: Mapping[str, str]) -> tuple[str, ...]:
    """Return the names of all values whose range some format of the precision needs."""
    nodes = {node.name: node for node in graph.model.graph}
    chosen = [gemm for gemm in gemms(graph) if needs_calibration({gemm.part: precision[gemm.part]})]
    outputs = [_quantised_output(nodes[gemm.name]) for gemm in chosen if gemm.op_type == "Conv"]
    names = [gemm.activation for gemm in chosen]
    return tuple(dict.fromkeys([*names, *(str(value.name) for value in outputs if not value.is_graph_output())]))


def quantise(
    graph: OnnxGraph,
    precision: Mapping[str, str],
    calibration: Calibration | None = None,
    *,
    quant_format: str = "int8",
    keep_float: Collection[str] = (),
    keep_wide: Collection[str] = (),
) -> OnnxGraph:
    """Return a copy of a float graph in a precision.

    Args:
        graph: traced, folded and fused.
        precision: the scheme of every part, as ``parse_precision`` returns it.
        calibration: of this graph, with the ranges of ``values_to_calibrate``.
        quant_format: a key of ``QUANT_FORMATS``.
        keep_float: names of GEMMs that the first component of their part's scheme does not change.
        keep_wide: names of GEMMs that are not converted to 16-bit floats.

    Raises:
        UsageError: the calibration is missing or of another graph, or the precision changes no GEMM of the network.
    """
    if needs_calibration(precision) and calibration is None:
        raise UsageError("int8 needs images to calibrate on; give some: --data DIR")
    quantised = graph
    for name, scheme in SCHEMES.items():
        components = {gemm.name: scheme_components(precision[gemm.part]) for gemm in gemms(graph)}
        kept = {gemm for gemm in keep_float if components[gemm][0] == name} | set(keep_wide if name in TYPES else ())
        chosen = {gemm for gemm, names in components.items() if name in names} - kept
        if scheme is None or not chosen:
            continue
        module, _, function = scheme.function.partition(":")
        options = (
            {"calibration": calibration, "quant_format": quant_format} if scheme.needs_calibration else scheme.options
        )
        quantised = getattr(importlib.import_module(module), function)(quantised, chosen, **options)
    if quantised is graph and set(precision.values()) != {"fp32"} and not keep_float and not keep_wide:
        parts = ", ".join(part for part, name in precision.items() if name != "fp32")
        raise UsageError(f"the network has no GEMM in: {parts}; choose another --precision")
    return quantised


def to_int8(
    graph: OnnxGraph, names: Collection[str], calibration: Calibration, quant_format: str = "int8"
) -> OnnxGraph:
    """Return a copy in which the named GEMMs multiply eight-bit integers; a value has one Q/DQ pair at most.

    Raises:
        UsageError: the calibration is of another graph.
    """
    return _with_qdq_nodes(graph, names, calibration, QUANT_FORMATS[quant_format])


def to_fp8(graph: OnnxGraph, names: Collection[str], calibration: Calibration, quant_format: str = "int8") -> OnnxGraph:
    """Return a copy in which the named GEMMs multiply scaled floats of eight bits, e4m3.

    ``quant_format`` is ignored: fp8 has one format, which TensorRT reads.
    Source: Micikevicius et al. 2022, "FP8 formats for deep learning".

    Raises:
        UsageError: the calibration is of another graph.
    """
    return _with_qdq_nodes(graph, names, calibration, FP8_FORMAT)


def _with_qdq_nodes(
    graph: OnnxGraph, names: Collection[str], calibration: Calibration, quant_format: QuantFormat
) -> OnnxGraph:
    chosen = [gemm for gemm in gemms(graph) if gemm.name in names]
    quantised = with_quantised_weights(graph, dict.fromkeys(names, quant_format.weight_quantiser))
    nodes = {node.name: node for node in quantised.model.graph}
    inserter = _QdqInserter(
        graph=quantised.model.graph,
        calibration=calibration,
        activation_type=quant_format.activation_type,
        dequantised={},
    )
    for gemm in chosen:
        nodes[gemm.name].replace_input_with(0, inserter.dequantised_value(_activation(nodes[gemm.name])))
    for gemm in chosen if quant_format.quantises_conv_outputs else ():
        output = _quantised_output(nodes[gemm.name])
        if gemm.op_type == "Conv" and not output.is_graph_output():
            inserter.redirect_readers(output)
    return quantised


def gemm_precisions(graph: OnnxGraph) -> dict[str, str]:
    """Return the scheme of every GEMM of a graph, by its name, as its inputs show it."""
    nodes = {node.name: node for node in graph.model.graph}
    return {gemm.name: _precision_of(nodes[gemm.name]) for gemm in gemms(graph)}


def int8_share(graph: OnnxGraph) -> float:
    """Return the share of INT8 GEMMs in all multiply-accumulates, 0 … 1."""
    precisions = gemm_precisions(graph)
    return sum(gemm.macs for gemm in gemms(graph) if precisions[gemm.name] == "int8") / total_macs(graph)


def quantisation_parameters(limits: Range, activation_type: type[Any]) -> tuple[np.float32, np.ndarray]:
    """Return the scale of a range, and its zero point as an array of no axes.

    Args:
        limits: the range to cover.
        activation_type: ``QuantFormat.activation_type``.
    """
    if activation_type is ml_dtypes.float8_e4m3fn:
        return np.float32(limits.bound / FP8_MAX or 1.0), np.array(0, activation_type)
    if activation_type is np.int8:
        return np.float32(limits.bound / 127 or 1.0), np.array(0, np.int8)
    scale = np.float32((limits.high - limits.low) / 255 or 1.0)
    return scale, np.array(np.rint(-limits.low / scale).clip(0, 255), np.uint8)


@dataclass(frozen=True, kw_only=True, slots=True)
class _QdqInserter:
    """Inserts QuantizeLinear and DequantizeLinear after values of one graph, once after each."""

    graph: ir.Graph
    calibration: Calibration
    activation_type: type[Any]  # of ``QuantFormat``
    dequantised: dict[str, ir.Value]  # by the name of the original value

    def dequantised_value(self, value: ir.Value) -> ir.Value:
        """Return the output of the Q/DQ pair after a value."""
        name = str(value.name)
        if name not in self.dequantised:
            if name not in self.calibration.ranges:
                raise UsageError(f"the calibration has no range for {name!r}; calibrate the graph that you quantise")
            self.dequantised[name] = self._insert(value, self.calibration.ranges[name])
        return self.dequantised[name]

    def redirect_readers(self, value: ir.Value) -> None:
        """Let all readers of a value read the output of its Q/DQ pair."""
        readers = [use for use in value.uses() if use.node.op_type != "QuantizeLinear"]
        dequantised = self.dequantised_value(value)
        for node, index in readers:
            node.replace_input_with(index, dequantised)

    def _insert(self, value: ir.Value, limits: Range) -> ir.Value:
        scale, zero_point = quantisation_parameters(limits, self.activation_type)
        parameters = [
            add_constant(self.graph, f"{value.name}_scale", np.asarray(scale)),
            add_constant(self.graph, f"{value.name}_zero_point", zero_point),
        ]
        like = value.producer() or next(iter(value.uses())).node
        metadata = {KEPT_METADATA: like.metadata_props.get(KEPT_METADATA, "")}
        integer_type = ir.TensorType(ir.tensor(zero_point).dtype)
        quantised = ir.Value(name=f"{value.name}_codes", shape=value.shape, type=integer_type)
        dequantised = ir.Value(name=f"{value.name}_rounded", shape=value.shape, type=value.type)
        steps = (("QuantizeLinear", value, quantised), ("DequantizeLinear", quantised, dequantised))
        pair = [
            ir.node(
                operator,
                [source, *parameters],
                outputs=[output],
                name=f"{value.name}_{operator}",
                metadata_props=dict(metadata),
            )
            for operator, source, output in steps
        ]
        producer = value.producer()
        if producer is None:
            self.graph.insert_before(self.graph[0], pair)
        else:
            self.graph.insert_after(producer, pair)
        return dequantised


def _quantised_output(node: ir.Node) -> ir.Value:
    """Return the value to quantise after a convolution: its output, or that of the ReLU that is its only reader."""
    output = node.outputs[0]
    readers = [use.node for use in output.uses()]
    if len(readers) == 1 and readers[0].op_type == "Relu" and not output.is_graph_output():
        return readers[0].outputs[0]
    return output


def _precision_of(node: ir.Node) -> str:
    weight = stored_weight(node.inputs[1])
    assert weight is not None  # of a GEMM
    assert weight.dtype is not None
    producer = _activation(node).producer()
    has_quantised_input = producer is not None and producer.op_type == "DequantizeLinear"
    if has_quantised_input and weight.dtype == ir.DataType.INT8:
        return "int8"
    return STORED_AS.get(weight.dtype, weight.dtype.name)


def _activation(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None  # of a GEMM
    return value


def _known(name: str, choices: Iterable[str], kind: str) -> str:
    if name not in choices:
        raise UsageError(f"no {kind} is called {name!r}; choose one of: {', '.join(choices)}")
    return name
