"""Check a builder's list of layers against expectations, such as: the q/k/v product of an attention is one kernel.

An expectation is checked for every node or layer of a kind; the failures are listed. A failed expectation is no error;
it shows where time is lost.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import onnx_ir as ir

from medseg_trt.export.engine_layers import CUSTOM, EngineLayer, LayerReport, Outcome
from medseg_trt.export.graph.gemms import PART_NAMES, Gemm, gemms, macs_of
from medseg_trt.export.graph.onnx_graph import KEPT_METADATA, OnnxGraph
from medseg_trt.export.graph.parts import part_of
from medseg_trt.export.precision.quantize import gemm_precisions
from medseg_trt.export.tensorrt.builder_log import parse_layers

STORED = ("int8", "fp8", "w8a16", "w4a16")  # precisions with quantised weights
MOVERS = frozenset(
    {"Cast", "Transpose", "Reshape", "Split", "Concat", "Slice", "Resize", "Pad", "Expand", "Squeeze", "Unsqueeze"}
    | {"Attention", "QuantizeLinear", "DequantizeLinear"}
)


@dataclass(frozen=True, kw_only=True, slots=True)
class _BuiltGraph:
    """A graph and the layers of the engine built from it."""

    nodes: Mapping[str, ir.Node]
    gemms: Mapping[str, Gemm]
    precisions: Mapping[str, str]  # of the GEMMs
    layers: Sequence[EngineLayer]

    def products_of(self, node: str) -> list[EngineLayer]:
        return [layer for layer in self.layers if node in layer.nodes and layer.is_product]

    def label(self, node: ir.Node) -> str:
        return f"{node.name} in {_part(node)}"

    def of_type(self, *op_types: str) -> list[ir.Node]:
        return [node for node in self.nodes.values() if node.op_type in op_types]


Checks = Iterator[tuple[str, str | None]]  # node or layer, and the failure or None


def layer_report(text: str, graph: OnnxGraph) -> LayerReport:
    """Read the builder's list of layers and compare it with the graph that the engine was built from.

    Args:
        text: the log of the builder; "" where it has no list.
        graph: the parsed graph, see ``engine_graph``; its weights are not read.
    """
    nodes = {str(node.name): node for node in graph.model.graph}
    read, unread = parse_layers(text, {name: macs_of(node) for name, node in nodes.items()})
    layers = tuple(_with_parts(read, nodes))
    engine = _BuiltGraph(
        nodes=nodes, gemms={gemm.name: gemm for gemm in gemms(graph)}, precisions=gemm_precisions(graph), layers=layers
    )
    outcomes = [_outcome(name, list(check(engine))) for name, check in EXPECTATIONS.items()] if layers else []
    return LayerReport(layers=layers, outcomes=tuple(outcomes), unread=unread)


def _with_parts(layers: Sequence[EngineLayer], nodes: Mapping[str, ir.Node]) -> Iterator[EngineLayer]:
    part = PART_NAMES[0]
    for layer in layers:
        part = next((_part(nodes[name]) for name in layer.nodes if name in nodes), part)
        yield replace(layer, part=part)


def _part(node: ir.Node) -> str:
    return part_of(node.metadata_props.get(KEPT_METADATA, ""))


def _outcome(name: str, checks: list[tuple[str, str | None]]) -> Outcome:
    failed = tuple(f"{label}: {failure}" for label, failure in checks if failure is not None)
    return Outcome(name=name, asked=len(checks), failed=failed)


def _qkv_is_one(engine: _BuiltGraph) -> Checks:
    for attention in engine.of_type("Attention"):
        yield engine.label(attention), _failure_to_fuse(engine, _gemms_behind(engine, attention))


def _gate_up_is_one(engine: _BuiltGraph) -> Checks:
    for node in engine.of_type("SwiGLU", "QuantizedSwiGLU"):
        yield engine.label(node), _failure_to_fuse(engine, _gemms_behind(engine, node))


def _attention_is_fused(engine: _BuiltGraph) -> Checks:
    for attention in engine.of_type("Attention"):
        products = engine.products_of(str(attention.name))
        fused = len(products) == 1 and "mha" in products[0].name
        names = " and ".join(f"{layer.name} ({layer.dtype})" for layer in products)
        yield engine.label(attention), None if fused else f"it became {names or 'no product at all'}"


def _multiplies_quantised(precision: str, dtype: str, engine: _BuiltGraph) -> Checks:
    """Check that the GEMMs of a precision multiply values of the builder's type ``dtype``."""
    for name in (name for name, own in engine.precisions.items() if own == precision):
        products = engine.products_of(name)
        types = {tensor.dtype for layer in products for tensor in (*layer.inputs, *layer.constants[:1])}
        is_quantised = len(products) == 1 and products[0].dtype == dtype and types <= {dtype}
        failure = f"it multiplies {' and '.join(sorted(types)) or 'nothing'}"
        yield engine.label(engine.nodes[name]), None if is_quantised else failure


