import json
import os
import signal
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from medseg_trt.bundles.bundle import load_bundle
from medseg_trt.devices import ComputeDevice
from medseg_trt.errors import ArtefactError, DeviceError
from medseg_trt.export.graph.masks import with_masks
from medseg_trt.export.graph.save import save_graphs
from medseg_trt.export.graph.trace import INPUT, OPSET, OUTPUT, OnnxGraph
from medseg_trt.sessions.open import open_session
from medseg_trt.sessions.session_request import SessionRequest
from medseg_trt.sessions.subprocess_session import ChildSession
from medseg_trt.spec import Preprocessing


@pytest.fixture
def graph(tiny_bundle):
    bundle = load_bundle(tiny_bundle)
    return bundle.folder / bundle.variant(bundle.default).graph


def open_child(graph) -> ChildSession:
    return ChildSession(
        SessionRequest(backend="onnxruntime", path=graph, precision="fp32", compute_dtype="fp32", threads=1)
    )


def test_a_child_answers_as_a_session_here(graph, tiny_bundle):
    images = np.random.default_rng(0).random((3, 3, 32, 32), dtype=np.float32)
    with open_child(graph) as child, open_session(load_bundle(tiny_bundle), "onnxruntime", threads=1) as here:
        np.testing.assert_array_equal(child.run(images), here.run(images))
        np.testing.assert_array_equal(child.run(images[:1]), here.run(images[:1]))  # it goes on answering
        assert (child.device, child.description) == (here.device, here.description)


def test_a_child_makes_masks_where_the_graph_does(tmp_path):
    image = ir.Value(name=INPUT, shape=ir.Shape(["batch", 3, 8, 8]), type=ir.TensorType(ir.DataType.FLOAT))
    logits = ir.Value(name=OUTPUT, shape=ir.Shape(["batch", 3, 8, 8]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("Neg", [image], outputs=[logits])
    network = ir.Graph([image], [logits], nodes=[node], opset_imports={"": OPSET}, name="network")
    graph = with_masks(OnnxGraph(model=ir.Model(network, ir_version=10)), Preprocessing(image_size=(16, 16)))
    save_graphs({"graph.onnx": graph}, tmp_path, "weights.bin")
    images = np.random.default_rng(0).random((2, 3, 8, 8), dtype=np.float32)
    with open_child(tmp_path / "graph.onnx") as child:
        assert child.gives_masks
        masks = child.masks(images, (8, 8), (16, 16))
    assert masks.dtype == np.uint8
    np.testing.assert_array_equal(masks, images.argmin(axis=1))


def test_child_session_measures_its_time_and_memory(graph):
    with open_child(graph) as child:
        samples = child.time(np.zeros((1, 3, 32, 32), np.float32), duration_s=0.0, min_runs=7)
        memory = child.memory()
    assert len(samples) == 7
    assert all(sample > 0 for sample in samples)
    assert 10 < memory["anonymous_mb"] < memory["peak_resident_mb"]  # a Python with ONNX Runtime takes tens of MB


def test_killed_child_session_raises_an_error_naming_the_signal(graph):
    with open_child(graph) as child:
        os.kill(child.process_id, signal.SIGSEGV)
        with pytest.raises(ArtefactError, match=r"onnxruntime with fp32\.onnx was killed by signal 11 \(SIGSEGV\)"):
            child.run(np.zeros((1, 3, 32, 32), np.float32))


def test_child_session_errors_are_raised_in_the_parent(graph, tmp_path):
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no onnx")
    with pytest.raises(ArtefactError, match="refuses"):
        open_child(broken)
    with pytest.raises(DeviceError, match="do not compute in bf16"):
        ChildSession(SessionRequest(backend="onnxruntime", path=graph, precision="fp32", compute_dtype="bf16"))


def test_closed_child_session_process_is_gone(graph):
    child = open_child(graph)
    child.close()
    with pytest.raises(ProcessLookupError):
        os.kill(child.process_id, 0)


def test_session_request_survives_a_json_round_trip():
    """Of several callers, each opens what the request says; without its form, another network would be timed."""
    request = SessionRequest(
        backend="pytorch",
        path=Path("run", "best.pt"),
        precision="fp32",
        compute_dtype="bf16",
        threads=2,
        device=ComputeDevice("cuda", 1),
        form="channels-last",
    )
    assert SessionRequest.parse(json.loads(json.dumps(request.to_dict()))) == request
