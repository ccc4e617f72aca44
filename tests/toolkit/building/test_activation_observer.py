import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from medseg_trt.building.activation_observer import observer
from medseg_trt.errors import MissingExtraError
from medseg_trt.export.graph.trace import INPUT, OPSET, OUTPUT, OnnxGraph

IMAGE = np.random.default_rng(0).normal(size=(1, 3, 4, 4)).astype(np.float32)


@pytest.fixture
def graph() -> OnnxGraph:
    """Return ``logits = relu(2 · image)``, of which ``doubled`` lies inside."""

    def value(name: str) -> ir.Value:
        return ir.Value(
            name=name, shape=ir.Shape([ir.SymbolicDim("batch"), 3, 4, 4]), type=ir.TensorType(ir.DataType.FLOAT)
        )

    image, doubled, logits = map(value, (INPUT, "doubled", OUTPUT))
    two = ir.val("two", const_value=ir.tensor(np.float32(2), name="two"))
    nodes = [
        ir.node("Mul", [image, two], outputs=[doubled], name="mul"),
        ir.node("Relu", [doubled], outputs=[logits], name="relu"),
    ]
    inside = ir.Graph([image], [logits], nodes=nodes, initializers=[two], opset_imports={"": OPSET}, name="graph")
    return OnnxGraph(model=ir.Model(inside, ir_version=10))


def test_observer_returns_activations_by_name(graph):
    with observer(graph, [OUTPUT, INPUT, "doubled"]) as observe:
        activations = observe(IMAGE)
    np.testing.assert_array_equal(activations["doubled"], 2 * IMAGE)
    np.testing.assert_array_equal(activations[OUTPUT], np.maximum(2 * IMAGE, 0))
    np.testing.assert_array_equal(activations[INPUT], IMAGE)
    assert len(activations) == 3


def test_observer_returns_only_requested_values_and_does_not_modify_the_graph(graph):
    with observer(graph, ["doubled"]) as observe:
        assert list(observe(IMAGE)) == ["doubled"]
        np.testing.assert_array_equal(observe(-IMAGE)["doubled"], -2 * IMAGE)  # it goes on observing
    assert [value.name for value in graph.model.graph.outputs] == [OUTPUT]


def test_observer_returns_the_input_or_nothing_if_only_that_is_requested(graph):
    with observer(graph, [INPUT]) as observe:
        assert {name: value.tolist() for name, value in observe(IMAGE).items()} == {INPUT: IMAGE.tolist()}
    with observer(graph, []) as observe:
        assert observe(IMAGE) == {}


def test_observer_removes_its_temporary_files(graph, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with observer(graph, ["doubled"]):
        assert any(Path(tmp_path).rglob("observed.onnx"))
    assert list(tmp_path.iterdir()) == []


def test_without_onnx_runtime_it_names_the_extra(graph, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'medseg-trt\[cpu\]'"), observer(graph, ["doubled"]):
        pass
