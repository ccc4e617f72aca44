"""Append nodes that compute a mask from the logits, so that only uint8 labels leave the device.

The labels are those of ``preprocess.restore``: logits are resized linearly to the size of the 2-D image, with
half-pixel centres; the label is the largest logit, or ``> 0`` for a single logit. With a fixed pixel spacing, the
network's input was cropped or padded; then the graph has the size at that spacing as another input, and cropped pixels
become background.
"""

import numpy as np
import onnx_ir as ir

from medseg_trt.errors import UsageError
from medseg_trt.export.graph.interface import MASK, MASK_NODE, RESAMPLED, SIZE
from medseg_trt.export.graph.trace import OUTPUT, OnnxGraph
from medseg_trt.spec import Preprocessing


def require_linear(preprocessing: Preprocessing) -> None:
    """Reject preprocessing whose labels do not come from linearly resized logits.

    Raises:
        UsageError: labels are resized with a spline.
    """
    if preprocessing.resizes_with_splines:
        raise UsageError(
            f"--outputs mask: with resize={preprocessing.resize}, labels are resized to the image's size by SciPy, "
            "which a graph cannot do; choose --outputs logits"
        )


def with_masks(graph: OnnxGraph, preprocessing: Preprocessing) -> OnnxGraph:
    """Return a copy with the output ``mask`` and the input ``source_size``; a fixed spacing adds ``resampled_size``.

    Raises:
        UsageError: labels are resized with a spline.
    """
    require_linear(preprocessing)
    model = graph.model.clone()
    logits = next(value for value in model.graph.outputs if value.name == OUTPUT)
    assert logits.shape is not None  # ``trace.check`` requires it
    batch, classes = logits.shape[0], logits.shape[1]
    append = _Appender(model.graph)
    size = append.input(SIZE)
    placement = None if preprocessing.spacing_mm is None else _Placement(append, preprocessing, size)
    uncropped = logits if placement is None else placement.uncropped(logits)
    leading = append("Shape", [uncropped], ir.DataType.INT64, [2], start=0, end=2)
    sizes = append("Concat", [leading, size], ir.DataType.INT64, [4], axis=0)
    resized = append(
        "Resize",
        [uncropped, None, None, sizes],
        ir.DataType.FLOAT,
        [batch, classes, "height", "width"],
        mode="linear",
        coordinate_transformation_mode="half_pixel",
    )
    labels_shape = [batch, "height", "width"]
    if classes == 1:
        operands: list[ir.Value | None] = [resized, append.constant("zero", np.float32(0))]
        above = append("Greater", operands, ir.DataType.BOOL, [batch, 1, "height", "width"])
        labels = append("Squeeze", [above, append.constant("classes_axis", [1])], ir.DataType.BOOL, labels_shape)
    else:
        # The first of equal logits, as in ``preprocess.labels_of``.
        labels = append("ArgMax", [resized], ir.DataType.INT64, labels_shape, axis=1, keepdims=0, select_last_index=0)
    mask = append("Cast", [labels], ir.DataType.UINT8, labels_shape, to=int(ir.DataType.UINT8))
    if placement is not None:
        background = append.constant("background", np.uint8(0))
        mask = append("Where", [placement.inside(), mask, background], ir.DataType.UINT8, labels_shape)
    mask.name = MASK
    model.graph.outputs.append(mask)
    return OnnxGraph(model=model)


