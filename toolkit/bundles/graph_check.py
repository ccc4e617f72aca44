"""Check a graph of a bundle before any library opens it: its interface, operators, size and weights."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from medseg_trt.errors import ArtefactError
from medseg_trt.export.graph.interface import MODEL_GRAPH, GraphInterface, require_interface
from medseg_trt.export.graph.onnx_fields import (
    ATTRIBUTE_BODIES,
    ATTRIBUTE_TENSOR,
    ATTRIBUTE_TENSORS,
    FUNCTION_ATTRIBUTE,
    FUNCTION_DOMAIN,
    FUNCTION_NAME,
    FUNCTION_NODE,
    GRAPH_INITIALIZER,
    GRAPH_NODE,
    GRAPH_SPARSE,
    MODEL_FUNCTIONS,
    MODEL_TRAINING,
    NODE_ATTRIBUTE,
    NODE_DOMAIN,
    NODE_OPERATOR,
    external_entries,
)
from medseg_trt.export.graph.onnx_wire import fields, grouped, messages, only, text
from medseg_trt.export.graph.operators import ALLOWED, FUNCTIONS, MAX_NODES

MEDSEG = "medseg"


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """The only file that a graph may take weights from."""

    name: str  # beside the graph
    num_bytes: int


def check_graph(path: Path, content: bytes, required: GraphInterface, weights: Weights) -> None:
    """Refuse a graph that is not one of the exporter's.

    Args:
        path: of the graph, for messages.
        content: of the graph.
        required: its inputs and outputs.
        weights: the file that its weights are in.

    Raises:
        ArtefactError: it is no ONNX file, takes or gives something else, has an operator that the exporter never
            writes, is larger than its graphs are, or takes weights from another file.
    """
    require_interface(path, content, required)
    model = memoryview(content)
    try:
        problem = next(_problems(model, only(model, MODEL_GRAPH), weights), None)
    except ValueError as error:
        raise ArtefactError(f"{path} is no ONNX file, or is damaged: {error}") from error
    if problem is not None:
        raise ArtefactError(f"{path} {problem}, which no graph of a bundle does; it is not to be trusted")


def _problems(model: memoryview, graph: memoryview, weights: Weights) -> Iterator[str]:
    """Yield what is wrong, as the rest of a sentence that begins with the file's name."""
    sizes: dict[str, int] = {}
    for function in map(grouped, messages(model, MODEL_FUNCTIONS)):
        name, domain = text(function, FUNCTION_NAME), text(function, FUNCTION_DOMAIN)
        if domain != MEDSEG or name not in FUNCTIONS or name in sizes:
            yield f"defines the function {domain}.{name}"
        nodes = [grouped(node) for node in function.get(FUNCTION_NODE, ())]
        sizes[name] = len(nodes)
        for node in nodes:
            if text(node, NODE_DOMAIN) not in ("", "ai.onnx"):
                yield f"calls {text(node, NODE_DOMAIN)}.{text(node, NODE_OPERATOR)} in the function {name}"
            yield from _node_problems(node, weights)
        for attribute in function.get(FUNCTION_ATTRIBUTE, ()):
            yield from _attribute_problems(attribute, f"the function {name}", weights)
    if next(messages(model, MODEL_TRAINING), None) is not None:
        yield "has a training graph"
    if next(messages(graph, GRAPH_SPARSE), None) is not None:
        yield "has sparse weights"
    num_nodes = 0
    for node in map(grouped, messages(graph, GRAPH_NODE)):
        num_nodes += sizes.get(text(node, NODE_OPERATOR), 1)
        if num_nodes > MAX_NODES:
            yield f"has more than {MAX_NODES} nodes"
        yield from _node_problems(node, weights)
    for tensor in messages(graph, GRAPH_INITIALIZER):
        yield from _tensor_problems(tensor, weights)


def _node_problems(node: Mapping[int, list[memoryview]], weights: Weights) -> Iterator[str]:
    operator, domain = text(node, NODE_OPERATOR), text(node, NODE_DOMAIN)
    if operator not in ALLOWED.get(domain, frozenset()):
        yield f"uses the operator {domain or 'ai.onnx'}.{operator}"
    for attribute in node.get(NODE_ATTRIBUTE, ()):
        yield from _attribute_problems(attribute, operator, weights)


def _attribute_problems(attribute: memoryview, owner: str, weights: Weights) -> Iterator[str]:
    for number, value in fields(attribute):
        if number in ATTRIBUTE_BODIES:
            yield f"has a graph inside {owner}"
        if number in (ATTRIBUTE_TENSOR, ATTRIBUTE_TENSORS) and isinstance(value, memoryview):
            yield from _tensor_problems(value, weights)


def _tensor_problems(tensor: memoryview, weights: Weights) -> Iterator[str]:
    entries, repeated = external_entries(tensor)
    if not entries:
        return
    if repeated:
        yield "says twice where its weights are"
    if entries.get("location") != weights.name:
        yield f"takes weights from {entries.get('location')!r}, not from {weights.name!r}"
    offset, length = (_number(entries.get(key, "0")) for key in ("offset", "length"))
    if offset + length > weights.num_bytes:
        yield f"takes weights beyond the end of {weights.name!r}"


def _number(written: str) -> int:
    if not (written.isascii() and written.isdigit() and len(written) <= 20):
        raise ValueError(f"{written[:40]!r} is no offset and no length")
    return int(written)
