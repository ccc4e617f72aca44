"""A node of the graph and its kernel are the same thing: names, order, attributes, shapes, and what is computed."""

import dataclasses
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from gpu_free.execute import execute, ptx_of
from onnx import TensorProto, helper

from medseg_trt.export.graph import functions
from medseg_trt.export.graph.functions import BODIES, PLUGIN
from medseg_trt.kernels import KERNELS, load
from medseg_trt.kernels.kernel import C_TYPES, DTYPES, Array, float_bits, pointer
from medseg_trt.kernels.nodes import NAMESPACE, NODES, RULES, VERSION, Node, split

ONNX_TYPES = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16, "float32": TensorProto.FLOAT}
ATTRIBUTES: dict[str, dict[str, int | float]] = {
    name: {"epsilon": 1e-6, "scale": 0.03, "num_heads": 3, "num_kv_heads": 1, "interleaved": 0} for name in NODES
}


def attributes_of(node: Node) -> dict[str, int | float]:
    return {name: value for name, value in ATTRIBUTES[node.name].items() if name in node.attributes}


def declaration(name: str) -> onnx.FunctionProto:
    """Return a node as the graph declares it."""
    return functions.ir.to_proto(functions.function(name))


def differences(node: Node, declared: onnx.FunctionProto) -> list[str]:
    """Say in which the kernel and the graph's node are not the same."""
    read, written = split(node.entry("float16", attributes_of(node)))
    pairs = {
        "domain": (NAMESPACE, declared.domain),
        "inputs": ([parameter.name for parameter in read], list(declared.input)),
        "outputs": ([parameter.name for parameter in written], list(declared.output)),
        "attributes": ({*node.attributes, *PLUGIN}, {*declared.attribute}),
    }
    return [f"{aspect}: {kernel} is not {graph}" for aspect, (kernel, graph) in pairs.items() if kernel != graph]


def test_every_node_of_the_graph_has_a_kernel_and_every_rule_a_node():
    assert NODES.keys() == BODIES.keys()
    assert PLUGIN == {"plugin_namespace": NAMESPACE, "plugin_version": VERSION}
    assert {node.rule for node in NODES.values()} == set(RULES)
    named = {node.kernel_name for node in NODES.values()}
    assert named == {name for name in KERNELS if name not in ("image_to_tensor", "logits_to_mask")}
    assert {load(name).onnx for name in named} - {""} == {"RMSNorm", "AddRMSNorm", "Rotary", "SwiGLU"}


@pytest.mark.parametrize("name", NODES)
def test_the_kernel_declares_what_the_node_declares(name):
    assert differences(NODES[name], declaration(name)) == []


def test_differences_lists_mismatches_of_node_and_onnx_function():
    rotary = declaration("Rotary")
    rotary.input[:] = ["qkv", "sin", "cos"]
    assert differences(NODES["Rotary"], rotary) == ["inputs: ['qkv', 'cos', 'sin'] is not ['qkv', 'sin', 'cos']"]
    norm = declaration("AddRMSNorm")
    norm.output.reverse()
    norm.attribute.remove("epsilon")
    assert [difference.split(":")[0] for difference in differences(NODES["AddRMSNorm"], norm)] == [
        "outputs",
        "attributes",
    ]


@pytest.mark.parametrize("name", NODES)
def test_every_type_of_input_has_a_function_and_every_argument_a_value(name):
    node = NODES[name]
    for dtype, entry in node.entries(attributes_of(node)).items():
        values = node.arguments([(2, 5, 60)], attributes_of(node))
        assert {parameter.name for parameter in entry.parameters if parameter.kind == "int32"} <= values.keys()
        read, written = split(entry)
        assert read[0].dtype == dtype
        outputs = node.output_dims([(2, 5, 60)], attributes_of(node), len(written))
        scalars = {
            parameter.name: values[parameter.name] for parameter in entry.parameters if parameter.kind == "int32"
        }
        shapes = node.kernel.shapes(scalars, entry)
        for parameter, dims in zip(written, outputs, strict=True):
            assert np.prod(dims) == np.prod(shapes[parameter.name])


