"""The inputs and outputs of a bundle's graphs: those that a network requires, and those of an ONNX file.

The inputs of a graph that makes masks depend on the preprocessing: with a fixed pixel spacing, ``resampled_size`` is
another input. A graph of other preprocessing runs without an error and labels wrong pixels, so files and manifest are
compared before a graph is used. The reader needs no package: inference works without ``onnx``.
Source: ONNX, ``onnx.proto`` (``ModelProto``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from medseg_trt.errors import ArtefactError
from medseg_trt.export.graph.onnx_wire import fields, messages, only
from medseg_trt.files import read_limited
from medseg_trt.network_spec import NetworkSpec
from medseg_trt.spec import Preprocessing

INPUT, OUTPUT = "pixel_values", "logits"  # float32 (batch, 3, height, width) -> float32 (batch, classes, height, width)
SIZE, MASK = "source_size", "mask"  # int64 (2,): height and width in pixels -> uint8 (batch, height, width)
RESAMPLED = "resampled_size"  # int64 (2,): the same at the network's spacing, ``preprocess.resampled_size``
MASK_NODE = "node_mask_"  # how the names of the nodes begin that make masks of logits
CHANNELS = 3
MAX_GRAPH_BYTES = 1 << 24  # without weights, which are in a separate file; the graph of ViT-B has 2^20
MODEL_GRAPH, GRAPH_INPUT, GRAPH_OUTPUT, VALUE_NAME, VALUE_TYPE = 7, 11, 12, 1, 2  # field numbers of onnx.proto
TYPE_TENSOR, TENSOR_SHAPE, SHAPE_DIM, DIM_VALUE = 1, 2, 1, 1

Axes = tuple[int | None, ...]  # None: the axis is free


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphInterface:
    """The inputs and outputs of a graph by name, with their axes."""

    inputs: Mapping[str, Axes]
    outputs: Mapping[str, Axes]


def required_interface(model: NetworkSpec, preprocessing: Preprocessing, outputs: str) -> GraphInterface:
    """Return the inputs and outputs that the graphs of a network must have.

    Args:
        model: the network.
        preprocessing: of the network.
        outputs: ``BuildSpec.outputs``: logits, or mask.
    """
    inputs: dict[str, Axes] = {INPUT: (None, CHANNELS, *model.image_size)}
    results: dict[str, Axes] = {OUTPUT: (None, model.num_classes, *model.image_size)}
    if outputs == "mask":
        results[MASK] = (None, None, None)
        inputs[SIZE] = (2,)
        if preprocessing.spacing_mm is not None:
            inputs[RESAMPLED] = (2,)
    return GraphInterface(inputs=inputs, outputs=results)


def require_interface(path: Path, content: bytes, required: GraphInterface) -> None:
    """Reject an ONNX file whose inputs and outputs are not the required ones.

    Args:
        path: of the file, for the message.
        content: of the file.
        required: what it must take and give.

    Raises:
        ArtefactError: they differ, or it is no ONNX file.
    """
    actual = parse_interface(path, content)
    if actual != required:
        raise ArtefactError(
            f"{path} does not match its manifest: it takes {_describe(actual.inputs)} and gives "
            f"{_describe(actual.outputs)}, but the manifest's preprocessing needs {_describe(required.inputs)} and "
            f"{_describe(required.outputs)}, so its masks would be wrong. "
            "Build the bundle again: medseg-trt build --ckpt run/best.pt"
        )


def read_interface(path: Path) -> GraphInterface:
    """Read the inputs and outputs of an ONNX file.

    Raises:
        ArtefactError: it is no ONNX file, or too large for one of a bundle.
    """
    return parse_interface(path, read_limited(path, MAX_GRAPH_BYTES))


def parse_interface(path: Path, content: bytes) -> GraphInterface:
    """Return the inputs and outputs of an ONNX file; ``path`` is for the message.

    Raises:
        ArtefactError: it is no ONNX file.
    """
    try:
        graph = only(memoryview(content), MODEL_GRAPH)
        inputs, outputs = (
            dict(_value(value) for value in messages(graph, number)) for number in (GRAPH_INPUT, GRAPH_OUTPUT)
        )
    except ValueError as error:
        raise ArtefactError(f"{path} is no ONNX file, or is damaged: {error}") from error
    return GraphInterface(inputs=inputs, outputs=outputs)


def size_inputs(
    names: Sequence[str], size: Sequence[int], resampled: Sequence[int]
) -> dict[str, Int64[ndarray, " axes"]]:
    """Return the inputs of a graph that makes masks, without the images.

    Args:
        names: of the graph's inputs, without the images.
        size: height and width of the source images in pixels.
        resampled: the same at the network's pixel spacing, ``preprocess.resampled_size``.

    Raises:
        ArtefactError: the graph has another input.
    """
    known = {SIZE: size, RESAMPLED: resampled}
    if unknown := [name for name in names if name not in known]:
        raise ArtefactError(
            f"the graph takes {', '.join(unknown)}, which no bundle of this version has; build the bundle again: "
            "medseg-trt build --ckpt run/best.pt"
        )
    return {name: np.array(known[name], np.int64) for name in names}


def _describe(values: Mapping[str, Axes]) -> str:
    return ", ".join(
        f"{name} ({', '.join('free' if axis is None else str(axis) for axis in axes)})" for name, axes in values.items()
    )


def _value(message: memoryview) -> tuple[str, Axes]:
    name = bytes(only(message, VALUE_NAME)).decode()
    shape = only(only(only(message, VALUE_TYPE), TYPE_TENSOR), TENSOR_SHAPE)
    return name, tuple(_axis(dimension) for dimension in messages(shape, SHAPE_DIM))


def _axis(dimension: memoryview) -> int | None:
    return next((int(value) for number, value in fields(dimension) if number == DIM_VALUE), None)  # pyright: ignore[reportArgumentType]  # a varint
