"""Quantisers joined with the nodes before them: the same numbers, fewer nodes, and nothing joined that must not be."""

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from tiny import make_checkpoint, picture

from medseg_trt.export.fold.fold import fold
from medseg_trt.export.graph.dialects import DIALECTS
from medseg_trt.export.graph.functions import DOMAIN
from medseg_trt.export.graph.fusions.fuse import fuse
from medseg_trt.export.graph.save import save_graphs
from medseg_trt.export.graph.trace import INPUT, OnnxGraph, check, trace
from medseg_trt.export.precision.calibrate import calibrate, observed_graph
from medseg_trt.export.precision.quantize import parse_precision, quantise, values_to_calibrate
from medseg_trt.export.tensorrt.quantised_nodes import join_quantisers
from medseg_trt.train.block.llama import LlamaBlock
from medseg_trt.train.checkpoint import load_checkpoint

SIZE = (32, 48)
IMAGES = np.stack([np.repeat(picture(seed, SIZE)[0][None] / 255, 3, axis=0) for seed in range(4)]).astype(np.float32)
INT8 = parse_precision("int8")


@pytest.fixture(scope="module")
def graph(tmp_path_factory) -> OnnxGraph:
    """Return the fused tiny network whose block rotates its queries."""
    model = load_checkpoint(make_checkpoint(tmp_path_factory.mktemp("model"), size=SIZE)).model()
    for layer in model.modules():
        if isinstance(layer, LlamaBlock):
            layer.self_attn.spec = replace(layer.self_attn.spec, rotary=True)
    return fuse(trace(fold(model)[0]))[0]


def opened(graph: OnnxGraph, folder) -> onnxruntime.InferenceSession:
    save_graphs({"graph.onnx": graph}, folder, "weights.bin")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(folder / "graph.onnx", options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def int8(graph, tmp_path_factory) -> OnnxGraph:
    names = values_to_calibrate(graph, INT8)
    session = opened(observed_graph(graph, names), tmp_path_factory.mktemp("observed"))
    outputs = [output.name for output in session.get_outputs()]

    def observe(batch: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(outputs, map(np.asarray, session.run(outputs, {INPUT: batch})), strict=True))

    return quantise(graph, INT8, calibrate(observe, IMAGES, names))


def kinds(graph: OnnxGraph) -> Counter[str]:
    return Counter(node.op_type for node in graph.model.graph)


def test_every_norm_before_an_int8_product_writes_the_int8(int8, tmp_path):
    joined, count = join_quantisers(int8)
    before, after = kinds(int8), kinds(joined)
    made = {name: after[name] for name in after if name.startswith("Quantized")}
    assert made.keys() >= {"QuantizedAddRMSNorm", "QuantizedSwiGLU", "QuantizedLayerNorm"}
    assert sum(made.values()) == count == before["QuantizeLinear"] - after["QuantizeLinear"]
    check(joined, SIZE, 3, opsets=DIALECTS["canonical"].opsets)
    answers = []
    for name, variant_graph in {"before": int8, "after": joined}.items():
        (tmp_path / name).mkdir()
        (logits,) = opened(variant_graph, tmp_path / name).run(None, {INPUT: IMAGES})
        answers.append(np.asarray(logits))
    np.testing.assert_array_equal(*answers)  # the body does what the two nodes did


def test_joining_does_not_change_the_original_graph(int8):
    before = kinds(int8)
    join_quantisers(int8)
    assert kinds(int8) == before


def of_swiglu(graph: OnnxGraph) -> tuple[ir.Node, ir.Node]:
    (node,) = [
        candidate for candidate in graph.model.graph if (candidate.domain, candidate.op_type) == (DOMAIN, "SwiGLU")
    ]
    (quantiser,) = node.outputs[0].consumers()
    return node, quantiser


def asymmetric(graph: OnnxGraph) -> None:
    zero = of_swiglu(graph)[1].inputs[2]
    assert zero is not None
    value = ir.val("one", const_value=ir.tensor(np.array(1, np.int8), name="one"))
    graph.model.graph.register_initializer(value)
    of_swiglu(graph)[1].replace_input_with(2, value)


def unsigned(graph: OnnxGraph) -> None:
    of_swiglu(graph)[1].outputs[0].type = ir.TensorType(ir.DataType.UINT8)


def with_scales_by_column(graph: OnnxGraph) -> None:
    value = ir.val("steps", const_value=ir.tensor(np.ones(4, np.float32), name="steps"))
    graph.model.graph.register_initializer(value)
    of_swiglu(graph)[1].replace_input_with(1, value)


def read_by_another_node(graph: OnnxGraph) -> None:
    node, _ = of_swiglu(graph)
    graph.model.graph.append(ir.node("Identity", [node.outputs[0]], name="other"))


@pytest.mark.parametrize("change", [asymmetric, unsigned, with_scales_by_column, read_by_another_node])
def test_nodes_that_the_kernel_does_not_support_stay(change, int8):
    changed = OnnxGraph(model=int8.model.clone())
    change(changed)
    joined, count = join_quantisers(changed)
    assert kinds(joined)["SwiGLU"] == 1
    assert count == join_quantisers(int8)[1] - 1


def test_a_float_graph_has_nothing_to_join(graph):
    assert join_quantisers(graph)[1] == 0
