"""Find out what 16-bit floats would do to a network, on a machine that computes them in float32.

A CPU back-end widens 16-bit values and so hides an overflow that a GPU has. Here every 16-bit value is rounded for
real; what lies between two of them stays float32, as in a tensor core, which multiplies 16-bit numbers and adds in
float32.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from medseg_trt.export.graph.gemms import gemms
from medseg_trt.export.graph.trace import KEPT_METADATA, OnnxGraph
from medseg_trt.export.precision.calibrate import Observe
from medseg_trt.export.precision.half import FLOAT, TYPES

LARGEST: Mapping[str, float] = {"fp16": 65504.0, "bf16": float(np.finfo(np.float32).max)}
HEADROOM = 4.0  # another image may be brighter than those that were looked at


@dataclass(frozen=True, kw_only=True, slots=True)
class TooLarge:
    """A GEMM whose numbers come near the end of a 16-bit type."""

    gemm: str
    largest: float  # magnitude of what it read or made, over all images that were looked at

    __pydantic_config__ = {"extra": "forbid"}


def observed_values(graph: OnnxGraph, names: Collection[str]) -> list[str]:
    """Return the values that the named GEMMs read and make."""
    found = [value for gemm in gemms(graph) if gemm.name in names for value in (gemm.activation, gemm.output)]
    return list(dict.fromkeys(found))


def too_large(
    graph: OnnxGraph, names: Collection[str], observe: Observe, images: np.ndarray, *, dtype: str = "fp16"
) -> tuple[TooLarge, ...]:
    """Return the named GEMMs that would not be safe in 16 bits, the worst first.

    Args:
        graph: float32.
        names: of its GEMMs.
        observe: runs one image and returns at least ``observed_values``.
        images: prepared images.
        dtype: a key of ``LARGEST``.
    """
    largest = dict.fromkeys(observed_values(graph, names), 0.0)
    for image in images:
        found = observe(image[np.newaxis])
        largest = {name: max(value, float(np.abs(found[name]).max())) for name, value in largest.items()}
    limit = LARGEST[dtype] / HEADROOM
    worst = [
        TooLarge(gemm=gemm.name, largest=max(largest[gemm.activation], largest[gemm.output]))
        for gemm in gemms(graph)
        if gemm.name in names
    ]
    return tuple(sorted((each for each in worst if not each.largest <= limit), key=lambda each: -each.largest))


def rounded_graph(graph: OnnxGraph) -> OnnxGraph:
    """Return a float32 copy of a graph with 16-bit values, in which each of them is rounded to its 16 bits.

    An overflow becomes an infinity here, whatever the back-end does with 16-bit arithmetic.
    """
    model = graph.model.clone()
    halves = frozenset(TYPES.values())
    for value in list(model.graph.initializers.values()):
        if value.dtype in halves and value.const_value is not None:
            wide = value.const_value.numpy().astype(np.float32)
            value.const_value = ir.tensor(wide, name=value.name)
            value.type = ir.TensorType(FLOAT)
    for node in list(model.graph):
        for value in [output for output in node.outputs if output.dtype in halves]:
            _round(model.graph, node, value)
    return OnnxGraph(model=model)


def _round(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    """Put a cast to 16 bits, unless the node is one, and one back to 32 between a value and its readers."""
    half, readers, place = value.dtype, list(value.uses()), node
    assert half is not None
    last = value
    steps = [("wide", FLOAT)] if node.op_type == "Cast" else [("rounded", half), ("wide", FLOAT)]
    if node.op_type != "Cast":
        value.type = ir.TensorType(FLOAT)
    for suffix, dtype in steps:
        output = ir.Value(name=f"{value.name}_{suffix}", shape=value.shape, type=ir.TensorType(dtype))
        cast = ir.node(
            "Cast", [last], {"to": int(dtype)}, outputs=[output], name=f"Cast_{output.name}",
            metadata_props={KEPT_METADATA: node.metadata_props.get(KEPT_METADATA, "")},
        )  # fmt: skip
        graph.insert_after(place, cast)
        place, last = cast, cast.outputs[0]
    for reader, index in readers:
        reader.replace_input_with(index, last)
