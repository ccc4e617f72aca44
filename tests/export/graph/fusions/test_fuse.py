"""Fusing, on the real folded tiny network and on graphs that were broken on purpose."""

from dataclasses import replace

import numpy as np
import onnx
import onnx.helper
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from tiny import make_checkpoint

from medseg_trt.errors import MedsegError
from medseg_trt.export.fold.fold import fold
from medseg_trt.export.graph.dialects import DIALECTS, derive, plain
from medseg_trt.export.graph.functions import BODIES, DOMAIN, PLUGIN, check_functions, function
from medseg_trt.export.graph.fusions.fuse import RULES, fuse
from medseg_trt.export.graph.fusions.fusion_result import FusionResult
from medseg_trt.export.graph.trace import OnnxGraph, check, trace
from medseg_trt.train.block.llama import LlamaBlock
from medseg_trt.train.checkpoint import load_checkpoint
from medseg_trt.train.models.segmentation_model import SegmentationModel

SIZE = (32, 48)
IMAGES = np.random.default_rng(0).random((3, 3, *SIZE), dtype=np.float32)
# Logits of order 1 in float32: a fused node adds up in another order than the traced ones. 1e-7 seen.
TOLERANCE = 1e-5
OPSETS = DIALECTS["canonical"].opsets


def run(graph: OnnxGraph, **feeds: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        ir.to_proto(graph.model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    (answer,) = session.run(None, feeds or {"pixel_values": IMAGES})
    return np.asarray(answer)


def distance(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.abs(first - second).max())


def counts_of(results: dict[str, FusionResult]) -> dict[str, int]:
    return {rule: result.count for rule, result in results.items()}


def calls(graph: OnnxGraph, name: str) -> list[ir.Node]:
    return [node for node in graph.model.graph if node.domain == DOMAIN and node.op_type == name]


def edited(graph: OnnxGraph) -> OnnxGraph:
    """Return a copy that a test may break."""
    return OnnxGraph(model=graph.model.clone())


def folded(folder, *, rotary: bool) -> SegmentationModel:
    """Return the folded tiny network, whose block has four heads and two of keys; rotary comes with the causal mask."""
    model = load_checkpoint(make_checkpoint(folder, size=SIZE)).model()
    for layer in model.modules():
        if isinstance(layer, LlamaBlock):
            layer.self_attn.spec = replace(layer.self_attn.spec, rotary=rotary, causal=rotary)
    return fold(model)[0]


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return folded(tmp_path_factory.mktemp("rotary"), rotary=True)


@pytest.fixture(scope="module")
def traced(network) -> OnnxGraph:
    return trace(network)


@pytest.fixture(scope="module")
def fused(traced) -> OnnxGraph:
    return fuse(traced)[0]


@pytest.fixture(scope="module")
def expected(traced):
    return run(traced)


def test_every_rule_matches_the_nodes_of_the_network(traced):
    graph, results = fuse(traced)
    counts = counts_of(results)
    assert list(counts) == list(RULES)
    assert counts == {"add_rms_norms": 1, "rms_norms": 0, "rotary_embeddings": 1, "swiglus": 1, "attentions": 3}
    assert not graph.num_nodes.keys() & {"RMSNormalization", "Sigmoid", "Neg", "ConstantOfShape", "Shape"}


def test_the_published_network_has_no_rotary_embedding(tmp_path):
    network = folded(tmp_path, rotary=False)
    graph, results = fuse(trace(network))
    counts = counts_of(results)
    assert counts == {"add_rms_norms": 1, "rms_norms": 0, "rotary_embeddings": 0, "swiglus": 1, "attentions": 3}
    with torch.inference_mode():
        expected = network(torch.from_numpy(IMAGES)).numpy()
    for dialect in DIALECTS:
        assert distance(run(derive(dialect, graph, SIZE, 3)), expected) < TOLERANCE


def test_fusion_rule_without_matches_reports_its_reason(tmp_path):
    _, results = fuse(trace(folded(tmp_path, rotary=False)))
    assert {rule: result.reason for rule, result in results.items() if not result.count} == {
        "rms_norms": "no RMSNormalization over the last axis with one weight per column is left",
        "rotary_embeddings": "of the 3 Attention nodes, none has queries and keys that are rotated as Rotary does",
    }
    empty = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 23}, name="empty"), ir_version=10)
    _, results = fuse(OnnxGraph(model=empty))
    assert {rule: result.reason for rule, result in results.items()} == {
        "add_rms_norms": "the graph has no RMSNormalization over the last axis with one weight per column",
        "rms_norms": "no RMSNormalization over the last axis with one weight per column is left",
        "rotary_embeddings": "the graph has no Attention",
        "swiglus": "the graph has no silu(gate) * up whose gate and up are the two halves of one tensor",
        "attentions": "the graph has no Attention",
    }


