"""Small graphs written in ONNX's own text, and their outputs as ONNX Runtime computes them."""

from collections.abc import Mapping

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import onnx_ir as ir
import onnxruntime

from medseg_trt.export.graph.functions import attach
from medseg_trt.export.graph.onnx_graph import KEPT_METADATA, OPSET, OnnxGraph

HEADER = f'<ir_version: 10, opset_import: ["": {OPSET}, "medseg": 1]>'
MODULE = ": TransUNet/insert: Insert/step: aten.step"  # the module of all nodes


def graph_of(text: str, constants: Mapping[str, np.ndarray]) -> OnnxGraph:
    """Return the graph of a text such as ``g (float[2,3] x) => (float[2,3] y) { y = Relu (x) }``.

    Args:
        text: a graph in ONNX's syntax; inputs that ``constants`` names become initializers, whatever their shapes.
        constants: values by name.
    """
    model = onnx.parser.parse_model(f"{HEADER} {text}")
    for number, node in enumerate(model.graph.node):
        node.name = f"node_{number}_{node.output[0]}"
        entry = node.metadata_props.add()
        entry.key, entry.value = KEPT_METADATA, MODULE
    model.graph.initializer.extend(onnx.numpy_helper.from_array(values, name) for name, values in constants.items())
    with_functions = ir.from_proto(model)
    attach(with_functions)
    inferred = onnx.shape_inference.infer_shapes(ir.to_proto(with_functions), strict_mode=True, data_prop=True)
    return OnnxGraph(model=ir.from_proto(inferred))


def outputs_of(graph: OnnxGraph, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return every output of a valid graph; ONNX Runtime runs it without optimisation."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    proto = ir.to_proto(graph.model)
    onnx.checker.check_model(proto)  # ONNX Runtime also accepts nodes that are out of order
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, map(np.asarray, session.run(names, dict(feeds))), strict=True))


def largest_change(before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]) -> float:
    """Return the largest difference of any output, as a share of its largest magnitude."""
    assert before.keys() == after.keys()
    differences = (np.abs(after[name].astype(np.float64) - before[name]).max() for name in before)
    sizes = (max(float(np.abs(values).max()), 1e-30) for values in before.values())
    return float(max(difference / size for difference, size in zip(differences, sizes, strict=True)))
