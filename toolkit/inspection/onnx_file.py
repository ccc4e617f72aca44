"""Describe an ONNX file: its inputs, outputs, operators and weights."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from medseg_trt.errors import ArtefactError, require
from medseg_trt.files import sha256

MAX_GRAPH_BYTES = 1 << 31  # what a protobuf can hold


@dataclass(frozen=True, kw_only=True, slots=True)
class OnnxDescription:
    """The content of an ONNX file."""

    sha256: str
    producer: str
    opsets: Mapping[str, int]  # version by domain
    inputs: Mapping[str, str]  # type and shape by name
    outputs: Mapping[str, str]
    operators: Mapping[str, int]  # number of nodes by type, the largest first
    parameters: int
    external_weights: tuple[str, ...]  # names of the files that hold weights

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that JSON can hold."""
        return {**asdict(self), "external_weights": list(self.external_weights)}


def describe_onnx(path: Path) -> OnnxDescription:
    """Describe a graph without reading weights from other files.

    Raises:
        ArtefactError: it is no ONNX file.
        MissingExtraError: onnx is not installed.
    """
    onnx = require("onnx", "export")
    if path.stat().st_size > MAX_GRAPH_BYTES:
        raise ArtefactError(f"{path} is larger than {MAX_GRAPH_BYTES >> 30} GiB, which no ONNX graph can be")
    try:
        model = onnx.load(path, load_external_data=False)
        digest = sha256(path)
    except Exception as error:  # protobuf's errors have no common base but Exception
        raise ArtefactError(f"{path} is no ONNX file: {' '.join(str(error).split())[:200]}") from error
    if not model.graph.output:
        raise ArtefactError(f"{path} is no ONNX file: it has no outputs")
    graph = model.graph
    locations = {
        str(entry.value)  # a damaged file may hold bytes that are no text
        for tensor in graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return OnnxDescription(
        sha256=digest,
        producer=f"{model.producer_name} {model.producer_version}".strip(),
        opsets={opset.domain or "ai.onnx": opset.version for opset in model.opset_import},
        inputs={value.name: _type_of(value, onnx) for value in graph.input},
        outputs={value.name: _type_of(value, onnx) for value in graph.output},
        operators=dict(Counter(node.op_type for node in graph.node).most_common()),
        parameters=sum(_size(tensor.dims) for tensor in graph.initializer),
        external_weights=tuple(sorted(locations)),
    )


def _type_of(value: Any, onnx: Any) -> str:
    tensor = value.type.tensor_type
    shape = ", ".join(dim.dim_param or str(dim.dim_value) for dim in tensor.shape.dim)
    return f"{onnx.TensorProto.DataType.Name(tensor.elem_type).lower()} ({shape})"


def _size(dims: Any) -> int:
    size = 1
    for dim in dims:
        size *= dim
    return size