@pytest.mark.parametrize(("count", "reason"), [(0, ""), (1, "a reason"), (-1, "")])
def test_a_result_has_either_a_count_or_a_reason(count, reason):
    with pytest.raises(ValueError, match="cannot give"):
        FusionResult(count=count, reason=reason)


def test_the_fused_network_computes_the_same_logits(network, fused, expected):
    assert distance(run(fused), expected) < TOLERANCE
    with torch.inference_mode():
        assert distance(network(torch.from_numpy(IMAGES)).numpy(), expected) < TOLERANCE


def test_fusing_does_not_change_the_traced_graph(traced, fused, expected):
    assert not traced.model.functions
    assert not calls(traced, "SwiGLU")
    np.testing.assert_array_equal(run(traced), expected)


def test_every_node_names_its_plugin_and_its_module(fused):
    check(fused, SIZE, 3, opsets=OPSETS)
    called = [node for name in BODIES for node in calls(fused, name)]
    assert {name for _, name, _ in fused.model.functions} == {node.op_type for node in called}
    for node in called:
        assert {key: node.attributes.get_string(key) for key in PLUGIN} == dict(PLUGIN)
        assert "insert" in node.metadata_props["namespace"]
        assert None not in [size for value in node.outputs for size in value.shape or [None]]
    for node in calls(fused, "Rotary"):
        assert [node.attributes.get_int(key) for key in ("num_heads", "num_kv_heads", "interleaved")] == [4, 2, 0]
        assert [list(value.shape or [])[1:] for value in node.outputs] == [[4, 6, 16], [2, 6, 16], [2, 6, 16]]
        assert [list(value.shape or []) for value in node.inputs[1:] if value] == [[6, 8], [6, 8]]


def wrong_epsilon(graph):
    for node in (*calls(graph, "RMSNorm"), *calls(graph, "AddRMSNorm")):
        node.attributes.add(ir.AttrFloat32("epsilon", 0.1))


def residual_left_out(graph):
    for node in calls(graph, "AddRMSNorm"):
        node.replace_input_with(0, node.inputs[1])


def gate_and_up_swapped(graph):
    body = BODIES["SwiGLU"].replace("gate, up = Split", "up, gate = Split")
    replace_function(graph, "SwiGLU", body)


def turned_the_other_way(graph):
    for node in calls(graph, "Rotary"):
        sin = node.inputs[2]
        assert sin is not None
        assert sin.const_value is not None
        sin.const_value = ir.tensor(-sin.const_value.numpy(), name=sin.name)


def heads_of_query_and_key_confused(graph):
    body = BODIES["Rotary"].replace("(num_q, num_kv)\n            q, k", "(num_kv, num_q)\n            k, q")
    replace_function(graph, "Rotary", body)


def replace_function(graph, name, body):
    header = f'<domain: "{DOMAIN}", opset_import: ["": 23]>'
    graph.model.functions[DOMAIN, name, ""] = ir.serde.deserialize_function(onnx.parser.parse_function(header + body))


@pytest.mark.parametrize(
    "fault",
    [wrong_epsilon, residual_left_out, gate_and_up_swapped, turned_the_other_way, heads_of_query_and_key_confused],
)
def test_faulty_fused_graph_exceeds_the_tolerance(fused, expected, fault):
    broken = edited(fused)
    fault(broken)
    assert distance(run(broken), expected) > 10 * TOLERANCE