def _weights_stay_stored(engine: _BuiltGraph) -> Checks:
    decoders = [layer for layer in engine.layers if layer.decodes_weights]
    for name in (name for name, precision in engine.precisions.items() if precision in STORED):
        weight = engine.nodes[name].inputs[1]
        producer = weight.producer() if weight is not None else None
        sources = {name, str(producer.name) if producer is not None else name}
        own_decoders = [layer.name for layer in decoders if sources & set(layer.nodes)]
        failure = f"its weight is decoded into memory by {own_decoders[0]}" if own_decoders else None
        yield engine.label(engine.nodes[name]), failure


def _no_surprise_copy(engine: _BuiltGraph) -> Checks:
    for layer in (layer for layer in engine.layers if layer.only_moves and not layer.decodes_weights):
        asked_for = any(engine.nodes[name].op_type in MOVERS for name in layer.nodes if name in engine.nodes)
        yield f"{layer.name} in {layer.part}", None if asked_for else f"{layer.bytes} bytes that no node asks for"


def _plugins_are_custom(engine: _BuiltGraph) -> Checks:
    for layer in (layer for layer in engine.layers if layer.kind == CUSTOM):
        known = any(node in engine.nodes and engine.nodes[node].domain for node in layer.nodes)
        yield f"{layer.name} in {layer.part}", None if known else "it stands for no node of domain medseg"


EXPECTATIONS: Mapping[str, Callable[[_BuiltGraph], Checks]] = {
    "q, k and v are one GEMM": _qkv_is_one,
    "gate and up are one GEMM": _gate_up_is_one,
    "attention is one kernel": _attention_is_fused,
    "INT8 GEMMs multiply Int8": partial(_multiplies_quantised, "int8", "Int8"),
    "FP8 GEMMs multiply FP8": partial(_multiplies_quantised, "fp8", "FP8"),
    "stored weights are decoded inside the GEMM": _weights_stay_stored,
    "no copy or scaling that no node asks for": _no_surprise_copy,
    "plugins stand for nodes of domain medseg": _plugins_are_custom,
}


def _gemms_behind(engine: _BuiltGraph, node: ir.Node) -> list[str]:
    """Return the nearest GEMMs before a node, through nodes that are no GEMMs."""
    nearest, seen, waiting = dict[str, None](), set[str](), list(node.inputs)
    while waiting:
        value = waiting.pop()
        producer = value.producer() if value is not None else None
        if producer is None or str(producer.name) in seen:
            continue
        seen.add(str(producer.name))
        if str(producer.name) in engine.gemms:
            nearest[str(producer.name)] = None
        else:
            waiting += producer.inputs
    return list(nearest)


def _failure_to_fuse(engine: _BuiltGraph, names: Sequence[str]) -> str | None:
    if len(names) != 1:
        return f"{len(names)} GEMMs of the graph feed it: {', '.join(names)}"
    products = engine.products_of(names[0])
    if len(products) == 1:
        return None
    return f"{names[0]} became {len(products)} products: {', '.join(layer.name for layer in products)}"
