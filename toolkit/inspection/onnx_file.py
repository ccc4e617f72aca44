"""Say what is in an ONNX file: its inputs, outputs, operators and weights."""

from collections import Counter
from pathlib import Path
from typing import Any

from medseg_trt.errors import ArtefactError, require
from medseg_trt.files import sha256

MAX_GRAPH_BYTES = 1 << 31  # what a protobuf can hold


def describe_onnx(path: Path) -> dict[str, Any]:
    """Describe a graph; weights in a file of their own are not read.

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
    return {
        "sha256": digest,
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "opsets": {each.domain or "ai.onnx": each.version for each in model.opset_import},
        "inputs": {value.name: _type_of(value, onnx) for value in graph.input},
        "outputs": {value.name: _type_of(value, onnx) for value in graph.output},
        "operators": dict(Counter(node.op_type for node in graph.node).most_common()),
        "parameters": sum(_size(tensor.dims) for tensor in graph.initializer),
        "external_weights": sorted(
            {
                str(entry.value)  # a damaged file may hold bytes that are no text
                for tensor in graph.initializer
                for entry in tensor.external_data
                if entry.key == "location"
            }
        ),
    }


def _type_of(value: Any, onnx: Any) -> str:
    tensor = value.type.tensor_type
    shape = ", ".join(each.dim_param or str(each.dim_value) for each in tensor.shape.dim)
    return f"{onnx.TensorProto.DataType.Name(tensor.elem_type).lower()} ({shape})"


def _size(dims: Any) -> int:
    size = 1
    for each in dims:
        size *= each
    return size
