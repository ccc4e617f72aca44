"""Write several graphs of a network into one folder, with one file for the weights of all of them.

A tensor that several graphs use is written once. Tensors are streamed, so that weights are never copied in memory. The
bytes depend on the graphs only.

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
PAGE_BYTES, LINE_BYTES = 4096, 64  # alignment of tensors of a page or more, and of smaller ones (cache line)

Digest = tuple[str, ir.DataType, tuple[int, ...]]


def save_graphs(graphs: Mapping[str, OnnxGraph], folder: Path, weights_name: str) -> None:
    """Write the graphs and the file of their shared weights, and check them with ONNX's checker.

    Args:
        graphs: by file name, for example ``int8.onnx``.
        folder: exists, and contains no file ``weights_name``.
        weights_name: name of the weights file.

    Raises:
        MedsegError: a name is no plain file name, the weights file exists, or the checker rejects a graph.
    """
    for name in (*graphs, weights_name):
        if Path(name).name != name:
            raise MedsegError(f"{name!r} is no plain file name; ONNX Runtime reads weights beside the graph only")
    if (folder / weights_name).exists():
        raise MedsegError(f"{folder / weights_name} exists; write into an empty folder")
    offsets = _write_weights(graphs, folder / weights_name)
    for name, graph in graphs.items():
        _write_graph(graph, folder / name, weights_name, offsets)


def _write_weights(graphs: Mapping[str, OnnxGraph], path: Path) -> Mapping[int, int]:
    """Write every distinct tensor once and return the offset of each tensor, by its identity in memory."""
    by_digest: dict[Digest, int] = {}
    by_identity: dict[int, int] = {}
    with path.open("xb") as file:
        for tensor in (tensor for graph in graphs.values() for tensor in _large_tensors(graph.model)):
            if id(tensor) in by_identity:
                continue
            digest = _digest(tensor)
            if digest not in by_digest:
                _pad(file, PAGE_BYTES if tensor.nbytes >= PAGE_BYTES else LINE_BYTES)
                by_digest[digest] = file.tell()
                _copy(tensor, file)
            by_identity[id(tensor)] = by_digest[digest]
    return by_identity


def _write_graph(graph: OnnxGraph, path: Path, weights_name: str, offsets: Mapping[int, int]) -> None:
    model = graph.model.clone()  # shares the tensors, so that their offsets are known
    for value in model.graph.initializers.values():
        tensor = value.const_value
        assert tensor is not None  # initializers have values
        if id(tensor) not in offsets:
            value.const_value = ir.Tensor(tensor.numpy().copy(), tensor.dtype, name=value.name)
        else:
            value.const_value = ir.ExternalTensor(
                weights_name,
                offsets[id(tensor)],
                tensor.nbytes,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=value.name or "",
                base_dir=path.parent,
            )
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
    """A writable file that computes the SHA-256 of its content and stores nothing."""

    def __init__(self) -> None:
        self.sha256 = hashlib.sha256()

    def write(self, data: Any) -> int:
        flat = np.frombuffer(data, np.uint8)  # PyTorch passes a buffer of two axes, which hashlib rejects
        self.sha256.update(flat.data)
        return len(flat)


def _digest(tensor: ir.TensorProtocol) -> Digest:
    content = _Hash()
    _copy(tensor, content)
    return content.sha256.hexdigest(), tensor.dtype, tuple(tensor.shape.numpy())


def _copy(tensor: Any, file: Any) -> None:
    tensor.tofile(file)  # every tensor class has it, but the protocol does not declare it


def _pad(file: BinaryIO, alignment: int) -> None:
    file.write(b"\0" * (-file.tell() % alignment))
