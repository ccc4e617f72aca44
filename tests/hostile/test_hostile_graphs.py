"""Graphs that were made to run something else, read another file, or take all time or memory."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from stored_bundle import WEIGHTS, edit_graphs, stored_bundle

from medseg_trt.bundles.bundle import load_bundle
from medseg_trt.errors import ArtefactError
from medseg_trt.export.graph.operators import MAX_NODES
from medseg_trt.sessions.open import open_session

OPEN_FOR_2_S = """
import sys, time
from pathlib import Path
from medseg_trt.bundles.bundle import load_bundle
from medseg_trt.errors import ArtefactError
from medseg_trt.sessions import first_run
from medseg_trt.sessions.open import open_session

first_run.BASE_S = 2.0
bundle = load_bundle(Path(sys.argv[1]))
began = time.process_time()
try:
    open_session(bundle, "onnxruntime", threads=1)
except ArtefactError as error:
    print(error)
print(time.process_time() - began)
"""
Change = Callable[[onnx.ModelProto], object]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return stored_bundle(tmp_path / "model.medseg")


def loop(model: onnx.ModelProto) -> None:
    body = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "body", [], [])
    model.graph.node.append(helper.make_node("Loop", ["", ""], ["z"], body=body))


def body_inside_a_known_operator(model: onnx.ModelProto) -> None:
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "body", [], [])
    model.graph.node[0].attribute.append(helper.make_attribute("body", graph))


def unknown_operator(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("RandomUniform", [], ["noise"], shape=[2**20, 2**20]))


def custom_operator(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("PyOp", ["pixel_values"], ["z"], domain="ai.onnx.contrib"))


def standard_operator_of_another_domain(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Relu", ["pixel_values"], ["z"], domain="medseg"))


def unknown_function(model: onnx.ModelProto) -> None:
    opsets = [helper.make_opsetid("", 18)]
    nodes = [helper.make_node("Relu", ["x"], ["y"])]
    model.functions.append(helper.make_function("medseg", "Boom", ["x"], ["y"], nodes, opsets))


def function_that_calls_functions(model: onnx.ModelProto) -> None:
    """Two calls in each of 40 functions would make 2^40 nodes."""
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("medseg", 1)]
    nodes = [helper.make_node("RMSNorm", ["x", "w"], [f"y{index}"], domain="medseg") for index in range(2)]
    del model.functions[:]
    model.functions.append(helper.make_function("medseg", "SwiGLU", ["x"], ["y0"], nodes, opsets))


def too_many_nodes(model: onnx.ModelProto) -> None:
    model.graph.node.extend(helper.make_node("Relu", ["pixel_values"], [f"z{index}"]) for index in range(MAX_NODES))


def training(model: onnx.ModelProto) -> None:
    model.training_info.add()


def sparse(model: onnx.ModelProto) -> None:
    model.graph.sparse_initializer.add()


def _external(tensor: TensorProto, **entries: object) -> None:
    del tensor.external_data[:]
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=str(value))


def weights_from(location: str) -> Change:
    def change(model: onnx.ModelProto) -> None:
        tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
        _external(tensor, location=location, offset=0, length=4)

    return change


def weights_beyond_the_end(model: onnx.ModelProto) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    _external(tensor, location=WEIGHTS, offset=2**40, length=4)


def two_locations(model: onnx.ModelProto) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    tensor.external_data.insert(0, onnx.StringStringEntryProto(key="location", value="/etc/passwd"))


def negative_offset(model: onnx.ModelProto) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    _external(tensor, location=WEIGHTS, offset=-4, length=4)


def weights_of_an_attribute(model: onnx.ModelProto) -> None:
    tensor = TensorProto(data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    _external(tensor, location="/etc/passwd")
    model.graph.node.append(helper.make_node("Constant", [], ["z"], value=tensor))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (loop, r"uses the operator ai\.onnx\.Loop"),
        (body_inside_a_known_operator, "has a graph inside"),
        (unknown_operator, r"uses the operator ai\.onnx\.RandomUniform"),
        (custom_operator, r"uses the operator ai\.onnx\.contrib\.PyOp"),
        (standard_operator_of_another_domain, r"uses the operator medseg\.Relu"),
        (unknown_function, r"defines the function medseg\.Boom"),
        (function_that_calls_functions, r"calls medseg\.RMSNorm in the function SwiGLU"),
        (too_many_nodes, f"more than {MAX_NODES} nodes"),
        (training, "has a training graph"),
        (sparse, "has sparse weights"),
        (weights_from("secret.bin"), "takes weights from 'secret.bin'"),
        (weights_from("/etc/passwd"), "takes weights from '/etc/passwd'"),
        (weights_from("../weights-fp32.bin"), "takes weights from"),
        (weights_from("*/_ORT_MEM_ADDR_/*"), "takes weights from"),
        (weights_beyond_the_end, "beyond the end"),
        (two_locations, "says twice"),
        (negative_offset, "is no offset"),
        (weights_of_an_attribute, "takes weights from '/etc/passwd'"),
    ],
)
def test_a_graph_that_no_exporter_of_ours_writes_is_refused(folder, change: Change, match):
    edit_graphs(folder, change)
    (folder / "secret.bin").write_bytes(b"1234")
    with pytest.raises(ArtefactError, match=match) as raised:
        load_bundle(folder)
    assert "\n" not in str(raised.value)


def appended(model: onnx.ModelProto, nodes: list[onnx.NodeProto], *tensors: TensorProto) -> None:
    """Put nodes of known operators in front of the logits, so that no optimiser removes them."""
    last = next(node for node in model.graph.node if "logits" in node.output)
    last.output[list(last.output).index("logits")] = "before"
    model.graph.initializer.extend(tensors)
    model.graph.node.extend([*nodes, helper.make_node("Add", ["before", "more"], ["logits"])])


def much_memory(model: onnx.ModelProto) -> None:
    """64 GiB of float32 from a padding of 2^34 zeros, of which the maximum is added."""
    pads = numpy_helper.from_array(np.array([0, 0, 0, 0, 0, 0, 2**17, 2**17], np.int64), "pads")
    start, end = (numpy_helper.from_array(np.array([value], np.int64), name) for name, value in (("s", 0), ("e", 32)))
    axes = [numpy_helper.from_array(np.array([axis], np.int64), f"axis{axis}") for axis in (2, 3)]
    nodes = [
        helper.make_node("Pad", ["before", "pads"], ["padded"]),
        helper.make_node("Relu", ["padded"], ["large"]),
        helper.make_node("Slice", ["large", "s", "e", "axis2"], ["rows"]),
        helper.make_node("Slice", ["rows", "s", "e", "axis3"], ["more"]),
    ]
    appended(model, nodes, pads, start, end, *axes)


def much_memory_of_a_constant(model: onnx.ModelProto) -> None:
    """64 GiB of float32 from one number that is expanded; an optimiser computes it before the first run."""
    one = numpy_helper.from_array(np.ones((1, 1, 1, 1), np.float32), "one")
    shape = numpy_helper.from_array(np.array([1, 1, 2**17, 2**17], np.int64), "wide")
    start, end = (numpy_helper.from_array(np.array([value], np.int64), name) for name, value in (("s", 0), ("e", 32)))
    axes = [numpy_helper.from_array(np.array([axis], np.int64), f"axis{axis}") for axis in (2, 3)]
    nodes = [
        helper.make_node("Expand", ["one", "wide"], ["large"]),
        helper.make_node("Slice", ["large", "s", "e", "axis2"], ["rows"]),
        helper.make_node("Slice", ["rows", "s", "e", "axis3"], ["more"]),
    ]
    appended(model, nodes, one, shape, start, end, *axes)


def much_time(model: onnx.ModelProto) -> None:
    """A few thousand products of matrices of 32 x 32 padded to 2048 x 2048: minutes, in steps of a second."""
    pads = numpy_helper.from_array(np.array([0, 0, 0, 0, 0, 0, 2016, 2016], np.int64), "pads")
    bounds = [numpy_helper.from_array(np.array([value], np.int64), name) for name, value in (("s", 0), ("e", 32))]
    axes = [numpy_helper.from_array(np.array([axis], np.int64), f"axis{axis}") for axis in (2, 3)]
    nodes = [helper.make_node("Pad", ["before", "pads"], ["m0"])]
    nodes += [helper.make_node("MatMul", [f"m{index}", f"m{index}"], [f"m{index + 1}"]) for index in range(2000)]
    nodes += [
        helper.make_node("Slice", ["m2000", "s", "e", "axis2"], ["rows"]),
        helper.make_node("Slice", ["rows", "s", "e", "axis3"], ["more"]),
    ]
    appended(model, nodes, pads, *bounds, *axes)


@pytest.mark.parametrize("change", [much_memory, much_memory_of_a_constant])
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_graph_that_takes_all_memory_is_refused(folder, backend, change):
    edit_graphs(folder, change)
    with pytest.raises(ArtefactError):
        open_session(load_bundle(folder), backend, threads=1)


def test_a_graph_that_takes_all_time_is_refused(folder):
    """In a process of its own: the library cannot be interrupted, and computes until its process ends."""
    edit_graphs(folder, much_time)
    command = [sys.executable, "-P", "-c", OPEN_FOR_2_S, str(folder)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    message, processor_s = ran.stdout.splitlines()
    assert re.search(r"takes more than \d+ s of processor time", message)
    assert float(processor_s) < 10
