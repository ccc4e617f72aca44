from math import prod

import pytest

from medseg_trt.export.engine_layers import EngineLayer, words
from medseg_trt.export.tensorrt.builder_log import parse_layers

TENSOR = (
    "{{ Name: {name}, Dimensions: [{dims}], Strides: [64,1], StrideOrder: [1,0], Datatype: {dtype}, "
    "Format: (Linear) Row major linear format }}"
)
SUFFIX = "\n\nI/O Tensors:\n Name: pixel_values, IOMode: Input, DataType: Float, Dimensions: [-1,3,32,32]\n"


def tensor(dtype: str, *dims: int) -> str:
    return TENSOR.format(name="x", dims=",".join(map(str, dims)), dtype=dtype)


def line(name: str, kind: str, inputs: str, constants: str, outputs: str, *nodes: str) -> str:
    metadata = "".join(f"[ONNX Layer: {node}]" for node in nodes)
    return (
        f"Name: {name}, LayerType: {kind}, Inputs: [{inputs}], Constants: [{constants}], Outputs: [{outputs}], "
        f"TacticName: __myelin_CASK_STUB, StreamId: 0, Metadata: {metadata}"
    )


GEMM = line(
    "node_linear_9_myl0_93",
    "gemm",
    tensor("Half", -1, 64),
    f"{tensor('Half', 64, 48)}, {tensor('Float', 1)}",
    tensor("Half", -1, 48),
    "node_linear_9",
)


def read(*lines: str, macs: dict[str, int] | None = None) -> tuple[tuple[EngineLayer, ...], int]:
    return parse_layers("Layers:\n" + "\n".join(lines) + SUFFIX, macs or {})


def test_every_field_of_a_line_is_parsed():
    (layer,), unread = read(GEMM, macs={"node_linear_9": 4 * 64 * 48})
    assert unread == 0
    assert (layer.name, layer.kind, layer.kernel) == ("node_linear_9_myl0_93", "gemm", "__myelin_CASK_STUB")
    assert [tensor_entry.dtype for tensor_entry in (*layer.inputs, *layer.constants, *layer.outputs)] == [
        "Half",
        "Half",
        "Float",
        "Half",
    ]
    assert layer.constants[0].shape == (64, 48)
    assert layer.bytes == 2 * 64 + 2 * 64 * 48 + 4 + 2 * 48
    assert (layer.nodes, layer.macs, layer.is_product, layer.dtype) == (("node_linear_9",), 12288, True, "Half")


def test_unparsed_lines_are_counted():
    layers, unread = read("something else", GEMM, "Name: x, LayerType: gemm", "Name: y, Inputs: [], Outputs: []")
    assert (len(layers), unread) == (1, 3)


@pytest.mark.parametrize("text", ["", "Layers:", "Layers:\n\n", "no list", "Layers:\nName: [[[[{{{{"])
def test_parse_layers_returns_nothing_for_an_unknown_format(text):
    assert parse_layers(text, {})[0] == ()


def test_layers_that_only_synchronise_are_left_out():
    assert read(*(line("s", kind, "", "", "") for kind in ("signal", "wait", "shape_call"))) == ((), 0)


def test_layers_that_share_a_node_share_its_macs():
    halves = [
        line(f"__fc{number}_myl0_{number}", "gemm", "", "", tensor("Float", -1, 4), "attention") for number in (1, 2)
    ]
    copy = line("__myl_Tran_myl0_3", "kgen", tensor("Float", -1, 4), "", tensor("Float", -1, 4), "attention")
    layers, _ = read(*halves, copy, macs={"attention": 100})
    assert [layer.macs for layer in layers] == [50, 50, 0]


def test_a_node_inside_a_function_is_named_after_the_call():
    nodes = ("SwiGLU_gate | SwiGLU_mul_262 (SwiGLU)", "SwiGLU_y | SwiGLU_mul_262 (SwiGLU)", "node_linear_11")
    (layer,), _ = read(line("__myl_Silu_myl0_1", "kgen", "", "", tensor("Half", -1, 96), *nodes))
    assert layer.nodes == ("SwiGLU_mul_262", "node_linear_11")


def test_the_words_of_a_generated_kernel():
    assert words("__myl_FcAddCastAddCast_myl0_87") == {"Fc", "Add", "Cast"}
    assert words("_gemm_mha_v2_myl0_67") == {"gemm", "mha"}
    assert words("node_Conv_261_myl0_2") == frozenset()  # named by the graph: its words say nothing


@pytest.mark.parametrize(
    ("name", "kind", "inputs", "constants", "outputs", "properties"),
    [
        ("__myl_MulMove_myl0_8", "kgen", ["Float"], ["Float"], ["Float"], {"only_moves"}),
        ("__myl_Move_myl0_17", "kgen", [], [], ["Int32"], set()),  # a counter, not the picture
        ("__myl_MulAddRelu_myl0_9", "kgen", ["Float"], [], ["Float"], set()),
        ("__myl_CastMulCast_myl0_98", "kgen", [], ["Float", "Int4"], ["Float"], {"decodes_weights", "only_moves"}),
        ("__myl_CastMulCastFc_myl0_95", "runtime_fusion", ["Float"], ["Float", "Int8"], ["Float"], {"is_product"}),
        ("node_Conv_261_myl0_2", "correlation", ["Int8"], ["Int8"], ["Float"], {"is_product"}),
    ],
)
def test_the_properties_of_a_layer_follow_from_its_name_and_types(name, kind, inputs, constants, outputs, properties):
    sides = [", ".join(tensor(dtype, 4, 4) for dtype in side) for side in (inputs, constants, outputs)]
    (layer,), _ = read(line(name, kind, *sides))
    assert {
        attribute for attribute in ("only_moves", "decodes_weights", "is_product") if getattr(layer, attribute)
    } == properties


@pytest.mark.parametrize(
    ("inputs", "constants", "dtype"),
    [
        (["Int8"], ["Int8", "Float"], "Int8"),  # the constants after the weight are scales
        (["Int8", "Float"], [], "Float"),  # decoded first, then multiplied as floats
        (["Half"], ["Half", "Int8"], "Half"),  # a stored weight
        (["Float", "Half"], ["Half"], "Half"),  # a residual sum after it
    ],
)
def test_a_product_computes_in_the_type_of_its_weight_unless_it_dequantises_it(inputs, constants, dtype):
    sides = [", ".join(tensor(tensor_name, 4, 4) for tensor_name in side) for side in (inputs, constants, ["Float"])]
    (layer,), _ = read(line("__myl_CastMulFc_myl0_70", "runtime_fusion", *sides))
    assert layer.dtype == dtype


def test_a_free_size_counts_as_one_image():
    (layer,), _ = read(line("__myl_Relu_myl0_1", "kgen", tensor("Float", -1, 3, 5), "", tensor("Half", -1, 3, 5)))
    assert layer.bytes == prod((3, 5)) * (4 + 2)
