from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from medseg_trt.export.graph.functions import PLUGIN, attach
from medseg_trt.export.graph.gemms import gemms
from medseg_trt.export.graph.save import save_graphs
from medseg_trt.export.graph.trace import INPUT, KEPT_METADATA, OPSET, OnnxGraph
from medseg_trt.export.precision.calibrate import calibrate, observed_graph
from medseg_trt.export.precision.quantize import parse_precision, quantise, values_to_calibrate
from medseg_trt.export.precision.smooth import Smoothing, smooth, smoothable

RNG = np.random.default_rng(0)
IMAGES = RNG.random((6, 3, 8, 8), dtype=np.float32)
OUTLIERS = np.where(np.arange(32) % 11 == 5, 30, 1).astype(np.float32)  # three channels thirty times as large
NAMESPACE = {KEPT_METADATA: ": TransUNet/insert: Insert/step: aten.step"}


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


CONSTANTS: Mapping[str, np.ndarray] = {
    "root": normal(32, 3, 3, 3),
    "group_weight": OUTLIERS,
    "group_bias": normal(32) * OUTLIERS,
    "kernel1": normal(32, 32, 3, 3) * OUTLIERS[:, None, None, None],
    "kernel1_bias": normal(32) * OUTLIERS,
    "kernel2": normal(32, 32, 1, 1),
    "rows": np.array([1, 64, 32], np.int64),
    "layer_weight": OUTLIERS,
    "layer_bias": normal(32) * OUTLIERS,
    "first": normal(32, 16),
    "second": normal(32, 16),
    "rms_weight": OUTLIERS,
    "gate_up": normal(32, 64) * np.concatenate([np.ones(32), OUTLIERS]).astype(np.float32),
    "down": normal(32, 8),
    "shared_norm": OUTLIERS,
    "open": normal(32, 8),
}
STEPS = [  # operator, inputs, outputs with their shapes, attributes
    ("Conv", [INPUT, "root"], {"a": [1, 32, 8, 8]}, {"pads": [1, 1, 1, 1]}),
    ("GroupNormalization", ["a", "group_weight", "group_bias"], {"b": [1, 32, 8, 8]}, {"num_groups": 8}),
    ("Relu", ["b"], {"group_relu": [1, 32, 8, 8]}, {}),
    ("Conv", ["group_relu", "kernel1", "kernel1_bias"], {"c": [1, 32, 8, 8]}, {"pads": [1, 1, 1, 1]}),
    ("Relu", ["c"], {"conv_relu": [1, 32, 8, 8]}, {}),
    ("Conv", ["conv_relu", "kernel2"], {"d": [1, 32, 8, 8]}, {}),
    ("Reshape", ["d", "rows"], {"e": [1, 64, 32]}, {}),
    ("LayerNormalization", ["e", "layer_weight", "layer_bias"], {"layer": [1, 64, 32]}, {"axis": -1}),
    ("MatMul", ["layer", "first"], {"f": [1, 64, 16]}, {}),
    ("MatMul", ["layer", "second"], {"g": [1, 64, 16]}, {}),
    ("Concat", ["f", "g"], {"h": [1, 64, 32]}, {"axis": -1}),
    ("AddRMSNorm", ["h", "e", "rms_weight"], {"rms": [1, 64, 32], "sum": [1, 64, 32]}, {"epsilon": 1e-6}),
    ("MatMul", ["rms", "gate_up"], {"i": [1, 64, 64]}, {}),
    ("SwiGLU", ["i"], {"swiglu": [1, 64, 32]}, {}),
    ("MatMul", ["swiglu", "down"], {"j": [1, 64, 8]}, {}),
    ("RMSNormalization", ["sum", "shared_norm"], {"shared": [1, 64, 32]}, {"axis": -1, "epsilon": 1e-6}),
    ("MatMul", ["shared", "open"], {"k": [1, 64, 8]}, {}),
    ("ReduceMax", ["shared"], {"l": [1, 1, 1]}, {}),
    ("Add", ["j", "k"], {"m": [1, 64, 8]}, {}),
    ("Add", ["m", "l"], {"logits": [1, 64, 8]}, {}),
]
PLACES = {"group_relu", "conv_relu", "layer", "rms", "swiglu"}  # "shared" is read by more than a GEMM


@pytest.fixture(scope="module")
def graph() -> OnnxGraph:
    """Return a network with every kind of place, all of them with outlying channels."""
    tensors = {name: ir.tensor(values, name=name) for name, values in CONSTANTS.items()}
    named = {
        name: ir.Value(name=name, shape=ir.Shape(t.numpy().shape), type=ir.TensorType(t.dtype), const_value=t)
        for name, t in tensors.items()
    }
    initializers = list(named.values())
    named[INPUT] = ir.val(INPUT, ir.DataType.FLOAT, [1, 3, 8, 8])
    nodes = []
    for operator, inputs, outputs, attributes in STEPS:
        ours = operator in ("AddRMSNorm", "SwiGLU")
        made = [ir.val(name, ir.DataType.FLOAT, shape) for name, shape in outputs.items()]
        named |= {str(value.name): value for value in made}
        nodes.append(
            ir.node(
                operator,
                [named[name] for name in inputs],
                attributes | (dict(PLUGIN) if ours else {}),
                domain="medseg" if ours else "",
                outputs=made,
                name=f"node_{made[0].name}",
                metadata_props=dict(NAMESPACE),
            )
        )
    body = ir.Graph(
        [named[INPUT]], [named["logits"]], nodes=nodes, initializers=initializers, opset_imports={"": OPSET}, name="g"
    )
    model = ir.Model(body, ir_version=10)
    attach(model)
    return OnnxGraph(model=model)


