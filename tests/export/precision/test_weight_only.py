import logging
from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from medseg_trt.export.graph.gemms import Gemm, gemms, total_macs
from medseg_trt.export.graph.save import save_graphs
from medseg_trt.export.graph.trace import KEPT_METADATA, OPSET, OnnxGraph
from medseg_trt.export.precision.quantize import gemm_precisions
from medseg_trt.export.precision.weight_only import SHRINKS, block_size, per_block, per_channel, to_w4a16, to_w8a16

RNG = np.random.default_rng(0)
INSERT = "TransUNet/insert: Insert/matmul: aten.matmul"
HEAD = "TransUNet/head: Conv2d/conv: aten.conv2d.default"
WEIGHTS = {
    "wide": RNG.normal(size=(256, 96)).astype(np.float32) * RNG.uniform(0.1, 10, 96).astype(np.float32),
    "odd": RNG.normal(size=(96, 20)).astype(np.float32),
    "short": RNG.normal(size=(20, 32)).astype(np.float32),
    "kernel": RNG.normal(size=(4, 2, 3, 3)).astype(np.float32),
}
X = RNG.normal(size=(1, 8, 256)).astype(np.float32)


@pytest.fixture
def graph() -> OnnxGraph:
    """Return x @ wide @ odd @ short, brought to two channels of 8 x 16 pixels and convolved; wide is used twice."""
    constants = {name: ir.tensor(values, name=name) for name, values in WEIGHTS.items()}
    constants["sizes"] = ir.tensor(np.array([1, 2, 8, 16], np.int64), name="sizes")
    named = {
        name: ir.Value(name=name, shape=ir.Shape(t.numpy().shape), type=ir.TensorType(t.dtype), const_value=t)
        for name, t in constants.items()
    }
    named["x"] = ir.val("x", ir.DataType.FLOAT, [1, 8, 256])
    steps = [
        ("MatMul", ["x", "wide"], "a", [1, 8, 96], {}),
        ("MatMul", ["x", "wide"], "twin", [1, 8, 96], {}),
        ("Add", ["a", "twin"], "b", [1, 8, 96], {}),
        ("MatMul", ["b", "odd"], "c", [1, 8, 20], {}),
        ("MatMul", ["c", "short"], "d", [1, 8, 32], {}),
        ("Reshape", ["d", "sizes"], "e", [1, 2, 8, 16], {}),
        ("Conv", ["e", "kernel"], "y", [1, 4, 6, 14], {}),
    ]
    nodes = []
    for operator, inputs, output, shape, attributes in steps:
        named[output] = ir.val(output, ir.DataType.FLOAT, shape)
        metadata = {KEPT_METADATA: f": {HEAD if operator == 'Conv' else INSERT}"}
        nodes.append(
            ir.node(
                operator,
                [named[name] for name in inputs],
                attributes,
                outputs=[named[output]],
                name=f"node_{output}",
                metadata_props=metadata,
            )
        )
    initializers = [named[name] for name in constants]
    body = ir.Graph(
        [named["x"]], [named["y"]], nodes=nodes, initializers=initializers, opset_imports={"": OPSET}, name="g"
    )
    return OnnxGraph(model=ir.Model(body, ir_version=10))


