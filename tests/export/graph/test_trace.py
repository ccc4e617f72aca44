import re
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tiny import make_checkpoint

from medseg_trt.errors import MedsegError
from medseg_trt.export.fold.fold import fold
from medseg_trt.export.graph import trace as trace_module
from medseg_trt.export.graph.save import save_graphs
from medseg_trt.export.graph.trace import OPSET, OnnxGraph, check, trace
from medseg_trt.train.checkpoint import load_checkpoint
from medseg_trt.train.models.model import LanguageInsert

SIZE = (32, 48)


@pytest.fixture(scope="module")
def folded(tmp_path_factory):
    return fold(load_checkpoint(make_checkpoint(tmp_path_factory.mktemp("model"), size=SIZE)).model())[0]


@pytest.fixture(scope="module")
def saved(folded, tmp_path_factory):
    """Return the folder with the written graph."""
    folder = tmp_path_factory.mktemp("graph")
    save_graphs({"fp32.onnx": trace(folded)}, folder, "weights.bin")
    return folder


@pytest.fixture
def graph(saved) -> OnnxGraph:
    """Return a copy that a test may break."""
    return OnnxGraph(model=trace_module.ir.load(saved / "fp32.onnx"))


def test_the_graph_computes_the_logits_of_pytorch_for_every_batch(folded, saved):
    session = onnxruntime.InferenceSession(saved / "fp32.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 2, 3, 5):
        images = np.random.default_rng(batch).random((batch, 3, *SIZE), dtype=np.float32)
        with torch.inference_mode():
            expected = folded(torch.from_numpy(images)).numpy()
        (logits,) = session.run(["logits"], {"pixel_values": images})
        # Logits of order 1 in float32, added up in another order: 1e-6 seen.
        np.testing.assert_allclose(np.asarray(logits), expected, atol=1e-5, rtol=0)


def test_the_written_model_is_standard_onnx_with_weights_beside_it(saved):
    model = onnx.load(saved / "fp32.onnx", load_external_data=False)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", OPSET)]
    assert not model.functions
    entries = [entry for tensor in model.graph.initializer for entry in tensor.external_data]
    assert {entry.value for entry in entries if entry.key == "location"} == {"weights.bin"}
    operators = {node.op_type for node in model.graph.node}
    assert operators >= {"Attention", "RMSNormalization", "GroupNormalization", "Conv"}
    assert "BatchNormalization" not in operators


def test_names_are_unique_and_shapes_are_inferred(saved):
    model = onnx.load(saved / "fp32.onnx", load_external_data=False)
    nodes = [node.name for node in model.graph.node]
    values = [name for node in model.graph.node for name in node.output]
    assert len(set(nodes)) == len(nodes)
    assert len(set(values)) == len(values)
    known = {info.name: info.type.tensor_type.shape for info in (*model.graph.value_info, *model.graph.output)}
    assert set(values) <= known.keys()
    (logits,) = model.graph.output
    assert [dim.dim_param or dim.dim_value for dim in logits.type.tensor_type.shape.dim] == ["batch", 3, *SIZE]


def test_the_file_contains_no_path_of_this_machine(saved):
    text = (saved / "fp32.onnx").read_bytes()
    assert not re.search(rb"File \"|site-packages|\.py\b|stack_trace", text)


def test_every_node_has_the_metadata_of_its_module(saved):
    nodes = onnx.load(saved / "fp32.onnx", load_external_data=False).graph.node
    modules = [{entry.key: entry.value for entry in node.metadata_props} for node in nodes]
    assert all(properties.keys() == {"namespace"} and "TransUNet" in properties["namespace"] for properties in modules)


def test_another_operator_set_than_asked_for_is_refused(graph):
    graph.model.opset_imports[""] = 18
    with pytest.raises(MedsegError, match="operator sets"):
        check(graph, SIZE, 3)


def test_a_doubled_node_name_is_refused(graph):
    first, second = list(graph.model.graph)[:2]
    second.name = first.name
    with pytest.raises(MedsegError, match="2 nodes are called"):
        check(graph, SIZE, 3)


def test_an_unknown_shape_is_refused(graph):
    list(graph.model.graph)[5].outputs[0].shape = None
    with pytest.raises(MedsegError, match=r"type or the shape of .* is unknown"):
        check(graph, SIZE, 3)


def test_an_unknown_type_is_refused(graph):
    list(graph.model.graph)[5].outputs[0].type = None
    with pytest.raises(MedsegError, match=r"type or the shape of .* is unknown"):
        check(graph, SIZE, 3)


def test_a_function_whose_domain_is_not_allowed_is_refused(graph):
    graph.model.functions["other", "Twice", ""] = trace_module.ir.Function(
        "other", "Twice", graph=trace_module.ir.Graph([], [], nodes=[]), attributes=[]
    )
    with pytest.raises(MedsegError, match="there is a function Twice"):
        check(graph, SIZE, 3)
    check(graph, SIZE, 3, opsets=({"": OPSET}, {"": OPSET, "other": 1}))


@pytest.mark.parametrize(("size", "classes"), [((32, 32), 3), (SIZE, 2)])
def test_check_refuses_an_unexpected_input_size_or_class_count(graph, size, classes):
    with pytest.raises(MedsegError, match=r"the (in|out)puts are"):
        check(graph, size, classes)


def test_a_fixed_batch_is_refused(graph):
    (logits,) = graph.model.graph.outputs
    logits.shape = trace_module.ir.Shape([2, 3, *SIZE])
    with pytest.raises(MedsegError, match="batch of the output is fixed"):
        check(graph, SIZE, 3)


def test_a_graph_that_onnx_refuses_is_not_kept(graph, tmp_path):
    (matmul, *_) = (node for node in graph.model.graph if node.op_type == "MatMul")
    matmul.op_type = "NoSuchOperator"
    with pytest.raises(MedsegError, match="ONNX refuses"):
        save_graphs({"broken.onnx": graph}, tmp_path, "weights.bin")


def test_rotary_embedding_and_causal_mask_are_traced_where_they_are_switched_on(tmp_path):
    model = load_checkpoint(make_checkpoint(tmp_path / "model")).model()
    assert isinstance(model.insert, LanguageInsert)
    plain = fold(model)[0]
    attention = model.insert.layers[0].self_attn
    attention.spec = replace(attention.spec, rotary=True, causal=True)
    save_graphs({"model.onnx": trace(fold(model)[0])}, tmp_path, "weights.bin")
    images = np.random.default_rng(0).random((2, 3, 32, 32), dtype=np.float32)
    with torch.inference_mode():
        expected, without = (network(torch.from_numpy(images)).numpy() for network in (model, plain))
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"pixel_values": images})
    np.testing.assert_allclose(np.asarray(logits), expected, atol=1e-5, rtol=0)
    assert np.abs(logits - without).max() > 1e-3  # the switches do something