def node_outputs(node: Node, dtype: str, inputs: dict[str, Array]) -> list[Array]:
    """Return what ONNX Runtime makes of the node's body."""
    read, written = split(node.entry(dtype, attributes_of(node)))
    attributes: dict[str, Any] = attributes_of(node)
    kinds = {**ONNX_TYPES, "int8": TensorProto.INT8}
    graph = helper.make_graph(
        [
            helper.make_node(
                node.name,
                [parameter.name for parameter in read],
                [parameter.name for parameter in written],
                domain=NAMESPACE,
                **attributes,
            )
        ],
        "one call",
        [
            helper.make_tensor_value_info(parameter.name, kinds[parameter.dtype], inputs[parameter.name].shape)
            for parameter in read
        ],
        [helper.make_tensor_value_info(parameter.name, kinds[parameter.dtype], None) for parameter in written],
    )
    imports = [helper.make_opsetid("", 23), helper.make_opsetid(NAMESPACE, 1)]
    model = helper.make_model(graph, functions=[declaration(node.name)], opset_imports=imports, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [np.asarray(parameter) for parameter in session.run(None, inputs)]


# float32: a rational sigmoid in ONNX Runtime, 3e-6 seen, and a norm of 60 numbers. float16: the body rounds the SiLU
# and its product, where the kernel rounds once: two halves of 2**-11 of the value, and one more.
LIMITS = {"float32": 1e-5, "float16": 2**-10}


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("name", NODES)
def test_kernel_ptx_matches_the_onnx_function_of_the_node(name, dtype):
    node, attributes = NODES[name], attributes_of(NODES[name])
    entry = node.entry(dtype, attributes)
    read, written = split(entry)
    rng = np.random.default_rng(0)
    shapes = {"weight": (60,), "bias": (60,), "cos": (5, 6), "sin": (5, 6)}
    inputs = {
        parameter.name: rng.normal(size=shapes.get(parameter.name, (2, 5, 60))).astype(DTYPES[parameter.dtype])
        for parameter in read
    }
    scalars = node.launch_scalars(entry, [inputs[parameter.name].shape for parameter in read], attributes)
    kernel_shapes = node.kernel.shapes(scalars, entry)
    reshaped = {key: value.reshape(kernel_shapes[key]) for key, value in inputs.items()}
    measured = execute(node.kernel, entry, scalars, reshaped, ptx_of(node.kernel, entry)).outputs
    for parameter, expected in zip(written, node_outputs(node, dtype, inputs), strict=True):
        actual, wide = measured[parameter.name].reshape(expected.shape).astype(np.float64), expected.astype(np.float64)
        if parameter.dtype == "int8":
            assert np.abs(actual - wide).max() <= 1  # one rounding instead of two or three: the next step
            assert (actual == wide).mean() > 0.98
        else:
            np.testing.assert_allclose(actual, wide, rtol=LIMITS[dtype], atol=LIMITS[dtype])


@pytest.mark.parametrize(
    ("name", "shapes", "message"),
    [
        ("RMSNorm", [(2, 5, 60), (59,)], r"medseg.RMSNorm: weight has shape \(59,\); it must be \(60,\)"),
        ("AddRMSNorm", [(2, 5, 60), (2, 4, 60), (60,)], r"residual has shape \(2, 4, 60\); it must be \(10, 60\)"),
        ("SwiGLU", [(2, 5, 61)], r"gate_up has shape \(2, 5, 61\); it must be \(10, 60\)"),
        ("Rotary", [(2, 5, 61), (5, 6), (5, 6)], r"qkv has shape \(2, 5, 61\); it must be \(2, 5, 60\)"),
        ("Rotary", [(2, 5, 60), (4, 6), (5, 6)], r"cos has shape \(4, 6\); it must be \(5, 6\)"),
        ("Rotary", [(2, 5, 55), (5, 5), (5, 5)], "a head has 11 columns; it must be even"),
        ("Rotary", [(5, 60), (5, 6), (5, 6)], "qkv has 2 axes, not 3 to 3"),
        ("SwiGLU", [(60,)], "gate_up has 1 axes, not 2 to 8"),
    ],
)
def test_shapes_that_do_not_belong_together_are_refused(name, shapes, message):
    node = NODES[name]
    with pytest.raises(ValueError, match=message):
        node.launch_scalars(node.entry("float16", attributes_of(node)), shapes, attributes_of(node))


def test_node_refuses_an_unsupported_dtype_or_attribute():
    with pytest.raises(ValueError, match=r"medseg\.SwiGLU takes float16, bfloat16, float32, not int8"):
        NODES["SwiGLU"].entry("int8", {})
    with pytest.raises(ValueError, match=r"medseg\.Rotary: interleaved is 2; it must be 0 or 1"):
        NODES["Rotary"].entries({"num_heads": 3, "num_kv_heads": 1, "interleaved": 2})


def test_a_digest_changes_with_the_code_and_the_contract(tmp_path, monkeypatch):
    digests = {name: node.digest for name, node in NODES.items()}
    assert len({*digests.values()}) == len(NODES)
    assert all(len(digest) == 64 for digest in digests.values())
    kernel = load("swiglu")
    for file in kernel.source.parent.glob("*.cu*"):
        (tmp_path / file.name).write_text(file.read_text() + ("// changed" if file.name == "elements.cuh" else ""))
    changed = dataclasses.replace(kernel, source=tmp_path / "swiglu.cu")
    longer = dataclasses.replace(kernel.entries[0], parameters=(*kernel.entries[0].parameters, pointer("z", "int8")))
    other = dataclasses.replace(kernel, entries=(longer, *kernel.entries[1:]))
    for different in (changed, other):
        monkeypatch.setattr("medseg_trt.kernels.nodes.load", lambda name, kernel=different: kernel)
        assert NODES["SwiGLU"].digest not in digests.values()


def test_floats_travel_as_their_bits():
    node = NODES["QuantizedRMSNorm"]
    scalars = node.launch_scalars(node.entry("float16", attributes_of(node)), [(7, 4), (4,)], attributes_of(node))
    bits = {"epsilon_bits": float_bits(1e-6), "scale_bits": float_bits(0.03)}
    assert scalars == {"rows": 7, "width": 4, **bits}
    assert set(C_TYPES) == set(ONNX_TYPES)