def run(graph: OnnxGraph, folder, name="graph") -> np.ndarray:
    save_graphs({f"{name}.onnx": graph}, folder, f"{name}.bin")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(folder / f"{name}.onnx", options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": X})[0])


def gemm(name: str, output_axis: int = 1) -> Gemm:
    operator = "Conv" if WEIGHTS[name].ndim == 4 else "MatMul"
    return Gemm(
        name=name,
        part="block",
        op_type=operator,
        activation="x",
        output="y",
        weight=name,
        weight_shape=WEIGHTS[name].shape,
        output_axis=output_axis,
        macs=0,
    )


def names(graph: OnnxGraph) -> list[str]:
    return [gemm.name for gemm in gemms(graph)]


def test_gemms_are_listed_with_their_part_and_their_cost(graph):
    products = {gemm.name: gemm for gemm in gemms(graph)}
    assert {name: gemm.macs for name, gemm in products.items()} == {
        "node_a": 8 * 256 * 96,
        "node_twin": 8 * 256 * 96,
        "node_c": 8 * 96 * 20,
        "node_d": 8 * 20 * 32,
        "node_y": 4 * 6 * 14 * 2 * 9,
    }
    assert total_macs(graph) == sum(gemm.macs for gemm in products.values())
    assert [gemm.part for gemm in products.values()] == ["block"] * 4 + ["decoder"]
    assert [gemm.output_axis for gemm in products.values()] == [1, 1, 1, 1, 0]


@pytest.mark.parametrize(("name", "axis"), [("wide", 1), ("kernel", 0)])
def test_eight_bits_round_to_nearest_with_the_largest_weight_of_every_channel(name, axis):
    weight = WEIGHTS[name].astype(np.float64)
    quantised_weight = per_channel(WEIGHTS[name], gemm(name, axis))
    others = tuple(other_axis for other_axis in range(weight.ndim) if other_axis != axis)
    steps = np.abs(weight).max(axis=others, keepdims=True) / 127
    assert quantised_weight.values.dtype == np.int8
    assert np.abs(quantised_weight.values.astype(int)).max(axis=others).tolist() == [127] * weight.shape[axis]
    # Half a step, and what float32 does to a quotient of up to 127.
    assert (np.abs(quantised_weight.dequantised() - weight) <= steps * (0.5 + 127 * 2**-22)).all()


def test_ties_round_to_even_and_a_channel_of_zeros_stays_zero():
    weight = np.zeros((256, 96), np.float32)
    weight[:, 0] = np.resize([127, 0.5, 1.5, -2.5, -0.5], 256)
    weight[:, 1] = 1e-42  # a subnormal number, whose scale would be zero
    quantised_weight = per_channel(weight, gemm("wide"))
    assert quantised_weight.values[:5, 0].tolist() == [127, 0, 2, -2, 0]
    assert quantised_weight.scales.tolist() == [1.0] * 96
    assert not quantised_weight.values[:, 1:].any()
    blocks = per_block(weight, gemm("wide"))
    assert np.isfinite(blocks.scales).all()
    assert not blocks.dequantised()[:, 1:].any()


def test_four_bits_are_better_than_rounding_to_the_nearest_of_the_whole_range():
    weight = WEIGHTS["wide"].astype(np.float64)
    quantised_weight = per_block(WEIGHTS["wide"], gemm("wide"))
    assert quantised_weight.values.dtype == ml_dtypes.int4
    assert quantised_weight.scales.shape == (2, 96)
    step = np.abs(weight.reshape(2, 128, 96)).max(axis=1, keepdims=True) / 7
    nearest = (np.rint(weight.reshape(2, 128, 96) / step) * step).reshape(256, 96)
    error, plain = (np.square(tried - weight).sum() for tried in (quantised_weight.dequantised(), nearest))
    # A sample of 128 normal numbers reaches 2.7 sigma; clipping it pays: 0.86 seen.
    assert error < 0.93 * plain
    best_shrink = quantised_weight.scales / (step[:, 0] if step.ndim == 3 else step)
    assert SHRINKS.min() - 1e-3 <= best_shrink.min() <= best_shrink.max() <= 1 + 1e-6


@pytest.mark.parametrize(("name", "size"), [("wide", 128), ("odd", 32), ("short", 0), ("kernel", 0)])
def test_blocks_divide_the_summed_axis_or_there_are_none(name, size):
    assert block_size(gemm(name, 0 if name == "kernel" else 1)) == size


def test_blocks_of_a_transposed_matrix_lie_along_its_second_axis():
    transposed = replace(gemm("wide"), op_type="Gemm", weight_shape=(96, 256), output_axis=0)
    quantised_weight = per_block(np.ascontiguousarray(WEIGHTS["wide"].T), transposed)
    assert (quantised_weight.axis, quantised_weight.scales.shape) == (1, (96, 2))
    np.testing.assert_array_equal(
        quantised_weight.dequantised().T, per_block(WEIGHTS["wide"], gemm("wide")).dequantised()
    )


@pytest.mark.parametrize("convert", [to_w8a16, to_w4a16])
def test_onnx_runtime_dequantises_as_the_float64_oracle(graph, convert, tmp_path):
    coded = convert(graph, names(graph))
    coders = dict.fromkeys(WEIGHTS, per_channel)
    if convert is to_w4a16:
        coders |= dict.fromkeys(("wide", "odd"), per_block)
    decoded = {
        name: coders[name](WEIGHTS[name], gemm(name, 0 if name == "kernel" else 1)).dequantised() for name in WEIGHTS
    }
    twice = 2 * (X.astype(np.float64) @ decoded["wide"])
    image = (twice @ decoded["odd"] @ decoded["short"]).reshape(1, 2, 8, 16)
    windows = np.lib.stride_tricks.sliding_window_view(image, (3, 3), axis=(2, 3))
    expected = np.einsum("bchwij,ocij->bohw", windows, decoded["kernel"])
    answer = run(coded, tmp_path)
    np.testing.assert_allclose(answer, expected, atol=1e-5 * np.abs(expected).max())  # float32 sums; 1e-6 seen


def test_gemm_precisions_are_read_from_the_graph_and_shared_weights_are_stored_once(graph, caplog):
    with caplog.at_level(logging.INFO, "medseg_trt"):
        coded = to_w4a16(graph, names(graph))
    assert gemm_precisions(coded) == {
        "node_a": "w4a16",
        "node_twin": "w4a16",
        "node_c": "w4a16",
        "node_d": "w8a16",
        "node_y": "w8a16",
    }
    assert [record.getMessage().split()[0] for record in caplog.records] == ["node_d", "node_y"]
    assert not set(WEIGHTS) & coded.model.graph.initializers.keys()  # no float weight is left
    assert coded.num_nodes["DequantizeLinear"] == len(WEIGHTS)
    assert set(WEIGHTS) <= graph.model.graph.initializers.keys()  # the original is untouched
    assert {node.domain for node in coded.model.graph} == {""}
    assert all(node.metadata_props[KEPT_METADATA] for node in coded.model.graph)


def test_only_the_named_gemms_change_and_a_shared_weight_stays_for_the_others(graph, tmp_path):
    coded = to_w8a16(graph, ["node_a"])
    assert {name for name, precision in gemm_precisions(coded).items() if precision != "fp32"} == {"node_a"}
    assert "wide" in coded.model.graph.initializers
    error = np.abs(run(coded, tmp_path) - run(graph, tmp_path, "float")).max()
    assert 0 < error < 0.05 * np.abs(run(graph, tmp_path, "again")).max()


def test_a_wrong_channel_axis_is_detected(graph, tmp_path):
    exact = run(graph, tmp_path, "float")
    square = to_w8a16(graph, ["node_d"])
    kept = np.square(run(square, tmp_path, "right") - exact).sum()
    (node,) = (node for node in square.model.graph if node.op_type == "DequantizeLinear")
    scale = node.inputs[1]
    assert scale is not None
    assert scale.const_value is not None
    scale.const_value = ir.tensor(np.roll(scale.const_value.numpy(), 1), name=scale.name)
    assert np.square(run(square, tmp_path, "wrong") - exact).sum() > 100 * kept