def observe(graph: OnnxGraph, folder):
    folder.mkdir()
    save_graphs({"graph.onnx": graph}, folder, "weights.bin")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(folder / "graph.onnx", options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda batch: dict(zip(names, map(np.asarray, session.run(names, {INPUT: batch})), strict=True))


def answers(graph: OnnxGraph, folder) -> np.ndarray:
    network = observe(graph, folder)
    return np.stack([network(image[None])["logits"] for image in IMAGES]).astype(np.float64)


def names(graph: OnnxGraph) -> list[str]:
    return [gemm.name for gemm in gemms(graph)]


@pytest.fixture(scope="module")
def smoothed(graph, tmp_path_factory) -> tuple[OnnxGraph, Mapping[str, Smoothing]]:
    watched = observed_graph(graph, smoothable(graph, names(graph)))
    network = observe(watched, tmp_path_factory.mktemp("smooth") / "observed")
    copy, smoothed = smooth(graph, names(graph), network, IMAGES)
    return copy, {entry.value: entry for entry in smoothed}


def test_smoothable_activations_are_those_whose_channels_constants_scale(graph):
    assert set(smoothable(graph, names(graph))) == PLACES
    without = [name for name in names(graph) if name != "node_g"]  # one of two readers of "layer" stays float
    assert set(smoothable(graph, without)) == PLACES - {"layer"}


def test_smoothing_preserves_the_output_and_the_original_graph(graph, smoothed, tmp_path):
    exact, answer = answers(graph, tmp_path / "before"), answers(smoothed[0], tmp_path / "after")
    # Every changed constant is rounded once to float32, and sums are taken over other numbers: 1e-6 seen.
    assert np.abs(answer - exact).max() <= 1e-5 * np.abs(exact).max()
    for name, values in CONSTANTS.items():
        kept = graph.model.graph.initializers[name].const_value
        assert kept is not None
        np.testing.assert_array_equal(kept.numpy(), values)
    assert smoothed[0].num_nodes == graph.num_nodes
    assert len(smoothed[0].model.graph.initializers) == len(CONSTANTS)  # no constant is kept twice


def test_every_activation_with_outliers_has_a_smaller_error(smoothed):
    assert smoothed[1].keys() == PLACES
    for smoothing in smoothed[1].values():
        assert smoothing.alpha is not None
        assert smoothing.error_after < 0.5 * smoothing.error_before  # thirty times as large costs up to five bits


def test_int8_of_the_whole_network_is_better(graph, smoothed, tmp_path):
    exact = answers(graph, tmp_path / "exact")
    errors = {}
    for name, network in (("plain", graph), ("smooth", smoothed[0])):
        values = values_to_calibrate(network, parse_precision("int8"))
        watched = observe(observed_graph(network, values), tmp_path / f"{name}-observed")
        calibration = calibrate(watched, IMAGES, values)
        quantised = quantise(network, parse_precision("int8"), calibration)
        errors[name] = np.square(answers(quantised, tmp_path / name) - exact).sum()
    assert errors["smooth"] < 0.5 * errors["plain"]


def test_an_activation_that_gains_too_little_does_not_change(graph, tmp_path):
    watched = observe(observed_graph(graph, smoothable(graph, names(graph))), tmp_path / "observed")
    # No activation has a thousandth of its error afterwards.
    copy, smoothings = smooth(graph, names(graph), watched, IMAGES, max_error_share=1e-3)
    assert {smoothing.value for smoothing in smoothings} == PLACES
    assert all(
        smoothing.alpha is None and smoothing.error_after == smoothing.error_before > 0 for smoothing in smoothings
    )
    assert copy.model.graph.initializers.keys() == graph.model.graph.initializers.keys()


def test_a_shared_constant_does_not_change_for_its_other_readers(graph, tmp_path):
    shared = OnnxGraph(model=graph.model.clone())
    norms = [node for node in shared.model.graph if node.op_type in ("LayerNormalization", "RMSNormalization")]
    norms[1].replace_input_with(1, norms[0].inputs[1])
    exact = answers(shared, tmp_path / "before")
    watched = observe(observed_graph(shared, ["layer"]), tmp_path / "observed")
    copy, (smoothing,) = smooth(shared, ["node_f", "node_g"], watched, IMAGES)
    assert smoothing.alpha is not None
    assert np.abs(answers(copy, tmp_path / "after") - exact).max() <= 1e-5 * np.abs(exact).max()


@pytest.mark.parametrize("constant", ["layer_bias", "first", "down", "kernel2", "group_weight"])
def test_omitting_one_smoothing_factor_changes_the_output(graph, smoothed, constant, tmp_path):
    broken = OnnxGraph(model=smoothed[0].model.clone())
    value = broken.model.graph.initializers[f"{constant}_smooth"]
    value.const_value = ir.tensor(CONSTANTS[constant], name=value.name)
    exact = answers(graph, tmp_path / "exact")
    assert np.abs(answers(broken, tmp_path / "broken") - exact).max() > 1e-3 * np.abs(exact).max()