def producer_of(graph, op_type):
    return next(node for node in graph.model.graph if node.op_type == op_type)


def swap_halves(graph):
    """Make silu(up) * gate of silu(gate) * up."""
    first, second = producer_of(graph, "Sigmoid").inputs[0].producer().outputs
    uses = [(use.node, use.idx, other) for one, other in ((first, second), (second, first)) for use in one.uses()]
    for node, index, other in uses:
        node.replace_input_with(index, other)


def drop_the_sign(graph):
    for node in [node for node in graph.model.graph if node.op_type == "Neg"]:
        ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])


def norm_another_axis(graph):
    for node in [node for node in graph.model.graph if node.op_type == "RMSNormalization"]:
        node.attributes.add(ir.AttrInt64("axis", 1))


def change_one_angle(graph):
    for value in graph.model.graph.initializers.values():
        if list(value.shape or []) == [6, 16]:
            table = value.const_value.numpy().copy()
            table[1, -1] += 0.1
            value.const_value = ir.tensor(table, name=value.name)


@pytest.mark.parametrize(
    ("edit", "rule"),
    [
        (swap_halves, "swiglus"),
        (drop_the_sign, "rotary_embeddings"),
        (change_one_angle, "rotary_embeddings"),
        (norm_another_axis, "add_rms_norms"),
    ],
)
def test_a_pattern_that_differs_in_any_part_is_not_fused(traced, edit, rule):
    other = edited(traced)
    edit(other)
    fused_other, results = fuse(other)
    assert results[rule].count == 0
    assert results[rule].reason
    if edit is not norm_another_axis:  # no runtime takes a scale of another shape
        assert distance(run(fused_other), run(other)) < TOLERANCE


def test_check_functions_refuses_a_matmul_inside_a_function_body(fused):
    broken = edited(fused)
    replace_function(broken, "SwiGLU", "SwiGLU (gate_up) => (y) { y = MatMul (gate_up, gate_up) }")
    with pytest.raises(MedsegError, match="function SwiGLU holds MatMul"):
        check_functions(broken.model)


def test_a_call_without_a_body_is_caught(fused):
    broken = edited(fused)
    del broken.model.functions[DOMAIN, "SwiGLU", ""]
    with pytest.raises(MedsegError, match="SwiGLU, which has no body"):
        check_functions(broken.model)


def test_check_functions_refuses_a_call_without_plugin_namespace(fused):
    broken = edited(fused)
    del calls(broken, "SwiGLU")[0].attributes["plugin_namespace"]
    with pytest.raises(MedsegError, match="does not name its plugin"):
        check_functions(broken.model)


def test_check_refuses_two_nodes_with_the_same_name(fused):
    broken = edited(fused)
    calls(broken, "SwiGLU")[0].name = calls(broken, "AddRMSNorm")[0].name
    with pytest.raises(MedsegError, match="2 nodes are called"):
        check(broken, SIZE, 3, opsets=OPSETS)


def one_call(name, inputs, outputs, attributes, dtype=onnx.TensorProto.FLOAT) -> onnx.ModelProto:
    node = onnx.helper.make_node(name, [*inputs], outputs, domain=DOMAIN, **attributes)
    graph = onnx.helper.make_graph(
        [node],
        "one call",
        [onnx.helper.make_tensor_value_info(key, dtype, array.shape) for key, array in inputs.items()],
        [onnx.helper.make_tensor_value_info(key, dtype, None) for key in outputs],
    )
    imports = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid(DOMAIN, 1)]
    return onnx.helper.make_model(graph, functions=[ir.to_proto(function(name))], opset_imports=imports, ir_version=10)


def answers(model: onnx.ModelProto, inputs) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [np.asarray(output) for output in session.run(None, inputs)]


