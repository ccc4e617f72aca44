"""Trace a network to ONNX: standard operators only, any batch size, every name and every shape known.

Source: the exporter of PyTorch (``torch.onnx.export``, ``dynamo=True``). Its output is checked, because it silently
uses another operator set where it does not support the requested one.
"""

import logging
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence

import onnx_ir as ir
import torch

from medseg_trt.errors import MedsegError
from medseg_trt.export.graph.interface import INPUT, OUTPUT
from medseg_trt.export.graph.onnx_graph import KEPT_METADATA, OPSET, OnnxGraph
from medseg_trt.train.models.segmentation_model import SegmentationModel

TRACED_OPSETS: Sequence[Mapping[str, int]] = ({"": OPSET},)
EXAMPLE_BATCH = 2  # a batch of 1 would be traced as a constant


def trace(model: SegmentationModel) -> OnnxGraph:
    """Return the network as an ONNX graph from ``pixel_values`` to ``logits``, both float32.

    The shapes are (batch, 3, H, W) and (batch, classes, H, W); the batch is free.

    Args:
        model: in evaluation mode, on the CPU; the graph shares its tensors.

    Raises:
        MedsegError: ``check`` rejects the exported graph.
    """
    example = torch.zeros(EXAMPLE_BATCH, 3, *model.spec.image_size)
    torch_logger = logging.getLogger("torch.onnx._internal.exporter")
    level = torch_logger.level
    torch_logger.setLevel(logging.ERROR)  # it warns that torchvision is not installed
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)  # PyTorch calls a deprecated function
            program = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                opset_version=OPSET,
                optimize=True,
                verbose=False,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )
    finally:
        torch_logger.setLevel(level)
    assert program is not None  # it is None only if a file is written
    graph = OnnxGraph(model=program.model)
    _strip(graph.model)
    check(graph, model.spec.image_size, model.spec.num_classes)
    return graph


def check(
    graph: OnnxGraph,
    image_size: tuple[int, int],
    num_classes: int,
    opsets: Sequence[Mapping[str, int]] = TRACED_OPSETS,
) -> None:
    """Check the properties that the toolkit requires of a graph.

    Args:
        graph: as traced, or after a later pass.
        image_size: height and width in pixels.
        num_classes: channels of the logits.
        opsets: the allowed combinations of operator sets; functions are allowed in their domains only.

    Raises:
        MedsegError: another operator set, a function of another domain, a duplicate or missing name, an unknown type or
            shape, or another input or output.
    """
    model, problems = graph.model, list[str]()
    if model.opset_imports not in opsets:
        problems.append(f"the operator sets are {model.opset_imports}, not {' or '.join(map(str, opsets))}")
    problems += [f"there is a function {name}" for domain, name, _ in model.functions if domain not in opsets[-1]]
    nodes = list(model.graph)
    for kind, names in (
        ("node", [node.name for node in nodes]),
        ("value", [value.name for value in (*model.graph.inputs, *(out for node in nodes for out in node.outputs))]),
    ):
        problems += [f"{count} {kind}s are called {name!r}" for name, count in Counter(names).items() if count > 1]
        problems += [f"a {kind} has no name" for name in names if not name]
    for value in (out for node in nodes for out in node.outputs):
        if value.shape is None or value.type is None:
            problems.append(f"the type or the shape of {value.name} is unknown")
    batch = model.graph.inputs[0].shape and model.graph.inputs[0].shape[0]
    for kind, values, expected in (
        ("input", model.graph.inputs, {INPUT: [3, *image_size]}),
        ("output", model.graph.outputs, {OUTPUT: [num_classes, *image_size]}),
    ):
        shapes = {value.name: list(value.shape or [])[1:] for value in values}
        if shapes != expected:
            problems.append(f"the {kind}s are {shapes}, not {expected}")
        if not isinstance(batch, ir.SymbolicDim) or any(
            value.shape is None or value.shape[0] != batch for value in values
        ):
            problems.append(f"the batch of the {kind} is fixed")
    if problems:
        raise MedsegError(f"the traced graph cannot be used: {'; '.join(problems[:3])}")


def _strip(model: ir.Model) -> None:
    """Remove the exporter's metadata, which describes this machine, except the module of each node."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.producer_name, model.producer_version = "medseg-trt", None
    for node in model.graph:
        producer = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
        if KEPT_METADATA not in node.metadata_props and producer is not None:
            # The exporter omits it where a PyTorch operator has several outputs.
            node.metadata_props[KEPT_METADATA] = producer.metadata_props[KEPT_METADATA]
        for key in [key for key in node.metadata_props if key != KEPT_METADATA]:
            del node.metadata_props[key]
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
