"""Emulate fp16 rounding and check activations for overflow, on a machine that computes in float32.

A CPU back-end computes 16-bit values in float32, which hides overflows that occur on a GPU. Here every 16-bit value is
rounded; computation between them stays in float32, as in a tensor core, which multiplies 16-bit values and adds in
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
HEADROOM = 4.0  # other images may have larger activations than the observed ones


@dataclass(frozen=True, kw_only=True, slots=True)
class TooLarge:
    """A GEMM whose values come near the largest number of a 16-bit type."""

    gemm: str
    largest: float  # magnitude of its inputs and outputs over all observed images

    __pydantic_config__ = {"extra": "forbid"}


def observed_values(graph: OnnxGraph, names: Collection[str]) -> list[str]:
    """Return the names of the activations and outputs of the named GEMMs."""
    chosen = [gemm for gemm in gemms(graph) if gemm.name in names]
    return list(dict.fromkeys(value for gemm in chosen for value in (gemm.activation, gemm.output)))


def too_large(
    graph: OnnxGraph, names: Collection[str], observe: Observe, images: np.ndarray, *, dtype: str = "fp16"
) -> tuple[TooLarge, ...]:
    """Return the named GEMMs whose values may overflow in 16 bits, the largest first.

    Args:
        graph: float32.
        names: of its GEMMs.
        observe: runs one image and returns at least ``observed_values``.
        images: prepared images.
        dtype: a key of ``LARGEST``.
    """
    largest = dict.fromkeys(observed_values(graph, names), 0.0)
    for image in images:
        values = observe(image[np.newaxis])
        largest = {name: max(value, float(np.abs(values[name]).max())) for name, value in largest.items()}
    limit = LARGEST[dtype] / HEADROOM
    candidates = [
        TooLarge(gemm=gemm.name, largest=max(largest[gemm.activation], largest[gemm.output]))
        for gemm in gemms(graph)
        if gemm.name in names
    ]
    unsafe = [gemm for gemm in candidates if not gemm.largest <= limit]  # NaN is unsafe
    return tuple(sorted(unsafe, key=lambda gemm: -gemm.largest))


def rounded_graph(graph: OnnxGraph) -> OnnxGraph:
    """Return a float32 copy of a graph in which every 16-bit value is rounded to its 16 bits.

    An overflow becomes infinity with every back-end.
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
    """Insert a cast to 16 bits, unless the node is one, and a cast back to 32 between a value and its readers."""
    half, readers, previous = value.dtype, list(value.uses()), node
    assert half is not None
    last = value
    casts = [("wide", FLOAT)] if node.op_type == "Cast" else [("rounded", half), ("wide", FLOAT)]
    if node.op_type != "Cast":
        value.type = ir.TensorType(FLOAT)
    for suffix, dtype in casts:
        output = ir.Value(name=f"{value.name}_{suffix}", shape=value.shape, type=ir.TensorType(dtype))
        metadata = {KEPT_METADATA: node.metadata_props.get(KEPT_METADATA, "")}
        name, attributes = f"Cast_{output.name}", {"to": int(dtype)}
        cast = ir.node("Cast", [last], attributes, outputs=[output], name=name, metadata_props=metadata)
        graph.insert_after(previous, cast)
        previous, last = cast, cast.outputs[0]
    for reader, index in readers:
        reader.replace_input_with(index, last)
