"""The dialects of ONNX in which a network is written: the same function, in operators that each back-end supports.

``canonical`` is the output of ``fuse`` and the precision schemes: operator set 23 and the nodes of domain ``medseg``.
``plain`` uses operators that OpenVINO and TensorRT 10.3 support: functions are inlined, and every operator that is
newer than the target set is decomposed into patterns that OpenVINO recognises and fuses again.
``convolved`` is ``plain`` with group norms that leave the layout of OpenVINO's convolutions as it is.

Source: the decompositions are the function bodies that ONNX itself gives for these operators.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx.defs
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, RemoveUnusedNodesPass, ShapeInferencePass
from onnxscript.optimizer import fold_constants

from medseg_trt.errors import MedsegError
from medseg_trt.export.graph.functions import DOMAIN, VERSION, check_functions
from medseg_trt.export.graph.trace import KEPT_METADATA, OPSET, OnnxGraph, check

PLAIN_OPSETS = (18, 21)  # the lowest sufficient one is used; 21 adds int4, blocks and float16 to DequantizeLinear
LARGEST_FOLDED = 64  # elements: the arithmetic on shapes, never a weight


@dataclass(frozen=True, kw_only=True, slots=True)
class Dialect:
    """How a dialect is derived from the canonical graph, and its operator sets."""

    derive: Callable[[OnnxGraph], OnnxGraph]
    opsets: tuple[Mapping[str, int], ...]  # exactly one of these


def plain(graph: OnnxGraph, group_norm: "Decomposition | None" = None) -> OnnxGraph:
    """Return the graph in operator set 18, or 21 where its types require it; the copy shares its tensors.

    Args:
        graph: canonical.
        group_norm: another decomposition of GroupNormalization than that of ``DECOMPOSITIONS``.

    Raises:
        MedsegError: an operator is in neither set and has no decomposition.
    """
    decompositions = {**DECOMPOSITIONS, **({"GroupNormalization": group_norm} if group_norm else {})}
    model = graph.model.clone()
    InlinePass()(model)
    model.opset_imports.pop(DOMAIN, None)
    fold_constants(
        model,
        input_size_limit=LARGEST_FOLDED,
        output_size_limit=LARGEST_FOLDED,
        should_fold=lambda node: None if _is_shape_arithmetic(node) else False,
    )
    for node in [node for node in model.graph if node.op_type in decompositions and node.domain == ""]:
        builder = _NodeBuilder(model.graph, node)
        builder.replace(decompositions[node.op_type](builder, node))
    RemoveUnusedNodesPass()(model)
    model.opset_imports[""] = _lowest_opset(model.graph)
    _infer_missing_shapes(model)
    return OnnxGraph(model=model)


DIALECTS: Mapping[str, Dialect] = {
    "canonical": Dialect(derive=lambda graph: graph, opsets=({"": OPSET}, {"": OPSET, DOMAIN: VERSION})),
    "plain": Dialect(derive=plain, opsets=tuple({"": version} for version in PLAIN_OPSETS)),
    "convolved": Dialect(
        derive=lambda graph: plain(graph, _convolved_group_norm),
        opsets=tuple({"": version} for version in PLAIN_OPSETS),
    ),
}


def derive(dialect: str, graph: OnnxGraph, image_size: tuple[int, int], num_classes: int) -> OnnxGraph:
    """Return a canonical graph in another dialect, checked.

    Args:
        dialect: a key of ``DIALECTS``.
        graph: the canonical graph.
        image_size: height and width in pixels.
        num_classes: channels of the logits.

    Raises:
        MedsegError: the derived graph has a duplicate name, an unknown shape, an operator set of another dialect,
            or a function that contains a matrix product.
    """
    derived = DIALECTS[dialect].derive(graph)
    check(derived, image_size, num_classes, opsets=DIALECTS[dialect].opsets)
    check_functions(derived.model)
    return derived


class _NodeBuilder:
    """Collects the nodes that replace one node; they keep its module, and their names begin with its output's name."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self.graph, self.node, self.nodes = graph, node, list[ir.Node]()
        self.name = node.outputs[0].name
        self.inputs = [value for value in node.inputs if value is not None]
        self.type = _dtype(self.inputs[0])

    def __call__(self, op_type: str, *inputs: ir.Value | float, **attributes: int | float | list[int]) -> ir.Value:
        """Add a node and return its value; a number becomes a constant of the type of the first input."""
        values = [
            operand if isinstance(operand, ir.Value) else self.constant(operand, _dtype(inputs[0]))
            for operand in inputs
        ]
        name = f"{self.name}_{op_type}_{len(self.nodes)}"
        metadata = {key: text for key, text in self.node.metadata_props.items() if key == KEPT_METADATA}
        node = ir.node(op_type, values, attributes, outputs=[ir.Value(name=name)], name=name, metadata_props=metadata)
        self.nodes.append(node)
        output = node.outputs[0]
        output.dtype = ir.DataType(attributes["to"]) if op_type == "Cast" else _dtype(values[0])
        return output

    def constant(self, array: np.ndarray | float | list[int], dtype: ir.DataType) -> ir.Value:
        """Return a constant of a type."""
        name = f"{self.name}_constant_{len(self.nodes)}_{len(self.graph.initializers)}"
        value = ir.val(name, const_value=ir.tensor(np.asarray(array, dtype.numpy()), name=name))
        self.graph.register_initializer(value)
        return value

    def shape(self, *sizes: int) -> ir.Value:
        """Return a constant shape or list of axes."""
        return self.constant(list(sizes), ir.DataType.INT64)

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Return the value in a type; without a Cast where it has that type."""
        return value if _dtype(value) == dtype else self("Cast", value, to=int(dtype))

    def replace(self, value: ir.Value) -> None:
        """Replace the node by the collected nodes."""
        old = self.node.outputs[0]
        name = old.name
        ir.convenience.replace_nodes_and_values(self.graph, self.node, [self.node], self.nodes, [old], [value])
        value.name = name


def _group_norm(build: _NodeBuilder, node: ir.Node) -> ir.Value:
    """Normalise every group as a channel of an InstanceNormalization, then scale and shift the original channels."""
    x, scale, bias = build.inputs
    groups, epsilon = node.attributes.get_int("num_groups", 1), node.attributes.get_float("epsilon", 1e-5)
    sizes = _sizes(x)
    wide = build.cast(x, ir.DataType.FLOAT)
    if groups == sizes[1]:
        affine = [build.cast(parameter, ir.DataType.FLOAT) for parameter in (scale, bias)]
        return build.cast(build("InstanceNormalization", wide, *affine, epsilon=epsilon), build.type)
    grouped = build("Reshape", wide, build.shape(0, groups, -1))
    unit = [build.constant(np.full(groups, fill), ir.DataType.FLOAT) for fill in (1, 0)]
    normalised = build("InstanceNormalization", grouped, *unit, epsilon=epsilon)
    ungrouped = build.cast(build("Reshape", normalised, build.shape(0, *sizes[1:])), build.type)
    by_channel = build.shape(*range(1, len(sizes) - 1))
    scaled = build("Mul", ungrouped, build("Unsqueeze", scale, by_channel))
    return build("Add", scaled, build("Unsqueeze", bias, by_channel))


def _convolved_group_norm(build: _NodeBuilder, node: ir.Node) -> ir.Value:
    """Scale and shift each channel by 1 x 1 convolutions of the channels' moments, without a view of the groups.

    The variance is the mean of squares less the square of the mean, which loses digits where the mean is large; the
    accuracy gate judges it.
    """
    x, scale, bias = build.inputs
    sizes, groups = _sizes(x), node.attributes.get_int("num_groups", 1)
    if len(sizes) != 4 or groups == sizes[1] or scale.const_value is None or bias.const_value is None:
        return _group_norm(build, node)
    channels, pixels = sizes[1], sizes[2] * sizes[3]
    members = np.kron(np.eye(groups), np.ones((1, channels // groups)))  # (groups, channels)
    weights = members.T * scale.const_value.numpy().astype(np.float64)[:, None]
    to_groups, to_squares, to_channels = (
        build.constant(matrix[:, :, None, None], ir.DataType.FLOAT)
        for matrix in (members * (groups / channels), members * (groups / channels / pixels), weights)
    )
    offset = build.constant(bias.const_value.numpy().reshape(1, -1, 1, 1), ir.DataType.FLOAT)
    wide, axes = build.cast(x, ir.DataType.FLOAT), build.shape(2, 3)
    mean = build("Conv", build("ReduceMean", wide, axes, keepdims=1), to_groups)
    length = build("ReduceL2", wide, axes, keepdims=1)
    squares = build("Conv", build("Mul", length, length), to_squares)
    variance = build("Relu", build("Sub", squares, build("Mul", mean, mean)))
    inverse = build("Reciprocal", build("Sqrt", build("Add", variance, node.attributes.get_float("epsilon", 1e-5))))
    factor = build("Conv", inverse, to_channels)
    shift = build("Sub", offset, build("Conv", build("Mul", inverse, mean), to_channels))
    return build.cast(build("Add", build("Mul", wide, factor), shift), build.type)


def _rms_norm(build: _NodeBuilder, node: ir.Node) -> ir.Value:
    """Divide by the root mean square in float32, round to the tokens' type, then scale, as LLaMA does."""
    x, scale = build.inputs
    if node.attributes.get_int("axis", -1) not in (-1, len(_sizes(x)) - 1):
        raise MedsegError(f"{node.name} normalises more than the last axis, which has no decomposition")
    wide = build.cast(x, ir.DataType.FLOAT)
    mean = build("ReduceMean", build("Pow", wide, 2.0), build.shape(-1), keepdims=1)
    root = build("Sqrt", build("Add", mean, node.attributes.get_float("epsilon", 1e-5)))
    normalised = build("Mul", wide, build("Reciprocal", root))
    return build("Mul", build.cast(normalised, build.type), scale)


