"""The forms in which a network is written: the same function, in the operators that each kind of back-end takes.

``canonical`` is what ``fuse`` and the precision schemes made: operator set 23 and the nodes of domain ``medseg``.
``plain`` says the same with operators that OpenVINO and TensorRT 10.3 know: functions inlined, and every operator that
is younger than the target set spelled out, in the forms that OpenVINO recognises and fuses again.

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

PLAIN_OPSETS = (18, 21)  # the lowest that can say it is taken; 21 brings int4, blocks and float16 to DequantizeLinear
LARGEST_FOLDED = 64  # elements: the arithmetic on shapes, never a weight


@dataclass(frozen=True, kw_only=True, slots=True)
class Dialect:
    """How a flavour is made from the canonical graph, and what it may consist of."""

    derive: Callable[[OnnxGraph], OnnxGraph]
    opsets: tuple[Mapping[str, int], ...]  # one of these, exactly


def plain(graph: OnnxGraph) -> OnnxGraph:
    """Return the graph in operators of set 18, or 21 where its types need it; it shares its tensors.

    Raises:
        MedsegError: an operator that neither set has and that nothing here spells out.
    """
    model = graph.model.clone()
    InlinePass()(model)
    model.opset_imports.pop(DOMAIN, None)
    fold_constants(
        model,
        input_size_limit=LARGEST_FOLDED,
        output_size_limit=LARGEST_FOLDED,
        should_fold=lambda node: None if _is_shape_arithmetic(node) else False,
    )
    for node in [node for node in model.graph if node.op_type in SPELLED and node.domain == ""]:
        spelling = _Spelling(model.graph, node)
        spelling.replace(SPELLED[node.op_type](spelling, node))
    RemoveUnusedNodesPass()(model)
    model.opset_imports[""] = _lowest_opset(model.graph)
    _infer_missing_shapes(model)
    return OnnxGraph(model=model)


DIALECTS: Mapping[str, Dialect] = {
    "canonical": Dialect(derive=lambda graph: graph, opsets=({"": OPSET}, {"": OPSET, DOMAIN: VERSION})),
    "plain": Dialect(derive=plain, opsets=tuple({"": version} for version in PLAIN_OPSETS)),
}


def derive(flavour: str, graph: OnnxGraph, image_size: tuple[int, int], num_classes: int) -> OnnxGraph:
    """Return a canonical graph in another flavour, checked.

    Args:
        flavour: a key of ``DIALECTS``.
        graph: the canonical one.
        image_size: height and width in pixels.
        num_classes: channels of the logits.

    Raises:
        MedsegError: the outcome has a doubled name, an unknown shape, an operator set that is not the flavour's, or a
            function that hides a matrix product.
    """
    derived = DIALECTS[flavour].derive(graph)
    check(derived, image_size, num_classes, opsets=DIALECTS[flavour].opsets)
    check_functions(derived.model)
    return derived


class _Spelling:
    """Collects the nodes that say what one node says; they keep its module and derive their names from its own."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self.graph, self.node, self.nodes = graph, node, list[ir.Node]()
        self.name = node.outputs[0].name
        self.inputs = [value for value in node.inputs if value is not None]
        self.type = _dtype(self.inputs[0])

    def __call__(self, op_type: str, *inputs: ir.Value | float, **attributes: int | float | list[int]) -> ir.Value:
        """Add a node and return its value; a number becomes a constant of the type of the first input."""
        values = [each if isinstance(each, ir.Value) else self.constant(each, _dtype(inputs[0])) for each in inputs]
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
        """Return the value in a type, which may be its own."""
        return value if _dtype(value) == dtype else self("Cast", value, to=int(dtype))

    def replace(self, value: ir.Value) -> None:
        """Put the collected nodes in the place of the node."""
        old = self.node.outputs[0]
        name = old.name
        ir.convenience.replace_nodes_and_values(self.graph, self.node, [self.node], self.nodes, [old], [value])
        value.name = name


def _group_norm(spell: _Spelling, node: ir.Node) -> ir.Value:
    """Normalise every group as one channel of an InstanceNormalization, then scale and shift the real channels."""
    x, scale, bias = spell.inputs
    groups, epsilon = node.attributes.get_int("num_groups", 1), node.attributes.get_float("epsilon", 1e-5)
    sizes = _sizes(x)
    wide = spell.cast(x, ir.DataType.FLOAT)
    if groups == sizes[1]:
        affine = [spell.cast(each, ir.DataType.FLOAT) for each in (scale, bias)]
        return spell.cast(spell("InstanceNormalization", wide, *affine, epsilon=epsilon), spell.type)
    grouped = spell("Reshape", wide, spell.shape(0, groups, -1))
    unit = [spell.constant(np.full(groups, fill), ir.DataType.FLOAT) for fill in (1, 0)]
    normalised = spell("InstanceNormalization", grouped, *unit, epsilon=epsilon)
    back = spell.cast(spell("Reshape", normalised, spell.shape(0, *sizes[1:])), spell.type)
    by_channel = spell.shape(*range(1, len(sizes) - 1))
    scaled = spell("Mul", back, spell("Unsqueeze", scale, by_channel))
    return spell("Add", scaled, spell("Unsqueeze", bias, by_channel))


