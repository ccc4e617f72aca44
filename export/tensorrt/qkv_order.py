"""Split q, k and v after the transposition instead of before it: the same values from one product kernel.

Where a Split directly follows a product, the builder splits the weights and runs three products. It then dequantises
8-bit weights to memory and multiplies floats.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from onnx import GraphProto, NodeProto, helper, numpy_helper

PARTS = 3  # q, k and v
HEADS_FIRST = [0, 2, 1, 3]  # (batch, tokens, heads, head_dim) -> (batch, heads, tokens, head_dim)
ALL_AT_ONCE = [2, 0, 3, 1, 4]  # (batch, tokens, 3, heads, head_dim) -> (3, batch, heads, tokens, head_dim)

Shapes = Mapping[str, Sequence[int]]  # of values, by name; 0 is a free size


def order_before_split(graph: GraphProto, shapes: Shapes) -> int:
    """Change a graph in place wherever q, k and v have the same width; return the number of changes."""
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    matches = [(node, *paths) for node in graph.node if (paths := _paths(node, readers, shapes)) is not None]
    for split, reshapes, transposes in matches:
        _rewrite(graph, split, reshapes, transposes, shapes[reshapes[0].output[0]])
    return len(matches)


def _paths(
    split: NodeProto, readers: Mapping[str, list[NodeProto]], shapes: Shapes
) -> tuple[list[NodeProto], list[NodeProto]] | None:
    """Return the three Reshapes and the three Transposes after a Split, if each is the only reader."""
    if split.op_type != "Split" or len(split.output) != PARTS or len(shapes.get(split.input[0], ())) != 3:
        return None
    if next((attribute.i for attribute in split.attribute if attribute.name == "axis"), 0) not in (-1, 2):
        return None
    reshapes = [_only_reader(name, "Reshape", readers) for name in split.output]
    transposes = [_only_reader(node.output[0], "Transpose", readers) if node else None for node in reshapes]
    if None in reshapes or None in transposes:
        return None
    first = [node for node in reshapes if node is not None], [node for node in transposes if node is not None]
    sizes = [list(shapes.get(node.output[0], ())) for node in first[0]]
    perms = [
        list(next((attribute.ints for attribute in node.attribute if attribute.name == "perm"), ()))
        for node in first[1]
    ]
    same = all(size == sizes[0] for size in sizes) and all(perm == HEADS_FIRST for perm in perms)
    return first if same and len(sizes[0]) == 4 and min(sizes[0][1:]) > 0 else None


def _only_reader(name: str, op_type: str, readers: Mapping[str, list[NodeProto]]) -> NodeProto | None:
    of_value = readers.get(name, [])
    return of_value[0] if len(of_value) == 1 and of_value[0].op_type == op_type else None


def _rewrite(
    graph: GraphProto, split: NodeProto, reshapes: list[NodeProto], transposes: list[NodeProto], sizes: Sequence[int]
) -> None:
    stem = split.name
    shape, axis = f"{stem}_by_part", f"{stem}_part_axis"
    _, _, heads, head_dim = sizes
    graph.initializer.append(numpy_helper.from_array(np.array([0, 0, PARTS, heads, head_dim], np.int64), shape))
    graph.initializer.append(numpy_helper.from_array(np.array([0], np.int64), axis))
    parts = [f"{stem}_part{number}" for number in range(PARTS)]
    nodes = [
        helper.make_node("Reshape", [split.input[0], shape], [f"{stem}_wide"], name=f"{stem}_Reshape"),
        helper.make_node("Transpose", [f"{stem}_wide"], [f"{stem}_first"], name=f"{stem}_Transpose", perm=ALL_AT_ONCE),
        helper.make_node("Split", [f"{stem}_first"], parts, name=stem, axis=0, num_outputs=PARTS),
        *(
            helper.make_node("Squeeze", [part, axis], [old.output[0]], name=old.name)
            for part, old in zip(parts, transposes, strict=True)
        ),
    ]
    for node in nodes:
        node.metadata_props.extend(split.metadata_props)  # they come from the same module
    position = next(index for index, node in enumerate(graph.node) if node.name == split.name)
    removed = {node.name for node in (split, *reshapes, *transposes)}
    kept = [node for node in graph.node if node.name not in removed]
    before = sum(node.name not in removed for node in list(graph.node)[:position])
    ordered = [*kept[:before], *nodes, *kept[before:]]
    del graph.node[:]
    graph.node.extend(ordered)
