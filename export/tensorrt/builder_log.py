"""Parse the list of an engine's layers in the log of a TensorRT builder, without running the engine.

With detailed profiling and a verbose logger, the builder logs a line for every kernel: its type, the types and shapes
of its inputs and outputs, and its ONNX nodes. The format is not documented, so lines that cannot be parsed are counted.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from medseg_trt.export.engine_layers import EngineLayer, EngineTensor

BYTES: Mapping[str, float] = {
    "Float": 4,
    "Half": 2,
    "BFloat16": 2,
    "FP8": 1,
    "FP4": 0.5,
    "Int64": 8,
    "Int32": 4,
    "Int8": 1,
    "UInt8": 1,
    "Bool": 1,
    "Int4": 0.5,
}
SYNCHRONISATION = ("signal", "wait", "shape_call")

_TENSOR = re.compile(r"Dimensions: \[(?P<shape>[-\d,]*)\].*?Datatype: (?P<dtype>\w+)")
_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")


def parse_layers(text: str, macs: Mapping[str, int]) -> tuple[tuple[EngineLayer, ...], int]:
    """Return the layers of the builder's list, without those that only synchronise, and the number of unparsed lines.

    Args:
        text: begins with "Layers:"; text after the list is ignored.
        macs: of the ONNX nodes that multiply matrices, by name. Layers that share a node share its MACs evenly.
    """
    lines = text.partition("Layers:")[2].split("\n\n")[0].strip().splitlines()
    parsed = [_layer(line) for line in lines]
    layers = [layer for layer in parsed if layer is not None and layer.kind not in SYNCHRONISATION]
    return tuple(_with_macs(layers, macs)), sum(layer is None for layer in parsed)


def _layer(line: str) -> EngineLayer | None:
    fields = _fields(line)
    if not {"Name", "LayerType", "Inputs", "Outputs"} <= fields.keys():
        return None
    inputs, constants, outputs = (_tensors(fields.get(key, "")) for key in ("Inputs", "Constants", "Outputs"))
    nodes = dict.fromkeys(_node_name(text) for text in _NODE.findall(fields.get("Metadata", "")))
    size = sum(tensor.elements * BYTES.get(tensor.dtype, 0) for tensor in (*inputs, *constants, *outputs))
    return EngineLayer(
        name=fields["Name"],
        kind=fields["LayerType"],
        kernel=fields.get("TacticName", ""),
        inputs=inputs,
        constants=constants,
        outputs=outputs,
        nodes=tuple(nodes),
        bytes=int(size),
    )


def _fields(line: str) -> dict[str, str]:
    """Split ``Key: value, Key: value`` at the commas outside of brackets."""
    fields: dict[str, str] = {}
    depth = start = 0
    for index, character in enumerate(line + ","):
        depth += (character in "[{(") - (character in "]})")
        if character == "," and depth == 0:
            key, _, value = line[start:index].strip().partition(": ")
            fields.setdefault(key.rstrip(":"), value)
            start = index + 1
    return fields


def _tensors(text: str) -> tuple[EngineTensor, ...]:
    return tuple(
        EngineTensor(dtype=match["dtype"], shape=tuple(int(size) for size in match["shape"].split(",") if size))
        for match in _TENSOR.finditer(text)
    )


def _node_name(text: str) -> str:
    """Return the name of a node; a node in a function is listed as ``inner | node (Operator)``."""
    outer = text.rpartition(" | ")[2]
    return re.sub(r" \(\w+\)$", "", outer)


def _with_macs(layers: Sequence[EngineLayer], macs: Mapping[str, int]) -> Iterable[EngineLayer]:
    sharers: dict[str, int] = {}
    for layer in layers:
        for node in layer.nodes if layer.is_product else ():
            sharers[node] = sharers.get(node, 0) + 1
    for layer in layers:
        own = sum(macs.get(node, 0) // sharers[node] for node in layer.nodes) if layer.is_product else 0
        yield replace(layer, macs=own)