@pytest.mark.parametrize("scale", [1.0, 1e-3])  # small rows tell where eps is added
def test_the_norms_agree_with_float64(scale):
    rng = np.random.default_rng(0)
    x, residual = (scale * rng.normal(size=(2, 5, 33)).astype(np.float32) for _ in range(2))
    weight = rng.normal(size=33).astype(np.float32)
    inputs = {"x": x, "residual": residual, "weight": weight}
    y, total = answers(one_call("AddRMSNorm", inputs, ["y", "sum"], {"epsilon": 1e-6}), inputs)
    np.testing.assert_array_equal(total, x + residual)
    exact = total.astype(np.float64)
    exact = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-6) * weight
    np.testing.assert_allclose(y, exact, rtol=4e-6)  # a sum of 33 squares, a root and two products in float32
    inputs = {"x": total, "weight": weight}
    np.testing.assert_array_equal(answers(one_call("RMSNorm", inputs, ["y"], {"epsilon": 1e-6}), inputs)[0], y)


def test_swiglu_agrees_with_float64():
    gate_up = np.random.default_rng(0).normal(0, 3, (2, 5, 14)).astype(np.float32)
    (y,) = answers(one_call("SwiGLU", {"gate_up": gate_up}, ["y"], {}), {"gate_up": gate_up})
    gate, up = np.split(gate_up.astype(np.float64), 2, -1)
    # ONNX Runtime's sigmoid is a rational approximation: 3e-6 seen.
    np.testing.assert_allclose(y, gate / (1 + np.exp(-gate)) * up, rtol=1e-5)


def test_rotary_turns_the_plane_of_columns_i_and_i_plus_half():
    heads, kv_heads, half, tokens = 4, 2, 3, 5
    rng = np.random.default_rng(0)
    qkv = rng.normal(size=(2, tokens, (heads + 2 * kv_heads) * 2 * half)).astype(np.float32)
    angles = rng.normal(size=(tokens, half))
    inputs = {"qkv": qkv, "cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}
    attributes = {"num_heads": heads, "num_kv_heads": kv_heads, "interleaved": 0}
    q, k, v = answers(one_call("Rotary", inputs, ["q", "k", "v"], attributes), inputs)
    by_head = qkv.astype(np.float64).reshape(2, tokens, -1, 2 * half).swapaxes(1, 2)
    as_complex = (by_head[..., :half] + 1j * by_head[..., half:]) * np.exp(1j * angles)
    turned = np.concatenate([as_complex.real, as_complex.imag], -1)
    # A rotation of numbers of order 1 in float32; where two products cancel, a relative limit would be too tight.
    np.testing.assert_allclose(q, turned[:, :heads], atol=1e-6, rtol=0)
    np.testing.assert_allclose(k, turned[:, heads : heads + kv_heads], atol=1e-6, rtol=0)
    np.testing.assert_array_equal(v, by_head[:, heads + kv_heads :].astype(np.float32))


def test_the_norm_is_rounded_before_it_is_scaled_and_takes_the_variance_of_the_rounded_sum():
    rng = np.random.default_rng(0)
    inputs = {
        name: rng.normal(size=size).astype(np.float16)
        for name, size in (("x", (64, 32)), ("residual", (64, 32)), ("weight", (32,)))
    }
    model = one_call("AddRMSNorm", inputs, ["y", "sum"], {"epsilon": 1e-6}, onnx.TensorProto.FLOAT16)
    graph = OnnxGraph(model=ir.from_proto(model))
    for value, old in zip(graph.model.graph.outputs, inputs.values(), strict=False):
        value.shape = ir.Shape(old.shape)
    # The definition of RMSNormalization, as the plain dialect decomposes it: ONNX's reference computes it in float16.
    answer = ReferenceEvaluator(ir.to_proto(plain(graph).model)).run(None, inputs)
    y, total = (np.asarray(output) for output in answer)
    assert total.dtype == y.dtype == np.float16
    np.testing.assert_array_equal(total, inputs["x"] + inputs["residual"])
    wide = total.astype(np.float64)
    normalised = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6)
    in_order = normalised.astype(np.float16) * inputs["weight"]
    rounded_once = (normalised * inputs["weight"]).astype(np.float16)
    assert (y == in_order).mean() > 0.999  # float32 instead of float64 before the first rounding may tip a tie
    assert (y == rounded_once).mean() < 0.9
