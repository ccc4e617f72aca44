"""Choose the precision of every GEMM, and put the graph into it.

INT8 is written as QuantizeLinear and DequantizeLinear round float operators, which a back-end replaces by its integer
kernels. Activations are rounded per tensor, weights symmetrically per output channel; biases, norms, attention and sums
stay in float. So do a few delicate layers, see ``delicate``; the accuracy gate may ask for more.
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
    """A precision: the function that puts GEMMs into it, ``function(graph, names, **options)``, returns a copy."""

    function: str  # "module:name", imported when it is used
    options: Mapping[str, Any] = field(default_factory=dict)
    parts: tuple[str, ...] = PART_NAMES  # that it means where no part is named
    only: tuple[str, ...] = PART_NAMES  # parts that it can be asked for
    needs_calibration: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantFormat:
    """How codes are written for a kind of back-end. The weights of INT8 are the same bytes in all of them."""

    codes: type[Any]  # of activations: symmetric np.int8 or ml_dtypes.float8_e4m3fn, or asymmetric np.uint8
    coder: WeightQuantiser = per_channel  # of weights
    rounds_outputs: bool = False  # of convolutions too, after a ReLU that follows


TRANSFORMERS = ("vit", "block")  # a chain of convolutions in fp8 loses most of its digits
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
# QuantisedWeight for GEMMs, and fp16 for what they leave in float.
QUANTISED_AND_HALF = ("int8+fp16", "fp8+fp16", "w8a16+fp16", "w4a16+fp16")
QUANT_FORMATS: Mapping[str, QuantFormat] = {
    "int8": QuantFormat(codes=np.int8),  # TensorRT takes no other
    "uint8": QuantFormat(codes=np.uint8),  # OpenVINO: 2026.4 computes symmetric codes of concatenated maps wrongly
    "uint8_outputs": QuantFormat(
        codes=np.uint8, rounds_outputs=True
    ),  # ONNX Runtime: no integer convolution without it
}
FP8_FORMAT = QuantFormat(codes=ml_dtypes.float8_e4m3fn, coder=per_channel_fp8)
STORED_AS: Mapping[ir.DataType, str] = {  # the type of a stored weight; int8 where activations are codes too
    ir.DataType.FLOAT: "fp32",
    ir.DataType.INT8: "w8a16",
    ir.DataType.FLOAT8E4M3FN: "fp8",
    ir.DataType.INT4: "w4a16",
    ir.DataType.FLOAT16: "fp16",
    ir.DataType.BFLOAT16: "bf16",
}


def parse_precision(text: str) -> dict[str, str]:
    """Return the scheme of every part of the network for ``int8`` or for a mix such as ``vit=int8,block=w8a16``.

    A part that a mix leaves out is in fp32. Without a part, the weight-only schemes mean the language block alone; what
    stands behind a ``+`` is the scheme of everything else.

    Raises:
        UsageError: an unknown part or scheme, or a part named twice.
    """
    known = (*SCHEMES, *QUANTISED_AND_HALF)
    if "=" not in text:
        first, *others = steps(_known(text, known, "precision"))
        scheme, other = SCHEMES[first], others[0] if others else "fp32"
        return {part: text if scheme is not None and part in scheme.parts else other for part in PART_NAMES}
    chosen = dict[str, str]()
    for item in text.split(","):
        part, _, name = (word.strip() for word in item.partition("="))
        if _known(part, PART_NAMES, "part of the network") in chosen:
            raise UsageError(f"{text!r} names {part} twice")
        chosen[part] = _known(name, known, "precision")
        scheme = SCHEMES[steps(name)[0]]
        if scheme is not None and part not in scheme.only:
            raise UsageError(f"{name} is for the {' and the '.join(scheme.only)}; choose another precision for {part}")
    return dict.fromkeys(PART_NAMES, "fp32") | chosen


def steps(scheme: str) -> list[str]:
    """Return the keys of ``SCHEMES`` that a scheme of a part is made of."""
    return scheme.split("+")


def needs_calibration(precision: Mapping[str, str]) -> bool:
    """Return whether a part is in a scheme that needs the ranges of activations."""
    schemes = (SCHEMES[name] for scheme in precision.values() for name in steps(scheme))
    return any(scheme is not None and scheme.needs_calibration for scheme in schemes)


def values_to_calibrate(graph: OnnxGraph, precision: Mapping[str, str]) -> tuple[str, ...]:
    """Return the names of all values whose range some form of the precision needs."""
    nodes = {node.name: node for node in graph.model.graph}
    chosen = [gemm for gemm in gemms(graph) if needs_calibration({gemm.part: precision[gemm.part]})]
    outputs = [_rounded_output(nodes[gemm.name]) for gemm in chosen if gemm.op_type == "Conv"]
    names = [gemm.activation for gemm in chosen]
    return tuple(dict.fromkeys([*names, *(str(value.name) for value in outputs if not value.is_graph_output())]))


def quantise(
    graph: OnnxGraph,
    precision: Mapping[str, str],
    calibration: Calibration | None = None,
    *,
    form: str = "int8",
    keep_float: Collection[str] = (),
    keep_wide: Collection[str] = (),
) -> OnnxGraph:
    """Return a copy of a float graph in a precision.

    Args:
        graph: traced, folded and fused.
        precision: the scheme of every part, as ``parse_precision`` returns it.
        calibration: of this graph, with the ranges of ``values_to_calibrate``.
        form: a key of ``QUANT_FORMATS``.
        keep_float: names of GEMMs that are not coded, or that stay as they are where no codes are asked for.
        keep_wide: names of GEMMs that do not get 16-bit floats.

    Raises:
        UsageError: no calibration, one of another graph, or nothing in the network that the precision would change.
    """
    if needs_calibration(precision) and calibration is None:
        raise UsageError("int8 needs images to calibrate on; give some: --data DIR")
    quantised = graph
    for name, scheme in SCHEMES.items():
        asked = {gemm.name: steps(precision[gemm.part]) for gemm in gemms(graph)}
        kept = {gemm for gemm in keep_float if asked[gemm][0] == name} | set(keep_wide if name in TYPES else ())
        chosen = {gemm for gemm, names in asked.items() if name in names} - kept
        if scheme is None or not chosen:
            continue
        module, _, function = scheme.function.partition(":")
        options = {"calibration": calibration, "form": form} if scheme.needs_calibration else scheme.options
        quantised = getattr(importlib.import_module(module), function)(quantised, chosen, **options)
    if quantised is graph and set(precision.values()) != {"fp32"} and not keep_float and not keep_wide:
        parts = ", ".join(part for part, name in precision.items() if name != "fp32")
        raise UsageError(f"the network has no GEMM in: {parts}; choose another --precision")
    return quantised


def to_int8(graph: OnnxGraph, names: Collection[str], calibration: Calibration, form: str = "int8") -> OnnxGraph:
    """Return a copy in which the named GEMMs multiply eight-bit codes; a value that several read is rounded once.

    Raises:
        UsageError: the calibration is of another graph.
    """
    return _to_codes(graph, names, calibration, QUANT_FORMATS[form])


def to_fp8(graph: OnnxGraph, names: Collection[str], calibration: Calibration, form: str = "int8") -> OnnxGraph:
    """Return a copy in which the named GEMMs multiply floats of eight bits, e4m3, scaled like codes.

    There is one form, which TensorRT reads, whatever ``form`` says.
    Source: Micikevicius et al. 2022, "FP8 formats for deep learning".

    Raises:
        UsageError: the calibration is of another graph.
    """
    return _to_codes(graph, names, calibration, FP8_FORMAT)


def _to_codes(graph: OnnxGraph, names: Collection[str], calibration: Calibration, form: QuantFormat) -> OnnxGraph:
    chosen = [gemm for gemm in gemms(graph) if gemm.name in names]
    coded = with_quantised_weights(graph, dict.fromkeys(names, form.coder))
    nodes = {node.name: node for node in coded.model.graph}
    rounding = _Rounding(graph=coded.model.graph, calibration=calibration, codes=form.codes, done={})
    for gemm in chosen:
        nodes[gemm.name].replace_input_with(0, rounding.rounded(_input(nodes[gemm.name])))
    for gemm in chosen if form.rounds_outputs else ():
        output = _rounded_output(nodes[gemm.name])
        if gemm.op_type == "Conv" and not output.is_graph_output():
            rounding.for_all_readers(output)
    return coded


def gemm_precisions(graph: OnnxGraph) -> dict[str, str]:
    """Return the scheme that every GEMM of a graph is in, by its name, as its inputs say."""
    nodes = {node.name: node for node in graph.model.graph}
    return {gemm.name: _found(nodes[gemm.name]) for gemm in gemms(graph)}


def int8_share(graph: OnnxGraph) -> float:
    """Return the share, 0 … 1, of all multiply-accumulates that INT8 GEMMs do."""
    found = gemm_precisions(graph)
    return sum(gemm.macs for gemm in gemms(graph) if found[gemm.name] == "int8") / total_macs(graph)


def quantisation_parameters(limits: Range, codes: type[Any]) -> tuple[np.float32, np.ndarray]:
    """Return the scale of a range, and the code of zero in the type of the codes."""
    if codes is ml_dtypes.float8_e4m3fn:
        return np.float32(limits.bound / FP8_MAX or 1.0), np.array(0, codes)
    if codes is np.int8:
        return np.float32(limits.bound / 127 or 1.0), np.array(0, np.int8)
    scale = np.float32((limits.high - limits.low) / 255 or 1.0)
    return scale, np.array(np.rint(-limits.low / scale).clip(0, 255), np.uint8)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rounding:
    """Puts QuantizeLinear and DequantizeLinear behind values of one graph, once behind each."""

    graph: ir.Graph
    calibration: Calibration
    codes: type[Any]  # of ``QuantFormat``
    done: dict[str, ir.Value]

    def rounded(self, value: ir.Value) -> ir.Value:
        """Return the value as its codes decode."""
        name = str(value.name)
        if name not in self.done:
            if name not in self.calibration.ranges:
                raise UsageError(f"the calibration has no range for {name!r}; calibrate the graph that you quantise")
            self.done[name] = self._insert(value, self.calibration.ranges[name])
        return self.done[name]

    def for_all_readers(self, value: ir.Value) -> None:
        """Let every node that reads the value read it rounded."""
        readers = [use for use in value.uses() if use.node.op_type != "QuantizeLinear"]
        rounded = self.rounded(value)
        for node, index in readers:
            node.replace_input_with(index, rounded)

    def _insert(self, value: ir.Value, limits: Range) -> ir.Value:
        scale, zero = quantisation_parameters(limits, self.codes)
        parameters = [
            add_constant(self.graph, f"{value.name}_scale", np.asarray(scale)),
            add_constant(self.graph, f"{value.name}_zero_point", zero),
        ]
        like = value.producer() or next(iter(value.uses())).node
        metadata = {KEPT_METADATA: like.metadata_props.get(KEPT_METADATA, "")}
        codes = ir.Value(name=f"{value.name}_codes", shape=value.shape, type=ir.TensorType(ir.tensor(zero).dtype))
        decoded = ir.Value(name=f"{value.name}_rounded", shape=value.shape, type=value.type)
        pair = [
            ir.node(operator, [source, *parameters], outputs=[output], name=f"{value.name}_{operator}",
                    metadata_props=dict(metadata))
            for operator, source, output in (("QuantizeLinear", value, codes), ("DequantizeLinear", codes, decoded))
        ]  # fmt: skip
        producer = value.producer()
        if producer is None:
            self.graph.insert_before(self.graph[0], pair)
        else:
            self.graph.insert_after(producer, pair)
        return decoded


def _rounded_output(node: ir.Node) -> ir.Value:
    """Return what is rounded behind a convolution: its output, or that of the ReLU which alone reads it."""
    output = node.outputs[0]
    readers = [use.node for use in output.uses()]
    if len(readers) == 1 and readers[0].op_type == "Relu" and not output.is_graph_output():
        return readers[0].outputs[0]
    return output


def _found(node: ir.Node) -> str:
    weight = stored_weight(node.inputs[1])
    assert weight is not None  # of a GEMM
    assert weight.dtype is not None
    producer = _input(node).producer()
    is_coded = producer is not None and producer.op_type == "DequantizeLinear"
    return "int8" if is_coded and weight.dtype == ir.DataType.INT8 else STORED_AS.get(weight.dtype, weight.dtype.name)


def _input(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None  # of a GEMM
    return value


def _known(name: str, choices: Iterable[str], what: str) -> str:
    if name not in choices:
        raise UsageError(f"no {what} is called {name!r}; choose one of: {', '.join(choices)}")
    return name
