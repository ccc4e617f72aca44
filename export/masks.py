"""Append to a graph what makes a mask of its logits, so that nothing but uint8 labels has to leave the device.

The labels are those of ``preprocess.restore`` for a picture that was stretched to the network's size: logits brought to
the picture's own size linearly, with half-pixel centres, then the largest, or ``> 0`` for a single logit.
"""

import numpy as np
import onnx_ir as ir

from medseg_trt.errors import UsageError
from medseg_trt.export.trace import OUTPUT, OnnxGraph
from medseg_trt.spec import Preprocessing

SIZE, MASK = "source_size", "mask"  # int64 (2,): height and width in pixels -> uint8 (batch, height, width)


def require_stretched(preprocessing: Preprocessing) -> None:
    """Refuse pictures that are not simply stretched to the network's size.

    Raises:
        UsageError: pictures are cropped or padded by their pixel spacing, or labels are resized with a spline, which
            a graph does not undo.
    """
    if preprocessing.resizes_with_splines:
        raise UsageError(
            f"--outputs mask: with resize={preprocessing.resize}, labels are brought to the picture's size by SciPy, "
            "which is not done inside the graph; choose --outputs logits"
        )
    if preprocessing.spacing_mm is not None:
        raise UsageError(
            f"--outputs mask: images are brought to {preprocessing.spacing_mm:g} mm and cropped, which cannot be "
            "undone inside the graph; choose --outputs logits"
        )


def with_masks(graph: OnnxGraph, preprocessing: Preprocessing) -> OnnxGraph:
    """Return a copy with the further input ``source_size`` and the further output ``mask``.

    Raises:
        UsageError: pictures are cropped or padded by their pixel spacing, which such a graph does not undo.
    """
    require_stretched(preprocessing)
    model = graph.model.clone()
    logits = next(value for value in model.graph.outputs if value.name == OUTPUT)
    assert logits.shape is not None  # ``trace.check`` saw it
    batch, classes = logits.shape[0], logits.shape[1]
    size = ir.Value(name=SIZE, shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.INT64))
    model.graph.inputs.append(size)
    append = _Appender(model.graph)
    sizes = append("Concat", [append("Shape", [logits], ir.DataType.INT64, [2], start=0, end=2), size],
                   ir.DataType.INT64, [4], axis=0)  # fmt: skip
    resized = append(
        "Resize", [logits, None, None, sizes], ir.DataType.FLOAT, [batch, classes, "height", "width"],
        mode="linear", coordinate_transformation_mode="half_pixel",
    )  # fmt: skip
    if classes == 1:
        zero = ir.val("mask_zero", const_value=ir.tensor(np.float32(0), name="mask_zero"))
        model.graph.register_initializer(zero)
        above = append("Greater", [resized, zero], ir.DataType.BOOL, [batch, 1, "height", "width"])
        first = ir.val("mask_axis", const_value=ir.tensor(np.array([1]), name="mask_axis"))
        model.graph.register_initializer(first)
        labels = append("Squeeze", [above, first], ir.DataType.BOOL, [batch, "height", "width"])
    else:
        labels = append("ArgMax", [resized], ir.DataType.INT64, [batch, "height", "width"], axis=1, keepdims=0)
    mask = append("Cast", [labels], ir.DataType.UINT8, [batch, "height", "width"], to=int(ir.DataType.UINT8))
    mask.name = MASK
    model.graph.outputs.append(mask)
    return OnnxGraph(model=model)


class _Appender:
    """Adds nodes at the end of a graph."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph

    def __call__(
        self,
        op_type: str,
        inputs: list[ir.Value | None],
        dtype: ir.DataType,
        shape: list[int | str | ir.SymbolicDim],
        **attributes: int | str,
    ) -> ir.Value:
        name = f"mask_{op_type}"
        output = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        self.graph.append(ir.node(op_type, inputs, attributes, outputs=[output], name=f"node_{name}"))
        return output
