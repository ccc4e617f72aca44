"""Write several forms of a network into one folder, with one file that holds the weights of all of them.

A tensor that several graphs use is written once, and everything is written as it is read: the weights are never in
memory a second time. The bytes depend on the graphs alone.

Source: ONNX, "External Data"; ONNX Runtime and OpenVINO map a tensor into memory where its offset allows it.
"""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
import onnx_ir as ir

from medseg_trt.errors import MedsegError
from medseg_trt.export.graph.trace import OnnxGraph

INLINE_BYTES = 1024  # smaller tensors stay in the graph, where shape inference can read them
PAGE_BYTES, LINE_BYTES = 4096, 64  # a tensor of a page or more begins on a page, a smaller one on a cache line

Digest = tuple[str, ir.DataType, tuple[int, ...]]


def save_graphs(graphs: Mapping[str, OnnxGraph], folder: Path, weights_name: str) -> None:
    """Write the graphs, and beside them the weights that they share; ONNX's own checker reads all of it again.

    Args:
        graphs: by file name, for example ``int8.onnx``.
        folder: exists, and does not hold ``weights_name`` yet.
        weights_name: the name of the file with the weights.

    Raises:
        MedsegError: a name is no plain file name, the weights are there already, or the checker refuses a graph.
    """
    for name in (*graphs, weights_name):
        if Path(name).name != name:
            raise MedsegError(f"{name!r} is no plain file name; ONNX Runtime reads weights beside the graph only")
    if (folder / weights_name).exists():
        raise MedsegError(f"{folder / weights_name} exists; write into an empty folder")
    places = _write_weights(graphs, folder / weights_name)
    for name, graph in graphs.items():
        _write_graph(graph, folder / name, weights_name, places)


def _write_weights(graphs: Mapping[str, OnnxGraph], path: Path) -> Mapping[int, int]:
    """Write every distinct tensor once and return the offset of each tensor, by its identity in memory."""
    offsets: dict[Digest, int] = {}
    places: dict[int, int] = {}
    with path.open("xb") as file:
        for tensor in (tensor for graph in graphs.values() for tensor in _large_tensors(graph.model)):
            if id(tensor) in places:
                continue
            digest = _digest(tensor)
            if digest not in offsets:
                _pad(file, PAGE_BYTES if tensor.nbytes >= PAGE_BYTES else LINE_BYTES)
                offsets[digest] = file.tell()
                _copy(tensor, file)
            places[id(tensor)] = offsets[digest]
    return places


def _write_graph(graph: OnnxGraph, path: Path, weights_name: str, places: Mapping[int, int]) -> None:
    model = graph.model.clone()  # shares the tensors, so that their places are known
    for value in model.graph.initializers.values():
        tensor = value.const_value
        assert tensor is not None  # an initializer without a value cannot be written at all
        if id(tensor) not in places:
            value.const_value = ir.Tensor(tensor.numpy().copy(), tensor.dtype, name=value.name)
        else:
            value.const_value = ir.ExternalTensor(
                weights_name, places[id(tensor)], tensor.nbytes, tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()), name=value.name or "", base_dir=path.parent,
            )  # fmt: skip
    ir.save(model, path)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise MedsegError(f"ONNX refuses {path.name}, which was just written: {error}") from error


def _large_tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.const_value.nbytes >= INLINE_BYTES:
            yield value.const_value


class _Hash:
    """A file that keeps nothing of what is written but its SHA-256."""

    def __init__(self) -> None:
        self.sha256 = hashlib.sha256()

    def write(self, data: Any) -> int:
        flat = np.frombuffer(data, np.uint8)  # PyTorch hands over a buffer of two axes, which SHA-256 refuses
        self.sha256.update(flat.data)
        return len(flat)


def _digest(tensor: ir.TensorProtocol) -> Digest:
    content = _Hash()
    _copy(tensor, content)
    return content.sha256.hexdigest(), tensor.dtype, tuple(tensor.shape.numpy())


def _copy(tensor: Any, file: Any) -> None:
    tensor.tofile(file)  # every class of tensors has it, but the protocol does not say so


def _pad(file: BinaryIO, alignment: int) -> None:
    file.write(b"\0" * (-file.tell() % alignment))