def _attention(build: _NodeBuilder, node: ir.Node) -> ir.Value:
    """Compute scaled scores, mask, softmax and weighted sum; queries of one key head are stacked to repeat no keys."""
    is_plain = node.attributes.get_int("qk_matmul_output_mode", 0) == 0
    is_plain = is_plain and not node.attributes.get_float("softcap", 0.0)
    if len(build.inputs) not in (3, 4) or len(node.outputs) != 1 or not is_plain or len(_sizes(build.inputs[0])) != 4:
        raise MedsegError(
            f"{node.name} is an Attention that is not plain queries, keys and values by head; it has no decomposition"
        )
    query, key, value, *mask = build.inputs
    _, heads, tokens, head_dim = _sizes(query)
    _, kv_heads, kv_tokens, _ = _sizes(key)
    stacked = heads // kv_heads
    if mask and (stacked > 1 or len(node.inputs) > 4):
        raise MedsegError(f"{node.name} is an Attention with a mask of shared keys; it has no decomposition")
    if stacked > 1:
        query = build("Reshape", query, build.shape(0, kv_heads, stacked * tokens, head_dim))
    scale = node.attributes.get_float("scale", head_dim**-0.5)
    scores = build("MatMul", build("Mul", query, scale), build("Transpose", key, perm=[0, 1, 3, 2]))
    for added in mask:
        scores = build("Add", scores, added)
    if node.attributes.get_int("is_causal", 0):
        later = np.triu(np.full((tokens, kv_tokens), -np.inf), 1)
        scores = build("Add", scores, build.constant(np.tile(later, (stacked, 1)), build.type))
    softmax_type = ir.DataType(node.attributes.get_int("softmax_precision", int(build.type)))
    weights = build.cast(build("Softmax", build.cast(scores, softmax_type), axis=-1), build.type)
    weighted_sum = build("MatMul", weights, value)
    if stacked == 1:
        return weighted_sum
    return build("Reshape", weighted_sum, build.shape(0, heads, tokens, _sizes(value)[3]))