class _Placement:
    """The position of a resampled 2-D image on the network's input: ``preprocess._Axis`` as graph nodes.

    Values are int64 (2,): rows, columns. All comparisons use integers, so that rounding moves no edge.
    """

    def __init__(self, append: "_Appender", preprocessing: Preprocessing, size: ir.Value) -> None:
        self.append, self.size = append, size
        self.canvas = append.constant("canvas", preprocessing.image_size)
        self.resampled = append.input(RESAMPLED)
        self.zero, self.two = append.constant("none", [0, 0]), append.constant("two", [2, 2])
        margin = self._integers("Sub", self.canvas, self.resampled)
        odd = self._integers("Mod", margin, self.two)  # 0 or 1 for negative numbers, too: Div alone rounds towards 0
        self.offset = self._integers("Div", self._integers("Sub", margin, odd), self.two)

    def uncropped(self, logits: ir.Value) -> ir.Value:
        """Remove the padding, and repeat the edge where the image was cropped."""
        assert logits.shape is not None
        start = self._integers("Max", self.offset, self.zero)
        stop = self._integers("Add", self.offset, self.resampled)
        end = self._integers("Min", stop, self.canvas)
        shape = [logits.shape[0], logits.shape[1], "filled_height", "filled_width"]
        axes = self.append.constant("plane_axes", [2, 3])
        filled = self.append("Slice", [logits, start, end, axes], ir.DataType.FLOAT, shape)
        before, after = self._integers("Sub", start, self.offset), self._integers("Sub", stop, end)
        pads = self.append("Concat", [self.zero, before, self.zero, after], ir.DataType.INT64, [8], axis=0)
        shape = [logits.shape[0], logits.shape[1], "resampled_height", "resampled_width"]
        return self.append("Pad", [filled, pads], ir.DataType.FLOAT, shape, mode="edge")

    def inside(self) -> ir.Value:
        """Return a bool (height, width): the pixels of the source whose centre is on the network's input."""
        rows, columns = (self._inside(axis) for axis in range(2))
        axis = self.append.constant("columns_axis", [1])
        rows = self.append("Unsqueeze", [rows, axis], ir.DataType.BOOL, ["height", 1])
        return self.append("And", [rows, columns], ir.DataType.BOOL, ["height", "width"])

    def _inside(self, axis: int) -> ir.Value:
        """Compare ``(2 i + 1) resampled + 2 source offset``, the centre of pixel i, with 0 and ``2 source canvas``."""
        axis_index = self.append.constant(f"axis_{axis}", np.int64(axis))
        source, resampled, offset, canvas = (
            self.append("Gather", [value, axis_index], ir.DataType.INT64, [])
            for value in (self.size, self.resampled, self.offset, self.canvas)
        )
        zero, one, two = (self.append.constant(f"number_{value}", np.int64(value)) for value in range(3))
        name = ("height", "width")[axis]
        index = self.append("Range", [zero, source, one], ir.DataType.INT64, [name])
        odd = self._vector("Add", self._vector("Mul", index, two, name), one, name)
        scaled = self._vector("Mul", odd, resampled, name)
        twice = self._vector("Mul", source, two)
        centre = self._vector("Add", scaled, self._vector("Mul", twice, offset), name)
        above = self.append("GreaterOrEqual", [centre, zero], ir.DataType.BOOL, [name])
        below = self.append("Less", [centre, self._vector("Mul", twice, canvas)], ir.DataType.BOOL, [name])
        return self.append("And", [above, below], ir.DataType.BOOL, [name])

    def _integers(self, op_type: str, first: ir.Value, second: ir.Value) -> ir.Value:
        return self.append(op_type, [first, second], ir.DataType.INT64, [2])

    def _vector(self, op_type: str, first: ir.Value, second: ir.Value, name: str | None = None) -> ir.Value:
        return self.append(op_type, [first, second], ir.DataType.INT64, [] if name is None else [name])


class _Appender:
    """Adds nodes at the end of a graph, with their constants and the inputs for sizes."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.constants: dict[str, ir.Value] = {}
        self.count = 0

    def __call__(
        self,
        op_type: str,
        inputs: list[ir.Value | None],
        dtype: ir.DataType,
        shape: list[int | str | ir.SymbolicDim],
        **attributes: int | str,
    ) -> ir.Value:
        self.count += 1
        name = f"{self.count}_{op_type}"
        output = ir.Value(name=f"mask_{name}", shape=ir.Shape(shape), type=ir.TensorType(dtype))
        self.graph.append(ir.node(op_type, inputs, attributes, outputs=[output], name=f"{MASK_NODE}{name}"))
        return output

    def input(self, name: str) -> ir.Value:
        """Add an input: int64 (2,), height and width."""
        value = ir.Value(name=name, shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.INT64))
        self.graph.inputs.append(value)
        return value

    def constant(self, name: str, value: object) -> ir.Value:
        """Return a constant; integers are int64."""
        if name not in self.constants:
            array = np.asarray(value)
            value_name = f"mask_{name}"
            self.constants[name] = ir.val(value_name, const_value=ir.tensor(array, name=value_name))
            self.graph.register_initializer(self.constants[name])
        return self.constants[name]
