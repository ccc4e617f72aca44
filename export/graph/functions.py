"""The operators of domain ``medseg``, defined as ONNX functions of standard operators.

A back-end with a plugin of that name, namespace and version runs its kernel; other back-ends inline the body. No body
contains a matrix product or a convolution, because quantisers do not look inside functions.

Source: ONNX, "Functions" in IR.md; TensorRT, ``plugin_namespace`` and ``plugin_version``.
"""

from collections.abc import Mapping, Sequence

import onnx.parser
import onnx_ir as ir

from medseg_trt.errors import MedsegError
from medseg_trt.export.graph.onnx_graph import KEPT_METADATA, OPSET

DOMAIN, VERSION = "medseg", 1
PLUGIN: Mapping[str, str] = {
    "plugin_namespace": DOMAIN,
    "plugin_version": str(VERSION),
}  # without them TensorRT uses the body
PRODUCTS = frozenset(
    {"MatMul", "Gemm", "Conv", "ConvTranspose", "Attention", "Einsum", "LSTM", "GRU", "RNN"}
    | {"MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv"}
)

BODIES: Mapping[str, str] = {
    # Divided by the root mean square in float32, rounded to the type of x, then scaled, as LLaMA does.
    "RMSNorm": """
        RMSNorm <epsilon, plugin_namespace, plugin_version> (x, weight) => (y) {
            y = RMSNormalization <axis = -1, stash_type = 1, epsilon: float = @epsilon> (x, weight)
        }""",
    # The variance is that of the rounded sum.
    "AddRMSNorm": """
        AddRMSNorm <epsilon, plugin_namespace, plugin_version> (x, residual, weight) => (y, sum) {
            sum = Add (x, residual)
            y = RMSNormalization <axis = -1, stash_type = 1, epsilon: float = @epsilon> (sum, weight)
        }""",
    # qkv (batch, tokens, (num_heads + 2 num_kv_heads) head_dim), cos and sin (tokens, head_dim / 2) ->
    # q (batch, num_heads, tokens, head_dim), k and v (batch, num_kv_heads, tokens, head_dim), as Attention takes them.
    # Column i of a head is rotated with column i + head_dim / 2; interleaved pairs have no body. Angles and rotation
    # are float32 for any type of qkv; the result is rounded once.
    "Rotary": """
        Rotary <num_heads, num_kv_heads, interleaved, plugin_namespace, plugin_version> (qkv, cos, sin) => (q, k, v) {
            one = Constant <value_ints = [1]> ()
            same = Constant <value_ints = [0, 0]> ()
            rest = Constant <value_ints = [-1]> ()
            num_q_scalar = Constant <value_int: int = @num_heads> ()
            num_kv_scalar = Constant <value_int: int = @num_kv_heads> ()
            num_q = Reshape (num_q_scalar, one)
            num_kv = Reshape (num_kv_scalar, one)
            num_turned = Add (num_q, num_kv)
            num_all = Add (num_turned, num_kv)
            by_head = Concat <axis = 0> (same, num_all, rest)
            tokens_first = Reshape (qkv, by_head)
            heads = Transpose <perm = [0, 2, 1, 3]> (tokens_first)
            turned_and_v = Concat <axis = 0> (num_turned, num_kv)
            qk, v = Split <axis = 1> (heads, turned_and_v)
            wide = Cast <to = 1> (qk)
            first, second = Split <axis = -1, num_outputs = 2> (wide)
            first_cos = Mul (first, cos)
            second_sin = Mul (second, sin)
            new_first = Sub (first_cos, second_sin)
            second_cos = Mul (second, cos)
            first_sin = Mul (first, sin)
            new_second = Add (second_cos, first_sin)
            wide_turned = Concat <axis = -1> (new_first, new_second)
            turned = CastLike (wide_turned, qk)
            q_and_k = Concat <axis = 0> (num_q, num_kv)
            q, k = Split <axis = 1> (turned, q_and_k)
        }""",
    "SwiGLU": """
        SwiGLU <plugin_namespace, plugin_version> (gate_up) => (y) {
            gate, up = Split <axis = -1, num_outputs = 2> (gate_up)
            opening = Sigmoid (gate)
            silu = Mul (gate, opening)
            y = Mul (silu, up)
        }""",
    # The same with the output quantised as by QuantizeLinear: int8, one scale, no zero point. Kernels round only once.
    "QuantizedRMSNorm": """
        QuantizedRMSNorm <epsilon, scale, plugin_namespace, plugin_version> (x, weight) => (y) {
            float_y = RMSNormalization <axis = -1, stash_type = 1, epsilon: float = @epsilon> (x, weight)
            wide = Cast <to = 1> (float_y)
            step = Constant <value_float: float = @scale> ()
            y = QuantizeLinear <output_dtype = 3> (wide, step)
        }""",
    "QuantizedAddRMSNorm": """
        QuantizedAddRMSNorm <epsilon, scale, plugin_namespace, plugin_version> (x, residual, weight) => (y, sum) {
            sum = Add (x, residual)
            float_y = RMSNormalization <axis = -1, stash_type = 1, epsilon: float = @epsilon> (sum, weight)
            wide = Cast <to = 1> (float_y)
            step = Constant <value_float: float = @scale> ()
            y = QuantizeLinear <output_dtype = 3> (wide, step)
        }""",
    "QuantizedSwiGLU": """
        QuantizedSwiGLU <scale, plugin_namespace, plugin_version> (gate_up) => (y) {
            gate, up = Split <axis = -1, num_outputs = 2> (gate_up)
            opening = Sigmoid (gate)
            silu = Mul (gate, opening)
            product = Mul (silu, up)
            wide = Cast <to = 1> (product)
            step = Constant <value_float: float = @scale> ()
            y = QuantizeLinear <output_dtype = 3> (wide, step)
        }""",
    "QuantizedLayerNorm": """
        QuantizedLayerNorm <epsilon, scale, plugin_namespace, plugin_version> (x, weight, bias) => (y) {
            float_y = LayerNormalization <axis = -1, stash_type = 1, epsilon: float = @epsilon> (x, weight, bias)
            wide = Cast <to = 1> (float_y)
            step = Constant <value_float: float = @scale> ()
            y = QuantizeLinear <output_dtype = 3> (wide, step)
        }""",
}