def _gelu(build: _NodeBuilder, node: ir.Node) -> ir.Value:
    """Compute ``x / 2 * (1 + erf(x / sqrt(2)))``."""
    if node.attributes.get_string("approximate", "none") != "none":
        raise MedsegError(f"{node.name} is an approximate Gelu, which has no decomposition")
    (x,) = build.inputs
    return build("Mul", build("Mul", x, build("Add", build("Erf", build("Div", x, 2**0.5)), 1.0)), 0.5)


Decomposition = Callable[[_NodeBuilder, ir.Node], ir.Value]
DECOMPOSITIONS: Mapping[str, Decomposition] = {
    "GroupNormalization": _group_norm,
    "RMSNormalization": _rms_norm,
    "Attention": _attention,
    "Gelu": _gelu,
}


def _is_shape_arithmetic(node: ir.Node) -> bool:
    return all(value.dtype in (None, ir.DataType.INT64) for value in (*node.inputs, *node.outputs) if value is not None)


def _lowest_opset(graph: ir.Graph) -> int:
    """Return the first of ``PLAIN_OPSETS`` that supports the operator, attributes and types of every node."""
    objections = list[str]()
    for version in PLAIN_OPSETS:
        objections = [text for node in graph for text in _objections(node, version)]
        if not objections:
            return version
    raise MedsegError(f"the plain dialect has no operator set for {objections[0]}")


def _objections(node: ir.Node, version: int) -> list[str]:
    """List what operator set ``version`` lacks for a node; unknown attributes at their default are removed."""
    if node.domain or not onnx.defs.has(node.op_type, version, ""):
        return [f"{node.name}: {node.domain or 'ai.onnx'}.{node.op_type}"]
    schema = onnx.defs.get_schema(node.op_type, version, "")
    defaults = onnx.defs.get_schema(node.op_type, OPSET, "").attributes
    for name in [name for name in node.attributes if name not in schema.attributes]:
        default = ir.serde.deserialize_attribute(defaults[name].default_value) if name in defaults else None
        if default is None or default.value != node.attributes[name].value:
            return [f"{node.name}: {node.op_type} with {name}"]
        del node.attributes[name]
    unsupported = list[str]()
    for index, value in enumerate(node.inputs):
        formal = schema.inputs[min(index, len(schema.inputs) - 1)]
        if value is not None and value.dtype is not None:
            kind = f"tensor({value.dtype.name.lower()})"
            if kind not in formal.types:
                unsupported.append(f"{node.name}: {node.op_type} of {kind}")
    return unsupported


def _infer_missing_shapes(model: ir.Model) -> None:
    """Infer missing shapes with ONNX; known shapes stay, with the names of their axes."""
    values = [value for node in model.graph for value in node.outputs]
    known = [(value, value.shape, value.type) for value in values if value.shape is not None]
    ShapeInferencePass()(model)
    for value, shape, kind in known:
        value.shape, value.type = shape, kind


def _sizes(value: ir.Value) -> list[int]:
    """Return the shape, with 0 for a free axis."""
    return [size if isinstance(size, int) else 0 for size in value.shape or ()]


def _dtype(value: ir.Value | float) -> ir.DataType:
    assert isinstance(value, ir.Value)  # the first input of a node is never a number
    assert value.dtype is not None  # ``check`` requires it
    return value.dtype