def _rms_norm(spell: _Spelling, node: ir.Node) -> ir.Value:
    """Divide by the root mean square in float32, round to the tokens' type, then scale: LLaMA's order."""
    x, scale = spell.inputs
    if node.attributes.get_int("axis", -1) not in (-1, len(_sizes(x)) - 1):
        raise MedsegError(f"{node.name} normalises more than the last axis, which no flavour spells out")
    wide = spell.cast(x, ir.DataType.FLOAT)
    mean = spell("ReduceMean", spell("Pow", wide, 2.0), spell.shape(-1), keepdims=1)
    root = spell("Sqrt", spell("Add", mean, node.attributes.get_float("epsilon", 1e-5)))
    normalised = spell("Mul", wide, spell("Reciprocal", root))
    return spell("Mul", spell.cast(normalised, spell.type), scale)


def _attention(spell: _Spelling, node: ir.Node) -> ir.Value:
    """Scaled scores, mask, softmax, weighted sum; queries that share a key head are stacked, so no key is repeated."""
    plain_form = node.attributes.get_int("qk_matmul_output_mode", 0) == 0 and not node.attributes.get_float(
        "softcap", 0.0
    )
    if len(spell.inputs) != 3 or len(node.outputs) != 1 or not plain_form or len(_sizes(spell.inputs[0])) != 4:
        raise MedsegError(f"{node.name} is an attention of another form than queries, keys and values by head")
    query, key, value = spell.inputs
    _, heads, tokens, head_dim = _sizes(query)
    _, kv_heads, kv_tokens, _ = _sizes(key)
    stacked = heads // kv_heads
    if stacked > 1:
        query = spell("Reshape", query, spell.shape(0, kv_heads, stacked * tokens, head_dim))
    scale = node.attributes.get_float("scale", head_dim**-0.5)
    scores = spell("MatMul", spell("Mul", query, scale), spell("Transpose", key, perm=[0, 1, 3, 2]))
    if node.attributes.get_int("is_causal", 0):
        later = np.triu(np.full((tokens, kv_tokens), -np.inf), 1)
        scores = spell("Add", scores, spell.constant(np.tile(later, (stacked, 1)), spell.type))
    softmax_type = ir.DataType(node.attributes.get_int("softmax_precision", int(spell.type)))
    shares = spell.cast(spell("Softmax", spell.cast(scores, softmax_type), axis=-1), spell.type)
    collected = spell("MatMul", shares, value)
    return spell("Reshape", collected, spell.shape(0, heads, tokens, _sizes(value)[3])) if stacked > 1 else collected


def _gelu(spell: _Spelling, node: ir.Node) -> ir.Value:
    """``x / 2 * (1 + erf(x / sqrt(2)))``."""
    if node.attributes.get_string("approximate", "none") != "none":
        raise MedsegError(f"{node.name} is an approximate Gelu, which no flavour spells out")
    (x,) = spell.inputs
    return spell("Mul", spell("Mul", x, spell("Add", spell("Erf", spell("Div", x, 2**0.5)), 1.0)), 0.5)


SPELLED: Mapping[str, Callable[[_Spelling, ir.Node], ir.Value]] = {
    "GroupNormalization": _group_norm,
    "RMSNormalization": _rms_norm,
    "Attention": _attention,
    "Gelu": _gelu,
}


def _is_shape_arithmetic(node: ir.Node) -> bool:
    return all(value.dtype in (None, ir.DataType.INT64) for value in (*node.inputs, *node.outputs) if value is not None)


def _lowest_opset(graph: ir.Graph) -> int:
    """Return the first of ``PLAIN_OPSETS`` that has every node as it is: operator, attributes and types."""
    objections = list[str]()
    for version in PLAIN_OPSETS:
        objections = [text for node in graph for text in _objections(node, version)]
        if not objections:
            return version
    raise MedsegError(f"the plain flavour has no operator set for {objections[0]}")


def _objections(node: ir.Node, version: int) -> list[str]:
    """Say what operator set ``version`` does not know about a node; attributes at their default are dropped first."""
    if node.domain or not onnx.defs.has(node.op_type, version, ""):
        return [f"{node.name}: {node.domain or 'ai.onnx'}.{node.op_type}"]
    schema = onnx.defs.get_schema(node.op_type, version, "")
    defaults = onnx.defs.get_schema(node.op_type, OPSET, "").attributes
    for name in [name for name in node.attributes if name not in schema.attributes]:
        default = ir.serde.deserialize_attribute(defaults[name].default_value) if name in defaults else None
        if default is None or default.value != node.attributes[name].value:
            return [f"{node.name}: {node.op_type} with {name}"]
        del node.attributes[name]
    found = list[str]()
    for index, value in enumerate(node.inputs):
        formal = schema.inputs[min(index, len(schema.inputs) - 1)]
        if value is not None and value.dtype is not None:
            kind = f"tensor({value.dtype.name.lower()})"
            if kind not in formal.types:
                found.append(f"{node.name}: {node.op_type} of {kind}")
    return found


def _infer_missing_shapes(model: ir.Model) -> None:
    """Let ONNX infer the shapes that are missing; those that are known stay, with the names of their axes."""
    values = [value for node in model.graph for value in node.outputs]
    known = [(value, value.shape, value.type) for value in values if value.shape is not None]
    ShapeInferencePass()(model)
    for value, shape, kind in known:
        value.shape, value.type = shape, kind


def _sizes(value: ir.Value) -> list[int]:
    """Return the shape, with 0 for an axis that is free."""
    return [size if isinstance(size, int) else 0 for size in value.shape or ()]


def _dtype(value: ir.Value | float) -> ir.DataType:
    assert isinstance(value, ir.Value)  # the first input of a node is never a number
    assert value.dtype is not None  # ``check`` asks for it
    return value.dtype
