"""Read what a TensorRT builder says about the layers of an engine that it has made, without running it.

With detailed profiling and a verbose logger the builder logs a line for every kernel: its type, the types and shapes of
what it reads and writes, and the ONNX nodes that it came from. No document describes the form of these lines, so a line
that cannot be read is counted and never guessed at.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from medseg_trt.export.engine_layers import EngineLayer, EngineTensor

BYTES: Mapping[str, float] = {
    "Float": 4, "Half": 2, "BFloat16": 2, "Int8": 1, "UInt8": 1, "FP8": 1, "Bool": 1, "Int4": 0.5, "FP4": 0.5,
    "Int32": 4, "Int64": 8,
}  # fmt: skip
SYNCHRONISATION = ("signal", "wait", "shape_call")

_TENSOR = re.compile(r"Dimensions: \[(?P<shape>[-\d,]*)\].*?Datatype: (?P<dtype>\w+)")
_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")


def parse_layers(text: str, macs: Mapping[str, int]) -> tuple[tuple[EngineLayer, ...], int]:
    """Return the layers of the builder's list, without those that only synchronise, and how many lines were not read.

    Args:
        text: begins with "Layers:"; what follows the list is not looked at.
        macs: of the ONNX nodes that multiply matrices, by name. Layers that share a node share its MACs evenly.
    """
    lines = text.partition("Layers:")[2].split("\n\n")[0].strip().splitlines()
    read = [_layer(line) for line in lines]
    layers = [layer for layer in read if layer is not None and layer.kind not in SYNCHRONISATION]
    return tuple(_with_macs(layers, macs)), sum(layer is None for layer in read)


def _layer(line: str) -> EngineLayer | None:
    fields = _fields(line)
    if not {"Name", "LayerType", "Inputs", "Outputs"} <= fields.keys():
        return None
    inputs, constants, outputs = (_tensors(fields.get(key, "")) for key in ("Inputs", "Constants", "Outputs"))
    nodes = dict.fromkeys(_node_name(text) for text in _NODE.findall(fields.get("Metadata", "")))
    size = sum(tensor.elements * BYTES.get(tensor.dtype, 0) for tensor in (*inputs, *constants, *outputs))
    return EngineLayer(
        name=fields["Name"], kind=fields["LayerType"], kernel=fields.get("TacticName", ""), inputs=inputs,
        constants=constants, outputs=outputs, nodes=tuple(nodes), bytes=int(size),
    )  # fmt: skip


def _fields(line: str) -> dict[str, str]:
    """Split ``Key: value, Key: value`` at the commas that stand in no bracket."""
    fields: dict[str, str] = {}
    depth = start = 0
    for place, sign in enumerate(line + ","):
        depth += (sign in "[{(") - (sign in "]})")
        if sign == "," and depth == 0:
            key, _, value = line[start:place].strip().partition(": ")
            fields.setdefault(key.rstrip(":"), value)
            start = place + 1
    return fields


def _tensors(text: str) -> tuple[EngineTensor, ...]:
    return tuple(
        EngineTensor(dtype=match["dtype"], shape=tuple(int(size) for size in match["shape"].split(",") if size))
        for match in _TENSOR.finditer(text)
    )


def _node_name(text: str) -> str:
    """Return the name of a node; that of one in a function reads ``inner | node (Operator)``."""
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
