"""The plain dialect, on the real folded tiny network and operator by operator, in ONNX Runtime and in OpenVINO."""

import subprocess
import sys
from collections import Counter
from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import onnx_ir as ir
import onnxruntime
import openvino
import pytest
from tiny import make_checkpoint

from medseg_trt.errors import MedsegError
from medseg_trt.export.fold.fold import fold
from medseg_trt.export.graph import dialects
from medseg_trt.export.graph.dialects import DIALECTS, derive, plain
from medseg_trt.export.graph.functions import DOMAIN, function
from medseg_trt.export.graph.fusions.fuse import fuse
from medseg_trt.export.graph.trace import KEPT_METADATA, OnnxGraph, trace
from medseg_trt.train.block.llama import LlamaBlock
from medseg_trt.train.checkpoint import load_checkpoint

SIZE = (32, 48)
RNG = np.random.default_rng(0)
# Logits of order 1 in float32, added up in another order: 1e-7 seen.
TOLERANCE = 1e-5
OPENVINO_OPTIONS = {
    "INFERENCE_PRECISION_HINT": "f32",
    "INFERENCE_NUM_THREADS": 1,
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # else it rounds the activations that meet four-bit weights
}


def run(graph: OnnxGraph, **feeds: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    model = ir.to_proto(graph.model).SerializeToString()
    (answer,) = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run(None, feeds)
    return np.asarray(answer)


def compiled(graph: OnnxGraph) -> openvino.CompiledModel:
    core = openvino.Core()
    model = core.read_model(ir.to_proto(graph.model).SerializeToString())
    return core.compile_model(model, "CPU", OPENVINO_OPTIONS)


def layer_types(model: openvino.CompiledModel) -> Counter[str]:
    """Count the kernels that OpenVINO chose."""
    nodes = model.get_runtime_model().get_ordered_ops()
    return Counter(node.get_rt_info()["layerType"].astype(str) for node in nodes)


def distance(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.abs(first - second).max())


def count(graph: OnnxGraph, *op_types: str) -> int:
    return sum(graph.num_nodes.get(op_type, 0) for op_type in op_types)


@pytest.fixture(scope="module")
def traced(tmp_path_factory) -> OnnxGraph:
    """Return the folded tiny network, with everything its block can have: rotary, a causal mask, two heads a key."""
    model = load_checkpoint(make_checkpoint(tmp_path_factory.mktemp("model"), size=SIZE)).model()
    for layer in model.modules():
        if isinstance(layer, LlamaBlock):
            layer.self_attn.spec = replace(layer.self_attn.spec, rotary=True, causal=True)
    return trace(fold(model)[0])


@pytest.fixture(scope="module")
def canonical(traced):
    return fuse(traced)[0]


@pytest.fixture(scope="module")
def flat(canonical):
    return derive("plain", canonical, SIZE, 3)


def test_every_dialect_computes_the_logits_of_the_traced_graph(traced, canonical):
    for batch in (1, 3):
        images = RNG.random((batch, 3, *SIZE), dtype=np.float32)
        expected = run(traced, pixel_values=images)
        for name in DIALECTS:
            assert distance(run(derive(name, canonical, SIZE, 3), pixel_values=images), expected) < TOLERANCE


def test_openvino_computes_the_logits_of_the_traced_graph_and_fuses_decompositions(traced, canonical, flat):
    model = compiled(flat)
    images = RNG.random((2, 3, *SIZE), dtype=np.float32)
    assert distance(model(images)[0], run(traced, pixel_values=images)) < TOLERANCE
    layers = layer_types(model)
    assert layers["RMS"] == count(canonical, "RMSNorm", "AddRMSNorm")
    assert layers["Subgraph"] == count(canonical, "Attention")  # OpenVINO's fused attention
    assert layers["MVN"] == count(canonical, "GroupNormalization", "LayerNormalization")
    assert not layers.keys() & {"Softmax", "MatMul", "Gelu", "ReduceMean", "Swish", "Math", "GroupNormalization"}


def test_convolved_group_norms_leave_no_mvn_and_no_view_of_groups(canonical):
    convolved = derive("convolved", canonical, SIZE, 3)
    layers = layer_types(compiled(convolved))
    per_channel = sum(  # of a shortcut, with as many groups as channels
        node.attributes.get_int("num_groups", 1) == node.inputs[0].shape[1]
        for node in canonical.model.graph
        if node.op_type == "GroupNormalization"
    )
    assert layers["MVN"] == count(canonical, "LayerNormalization") + per_channel
    assert count(convolved, "InstanceNormalization") == per_channel


@pytest.mark.parametrize("mean", [0.0, 10.0])
def test_a_convolved_group_norm_is_the_group_norm_in_float64(mean):
    """The variance as a difference of squares loses the digits of mean² / variance: at 10, some 100 roundings."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(2, 6, 4, 5)) + mean).astype(np.float32)
    scale, bias = rng.normal(size=(2, 6)).astype(np.float32)
    graph = small(
        "GroupNormalization",
        {"x": x, "scale": scale, "bias": bias},
        constants=("scale", "bias"),
        num_groups=3,
        epsilon=1e-6,
    )
    grouped = x.astype(np.float64).reshape(2, 3, -1)
    centred = grouped - grouped.mean(-1, keepdims=True)
    normalised = (centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + 1e-6)).reshape(x.shape)
    expected = normalised * scale[:, None, None] + bias[:, None, None]
    output = run(plain(graph, dialects._convolved_group_norm), x=x)  # pyright: ignore[reportPrivateUsage]
    assert distance(output, expected) < (1e-6 if mean == 0 else 1e-4)


def test_the_plain_dialect_is_of_the_lowest_operator_set(flat, canonical):
    assert flat.model.opset_imports == {"": 18}
    assert not flat.model.functions
    assert {node.domain for node in flat.model.graph} == {""}
    assert canonical.model.opset_imports == {"": 23, DOMAIN: 1}  # it is left as it was
    assert count(flat, "Conv") == count(canonical, "Conv")
    assert count(flat, "MatMul") == count(canonical, "MatMul") + 2 * count(canonical, "Attention")


def test_every_new_node_has_the_metadata_of_its_module(flat, canonical):
    known = {node.metadata_props[KEPT_METADATA] for node in canonical.model.graph}
    assert {node.metadata_props[KEPT_METADATA] for node in flat.model.graph} <= known


@pytest.mark.parametrize("dialect", list(DIALECTS))
def test_another_operator_set_than_the_dialects_is_refused(monkeypatch, canonical, dialect):
    def broken(graph):
        model = DIALECTS[dialect].derive(graph).model.clone()
        model.opset_imports[""] = 17
        return OnnxGraph(model=model)

    monkeypatch.setitem(DIALECTS, "broken", replace(DIALECTS[dialect], derive=broken))
    with pytest.raises(MedsegError, match="operator sets"):
        derive("broken", canonical, SIZE, 3)


def small(op_type: str, inputs, *, constants=(), opset=23, **attributes) -> OnnxGraph:
    """Return a graph of one node whose input values have a free batch; the answer is called y."""
    values = [
        ir.val(name, const_value=ir.tensor(array, name=name))
        if name in constants
        else ir.val(name, ir.DataType.from_numpy(array.dtype), ["batch", *array.shape[1:]])
        for name, array in inputs.items()
    ]
    first = values[0]
    y = ir.Value(name="y", shape=first.shape, type=first.type)
    node = ir.node(op_type, values, attributes, outputs=[y], name="only")
    free = [value for value in values if value.name not in constants]
    fixed = [value for value in values if value.name in constants]
    graph = ir.Graph(free, [y], nodes=[node], initializers=fixed, opset_imports={"": opset}, name="small")
    return OnnxGraph(model=ir.Model(graph, ir_version=10))


def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
    return (scale * RNG.normal(size=shape)).astype(np.float32)


def attention(heads: int, kv_heads: int):
    return {"q": normal(2, heads, 5, 8), "k": normal(2, kv_heads, 5, 8), "v": normal(2, kv_heads, 5, 8)}


CHANNELS = {"x": normal(2, 6, 5, 4, scale=0.01), "scale": normal(6), "bias": normal(6)}
DECOMPOSED = {
    "groups": ("GroupNormalization", CHANNELS, {"num_groups": 3, "epsilon": 1e-4}),
    "a group per channel": ("GroupNormalization", CHANNELS, {"num_groups": 6, "epsilon": 1e-4}),
    "rms norm": ("RMSNormalization", {"x": normal(2, 3, 8, scale=0.01), "scale": normal(8)}, {"epsilon": 1e-4}),
    "gelu": ("Gelu", {"x": normal(2, 99, scale=3)}, {"approximate": "none"}),
    "attention": ("Attention", attention(4, 4), {"is_causal": 0}),
    "grouped causal attention": ("Attention", attention(4, 2), {"is_causal": 1}),
    "scaled attention": ("Attention", attention(2, 2), {"scale": 2.0}),
}


def both(case: str) -> tuple[OnnxGraph, OnnxGraph, dict[str, np.ndarray]]:
    op_type, inputs, attributes = DECOMPOSED[case]
    constants = {name for name in inputs if name in ("scale", "bias")}
    graph = small(op_type, inputs, constants=constants, **attributes)
    return graph, plain(graph), {name: array for name, array in inputs.items() if name not in constants}


@pytest.mark.parametrize("case", list(DECOMPOSED))
def test_decomposed_operator_equals_the_original_in_onnxruntime_and_openvino(case):
    graph, spelled, feeds = both(case)
    assert spelled.model.opset_imports == {"": 18}
    assert not count(spelled, graph.model.graph[0].op_type)
    # Numbers of order 1 in float32, added up in another order.
    np.testing.assert_allclose(run(spelled, **feeds), run(graph, **feeds), atol=5e-6, rtol=0)
    np.testing.assert_allclose(compiled(spelled)(feeds)[0], run(graph, **feeds), atol=5e-6, rtol=0)


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("groups", {"epsilon": 1e-5}),
        ("groups", {"num_groups": 2}),
        ("a group per channel", {"epsilon": 1e-5}),
        ("rms norm", {"epsilon": 1e-5}),
        ("attention", {"is_causal": 1}),
        ("grouped causal attention", {"is_causal": 0}),
        ("scaled attention", {"scale": 1.0}),
    ],
)
def test_changed_operator_attribute_exceeds_the_decomposition_tolerance(case, change):
    graph, _, feeds = both(case)
    expected = run(graph, **feeds)
    graph.model.graph[0].attributes.update(
        {key: ir.convenience.convert_attribute(key, value) for key, value in change.items()}
    )
    assert distance(run(plain(graph), **feeds), expected) > 1e-3


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_norms_of_half_precision_are_computed_in_float32(dtype):
    tokens, weight = (300 * normal(2, 3, 8)).astype(dtype), np.ones(8, dtype)  # their squares overflow float16
    graph = small("RMSNormalization", {"x": tokens, "scale": weight}, constants=("scale",), epsilon=1e-6)
    spelled = plain(graph)
    assert {node.outputs[0].dtype for node in spelled.model.graph if node.op_type == "Pow"} == {ir.DataType.FLOAT}
    assert spelled.model.graph.outputs[0].dtype == ir.DataType.from_numpy(np.dtype(dtype))
    if dtype == np.float16:
        exact = tokens.astype(np.float64)
        exact /= np.sqrt((exact**2).mean(-1, keepdims=True))
        np.testing.assert_allclose(run(spelled, x=tokens), exact, rtol=1e-3)  # one rounding to float16 is 5e-4


QUANTISED = """
    <ir_version: 10, opset_import: ["": 23, "medseg": 1]>
    quantised (float[batch, 64] x) => (float[batch, 64] y) {{
        rounded = QuantizeLinear (x, step, zero)
        activation = DequantizeLinear (rounded, step, zero)
        decoded = DequantizeLinear <{attributes}> (codes, scales)
        matrix = Cast <to = 1> (decoded)
        product = MatMul (activation, matrix)
        y = medseg.RMSNorm <epsilon = 1e-6, plugin_namespace = "medseg", plugin_version = "1"> (product, weight)
    }}"""
STORED = {
    "int8": ("axis = 1", np.int8, normal(64) ** 2, 18),
    "int4 in blocks": ("axis = 0, block_size = 32", ml_dtypes.int4, normal(2, 64) ** 2, 21),
    "scales of half precision": ("axis = 1", np.int8, (normal(64) ** 2).astype(np.float16), 21),
}


def quantised(case: str) -> OnnxGraph:
    """Return x, rounded to eight bits, times a weight that is stored as codes, and a ``medseg`` norm after it."""
    attributes, dtype, scales, _ = STORED[case]
    model = onnx.parser.parse_model(QUANTISED.format(attributes=attributes))
    codes = RNG.integers(-7, 8, (64, 64)).astype(dtype)
    constants = {"codes": codes, "scales": scales, "step": np.float32(0.05), "zero": np.int8(0), "weight": normal(64)}
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()
    )
    model.functions.append(ir.to_proto(function("RMSNorm")))
    graph = OnnxGraph(model=ir.from_proto(onnx.shape_inference.infer_shapes(model)))
    graph.model.graph.sort()
    return graph


@pytest.mark.parametrize("case", list(STORED))
def test_a_quantised_graph_keeps_its_quantised_values_and_gets_an_operator_set_that_has_them(case):
    graph, x = quantised(case), normal(3, 64)
    spelled = plain(graph)
    assert spelled.model.opset_imports == {"": STORED[case][-1]}
    for op_type in ("QuantizeLinear", "DequantizeLinear", "MatMul"):
        assert count(spelled, op_type) == count(graph, op_type)
    assert spelled.model.graph.initializers["codes"].const_value is graph.model.graph.initializers["codes"].const_value
    expected = run(graph, x=x)
    np.testing.assert_allclose(run(spelled, x=x), expected, atol=1e-5, rtol=0)  # normalised, so of order 1
    # OpenVINO sums integers, and does not round a decoded weight to half precision: 2**-11 of every product.
    atol = 5e-3 if "half" in case else 1e-4
    np.testing.assert_allclose(compiled(spelled)(x)[0], expected, atol=atol, rtol=0)


def test_an_operator_without_a_decomposition_is_refused():
    graph = small("Swish", {"x": normal(2, 8)}, opset=24)
    with pytest.raises(MedsegError, match=r"no operator set for only: ai\.onnx\.Swish"):
        plain(graph)


def test_an_attention_with_other_inputs_is_refused():
    with pytest.raises(MedsegError, match="not plain queries, keys and values by head"):
        plain(small("Attention", attention(2, 2), softcap=5.0))


def test_openvino_runs_a_decomposed_group_norm(tmp_path):
    """OpenVINO 2026.4.1 crashes where it adds two native GroupNormalizations of 256 channels and 64 x 64 pixels."""
    x = ir.val("x", ir.DataType.FLOAT, ["batch", 64, 64, 64])
    nodes, initializers, branches = [], [], []
    for name, groups in (("a", 32), ("b", 256)):
        constants = {"kernel": normal(256, 64, 1, 1), "scale": normal(256), "bias": normal(256)}
        c = {key: ir.val(key + name, const_value=ir.tensor(array, name=key + name)) for key, array in constants.items()}
        initializers += c.values()
        nodes.append(ir.node("Conv", [x, c["kernel"]], name=f"conv{name}"))
        nodes.append(
            ir.node(
                "GroupNormalization",
                [nodes[-1].outputs[0], c["scale"], c["bias"]],
                {"num_groups": groups},
                name=f"norm{name}",
            )
        )
        branches.append(nodes[-1].outputs[0])
    nodes.append(ir.node("Add", branches, name="sum"))
    for index, node in enumerate(nodes):
        node.outputs[0].name = f"value{index}"
        node.outputs[0].shape, node.outputs[0].dtype = ir.Shape(["batch", 256, 64, 64]), ir.DataType.FLOAT
    graph = ir.Graph([x], [nodes[-1].outputs[0]], nodes=nodes, initializers=initializers, opset_imports={"": 23})
    native = OnnxGraph(model=ir.Model(graph, ir_version=10))
    ir.save(plain(native).model, tmp_path / "plain.onnx")
    image = normal(1, 64, 64, 64)
    np.save(tmp_path / "x.npy", image)
    program = """if True:
        import sys, numpy, openvino
        options = {"INFERENCE_PRECISION_HINT": "f32"}
        model = openvino.Core().compile_model(sys.argv[1] + "/plain.onnx", "CPU", options)
        numpy.save(sys.argv[1] + "/y.npy", model(numpy.load(sys.argv[1] + "/x.npy"))[0])
    """
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, timeout=60)
    # Sums of 64 products of order 1, normalised and scaled by numbers up to 3.
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), run(native, x=image), atol=1e-4, rtol=0)