def function(name: str) -> ir.Function:
    """Return the function of a key of ``BODIES``."""
    header = f'<domain: "{DOMAIN}", opset_import: ["": {OPSET}]>'
    body = ir.serde.deserialize_function(onnx.parser.parse_function(header + BODIES[name]))
    for node in body:
        node.name = f"{name}_{node.outputs[0].name}"
    return body


def call(
    name: str,
    inputs: Sequence[ir.Value],
    outputs: Sequence[ir.Value],
    attributes: Mapping[str, float | int],
    like: ir.Node,
) -> ir.Node:
    """Return a node of domain ``medseg``.

    Args:
        name: a key of ``BODIES``.
        inputs: in the order of the body.
        outputs: the values that the outputs replace; the outputs get their names, types and shapes.
        attributes: without those of ``PLUGIN``.
        like: a replaced node, whose module the node keeps.
    """
    values = [ir.Value(name=old.name, type=old.type, shape=old.shape) for old in outputs]
    return ir.node(
        name,
        inputs,
        {**attributes, **PLUGIN},
        domain=DOMAIN,
        outputs=values,
        name=f"{name}_{outputs[0].name}",
        metadata_props={key: value for key, value in like.metadata_props.items() if key == KEPT_METADATA},
    )


def attach(model: ir.Model) -> None:
    """Add the functions that the nodes of a model call, and remove all others of domain ``medseg``."""
    used = {node.op_type for node in model.graph if node.domain == DOMAIN}
    for identifier in [identifier for identifier in model.functions if identifier[0] == DOMAIN]:
        del model.functions[identifier]
    model.functions.update({(DOMAIN, name, ""): function(name) for name in sorted(used)})
    if used:
        model.opset_imports[DOMAIN] = VERSION
    else:
        model.opset_imports.pop(DOMAIN, None)


def check_functions(model: ir.Model) -> None:
    """Check that every ``medseg`` node runs with and without a plugin, and that no function contains a product.

    Raises:
        MedsegError: a function contains a matrix product or convolution, a node has no function, or a node does not
            name its plugin.
    """
    problems = list[str]()
    for identifier, body in model.functions.items():
        hidden = sorted({node.op_type for node in body.all_nodes()} & PRODUCTS)
        problems += [f"function {identifier[1]} holds {name}, which no quantiser would find" for name in hidden]
    for node in model.graph:
        if node.domain != DOMAIN:
            continue
        if node.op_identifier() not in model.functions:
            problems.append(f"{node.name} calls {node.op_type}, which has no body")
        if any(node.attributes.get_string(key) != value for key, value in PLUGIN.items()):
            problems.append(f"{node.name} does not name its plugin")
    if problems:
        raise MedsegError(f"the fused graph cannot be used: {'; '.join(problems[:3])}")
