"""Make the copy of a graph from which an engine is built.

Both libraries support a part of ONNX, and some patterns run faster than others. A repair changes only the copy, and not
the function that it computes:

- ``softmax_precision`` of an Attention is removed, because no parser reads it: the fused kernels compute the softmax
  in float32;
- an Attention in float32 is marked ``TRT_decomposable``: there is no fused kernel for it, and without the mark the
  builder rejects it with a free batch size;
- q, k and v are reshaped and transposed before they are split (``qkv_order.py``);
- with plugins, a norm or SwiGLU before an INT8 product writes int8 itself (``quantised_nodes.py``).

Source: ONNX operators, opset 23; TensorRT, ``IAttention.decomposable``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx import NodeProto, TensorProto

from medseg_trt.errors import ArtefactError
from medseg_trt.export.graph.functions import DOMAIN
from medseg_trt.export.graph.onnx_graph import OnnxGraph
from medseg_trt.export.tensorrt.qkv_order import order_before_split
from medseg_trt.export.tensorrt.quantised_nodes import join_quantisers

MAX_GRAPH_BYTES = 64 << 20  # without weights; the largest so far is below one


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineGraph:
    """A graph in the form that the parser reads."""

    serialized: bytes  # refers to the weights file of the original
    inputs: Mapping[str, tuple[int, ...]]  # by name: the shape without the batch
    functions: frozenset[str]  # operators of domain medseg that it calls
    repairs: tuple[str, ...]  # one line per kind of change


def engine_graph(path: Path, *, plugins: bool = False) -> EngineGraph:
    """Read a graph without its weights and repair it.

    Args:
        path: the ONNX file.
        plugins: nodes of domain ``medseg`` will run as plugins.

    Raises:
        ArtefactError: it is no ONNX graph, or an input has a free axis other than the batch.
    """
    model = read_graph(path)
    values = (*model.graph.input, *model.graph.value_info)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    shapes = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values}
    counts = {name: sum(repair(node, types) for node in model.graph.node) for name, repair in REPAIRS.items()}
    counts[ORDERED] = order_before_split(model.graph, shapes)
    if plugins:
        joined, counts[JOINED] = join_quantisers(OnnxGraph(model=ir.from_proto(model)))
        model = ir.to_proto(joined.model)
    repairs = tuple(f"{count} nodes: {name}" for name, count in counts.items() if count)
    inputs = {value.name: _free_batch(value, path) for value in model.graph.input}
    functions = frozenset(node.op_type for node in model.graph.node if node.domain == DOMAIN)
    return EngineGraph(serialized=model.SerializeToString(), inputs=inputs, functions=functions, repairs=repairs)


def read_graph(path: Path) -> onnx.ModelProto:
    """Read a graph without its weights.

    Raises:
        ArtefactError: it is too large, or no ONNX graph.
    """
    if path.stat().st_size > MAX_GRAPH_BYTES:
        raise ArtefactError(f"{path} is larger than {MAX_GRAPH_BYTES >> 20} MiB; build the bundle again")
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # the only common base class of protobuf's errors
        raise ArtefactError(f"{path} is no ONNX file: {' '.join(str(error).split())[:200]}") from error
    if not model.graph.output:
        raise ArtefactError(f"{path} is no ONNX file: it has no outputs")
    return model


def _drop_softmax_precision(node: NodeProto, _: Mapping[str, int]) -> bool:
    if node.op_type != "Attention":
        return False
    kept = [attribute for attribute in node.attribute if attribute.name != "softmax_precision"]
    changed = len(kept) < len(node.attribute)
    del node.attribute[:]
    node.attribute.extend(kept)
    return changed


def _mark_decomposable(node: NodeProto, types: Mapping[str, int]) -> bool:
    if node.op_type != "Attention" or types.get(node.input[0]) != TensorProto.FLOAT:
        return False
    node.attribute.append(onnx.helper.make_attribute("TRT_decomposable", 1))
    return True


ORDERED = "q, k and v cut apart after they are in order, so that their weights stay one"
JOINED = "what feeds an INT8 product writes the int8 itself, in one kernel"
REPAIRS: Mapping[str, Callable[[NodeProto, Mapping[str, int]], bool]] = {
    "softmax_precision dropped, the fused kernels take float32": _drop_softmax_precision,
    "float32 attention marked decomposable, no fused kernel takes it": _mark_decomposable,
}


def _free_batch(value: onnx.ValueInfoProto, path: Path) -> tuple[int, ...]:
    batch, *rest = [(dim.dim_param, dim.dim_value) for dim in value.type.tensor_type.shape.dim] or [("", 0)]
    if not batch[0] or not all(size > 0 for _, size in rest):
        raise ArtefactError(
            f"{path.name}: the input {value.name} has other free sizes than its batch; engines are built from graphs "
            "that give logits: --outputs logits"
        )
    return tuple(size for _, size in rest)
