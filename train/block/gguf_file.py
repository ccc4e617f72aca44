"""Read tensors from an untrusted GGUF file.

The layout is GGUF version 2 and 3, little-endian: a header of typed metadata, one entry per tensor, then the data. The
header is not read by ``gguf.GGUFReader``, which loops without a limit on damaged or malicious files; the ``gguf``
package provides the tensor types and the dequantisation. Source: ggml, ``docs/gguf.md``.
"""

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medseg_trt.errors import ArtefactError, require

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_METADATA = 1 << 16  # entries; real files have about 30
MAX_TENSORS = 1 << 16  # real files have at most a few thousand
MAX_ARRAY_ITEMS = 1 << 22  # the longest array is a tokenizer's merges, about 300,000
MAX_DIMENSIONS = 4
MAX_STRING_BYTES = 1 << 24
STRING, ARRAY = 8, 9
SCALARS: Mapping[int, str] = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
UNQUANTISED: Mapping[str, torch.dtype] = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufTensor:
    """The location and format of one tensor in the file."""

    shape: tuple[int, ...]  # in PyTorch's order: rows first
    type_name: str  # a name of ``gguf.GGMLQuantizationType``, for example "Q4_1"
    start: int  # offset in the file, bytes
    size: int  # bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufFile:
    """The header of a GGUF file: metadata without arrays, and the entries of the tensors."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    def read(self, name: str) -> Tensor:
        """Return one tensor: float16, bfloat16 and float32 as they are, quantised types as float32.

        Raises:
            ArtefactError: the tensor is of a type that cannot be dequantised.
        """
        gguf = require("gguf", "train")
        tensor = self.tensors[name]
        data = np.fromfile(self.path, np.uint8, tensor.size, offset=tensor.start)
        if tensor.type_name in UNQUANTISED:
            return torch.from_numpy(data).view(UNQUANTISED[tensor.type_name]).reshape(tensor.shape)
        try:
            rows = data.reshape(*tensor.shape[:-1], -1)
            with np.errstate(over="ignore", invalid="ignore"):  # the caller checks that values are finite
                values = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[tensor.type_name])
        except NotImplementedError as error:
            raise ArtefactError(
                f"{self.path}: {name} has the type {tensor.type_name}, which cannot be dequantised; "
                "convert the model to F16 or Q8_0"
            ) from error
        return torch.from_numpy(np.ascontiguousarray(values, np.float32)).reshape(tensor.shape)


def open_gguf(path: Path) -> GgufFile:
    """Read and check the header of a GGUF file; no tensor is loaded.

    Raises:
        ArtefactError: the file is no GGUF file or truncated, or its header is implausible.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read_header(path, data)
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{path} is not a usable GGUF file: {error}") from error


class _Cursor:
    """Reads little-endian values one after another, within the bounds of the file."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.offset = 0

    def skip(self, size: int) -> int:
        """Skip ``size`` bytes and return their offset."""
        start = self.offset
        if size > len(self.data) - start:
            raise ValueError(f"its header asks for {size} bytes at byte {start}, but the file ends at {len(self.data)}")
        self.offset += size
        return start

    def number(self, code: str) -> Any:
        """Read one number of a ``struct`` code."""
        return struct.unpack_from("<" + code, self.data, self.skip(struct.calcsize("<" + code)))[0]

    def count(self, limit: int, unit: str) -> int:
        """Read a count and check its limit."""
        number = self.number("Q")
        if number > limit:
            raise ValueError(f"its header claims {number} {unit}; the limit is {limit}")
        return number

    def string(self) -> str:
        """Read a string: its length in bytes, then UTF-8."""
        size = self.count(MAX_STRING_BYTES, "bytes of text")
        start = self.skip(size)
        return self.data[start : start + size].decode("utf-8")

    def value(self) -> Any:
        """Read a typed value; arrays are skipped and returned as None."""
        kind = self.number("I")
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            return self.skip_array()
        return self.number(_scalar(kind))

    def skip_array(self) -> None:
        """Skip an array of numbers or strings."""
        kind, count = self.number("I"), self.count(MAX_ARRAY_ITEMS, "array items")
        if kind == STRING:
            for _ in range(count):
                self.skip(self.number("Q"))
        else:
            self.skip(count * struct.calcsize("<" + _scalar(kind)))


def _scalar(kind: int) -> str:
    if kind not in SCALARS:
        raise ValueError(f"its header has a value of the unknown type {kind}")
    return SCALARS[kind]


def _read_header(path: Path, data: mmap.mmap) -> GgufFile:
    cursor = _Cursor(data)
    if data[: cursor.skip(len(MAGIC)) + len(MAGIC)] != MAGIC:
        raise ValueError("it does not begin with the letters GGUF")
    version = cursor.number("I")
    if version not in VERSIONS:
        raise ValueError(
            f"it is of version {version}; versions {VERSIONS[0]} and {VERSIONS[1]}, little-endian, can be read"
        )
    num_tensors, num_entries = cursor.count(MAX_TENSORS, "tensors"), cursor.count(MAX_METADATA, "metadata entries")
    metadata = dict(_unique("metadata entry", [(cursor.string(), cursor.value()) for _ in range(num_entries)]))
    entries = _unique("tensor", [_read_entry(cursor) for _ in range(num_tensors)])
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= mmap.PAGESIZE:
        raise ValueError(f"general.alignment is {alignment!r}")
    origin = -(-cursor.offset // alignment) * alignment
    tensors = {name: _tensor(name, entry, origin, len(data)) for name, entry in entries}
    return GgufFile(path=path, metadata=metadata, tensors=tensors)


def _unique(kind: str, entries: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    names = [name for name, _ in entries]
    if len(set(names)) < len(names):
        raise ValueError(f"its header names a {kind} twice")
    return entries


def _read_entry(cursor: _Cursor) -> tuple[str, tuple[tuple[int, ...], int, int]]:
    name, num_dimensions = cursor.string(), cursor.number("I")
    if num_dimensions > MAX_DIMENSIONS:
        raise ValueError(f"its tensor {name!r} claims {num_dimensions} dimensions")
    shape = tuple(cursor.number("Q") for _ in range(num_dimensions))[::-1]  # the file lists the fastest axis first
    return name, (shape, cursor.number("I"), cursor.number("Q"))


def _tensor(name: str, entry: tuple[tuple[int, ...], int, int], origin: int, file_size: int) -> GgufTensor:
    gguf = require("gguf", "train")
    shape, kind, offset = entry
    quantisation = gguf.GGMLQuantizationType(kind)  # ValueError for an unknown number
    block_items, block_bytes = gguf.GGML_QUANT_SIZES[quantisation]
    if not shape or 0 in shape or shape[-1] % block_items:
        raise ValueError(
            f"its tensor {name!r} of shape {shape} cannot hold whole {quantisation.name} blocks of {block_items}"
        )
    start, size = origin + offset, prod(shape) // block_items * block_bytes
    if start + size > file_size:
        raise ValueError(f"its tensor {name!r} ends at byte {start + size}, but the file ends at {file_size}")
    return GgufTensor(shape=shape, type_name=quantisation.name, start=start, size=size)
