"""Requests and responses of the Open Inference Protocol (KServe v2), as JSON and with the binary tensor extension.

Requests are hostile: sizes are compared before an array is made, and every error is one line for the client.
Source: kserve/open-inference-protocol, ``inference_rest.md``; triton-inference-server, ``extension_binary_data.md``.
"""

import json
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NoReturn

import numpy as np
from numpy import ndarray

from medseg_trt.errors import InputError

DATATYPES: Mapping[str, np.dtype[Any]] = {
    "FP32": np.dtype("<f4"),
    "INT64": np.dtype("<i8"),
    "UINT8": np.dtype("u1"),
}
HEADER_LENGTH = "Inference-Header-Content-Length"
WHOLE_NUMBER = re.compile(r"[0-9]{1,18}")
MAX_AXES = 8
WINDOW_BITS = {"gzip": 31, "deflate": 15}  # zlib's
RAW_DEFLATE = -15  # what some clients send as deflate


class ProtocolError(InputError):
    """A request that cannot be answered.

    Attributes:
        status: the HTTP status of the answer.
    """

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestedOutput:
    """An output that a client asked for."""

    name: str
    binary: bool


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class InferRequest:
    """A parsed request."""

    id: str | None
    inputs: Mapping[str, ndarray]
    outputs: tuple[RequestedOutput, ...] | None  # None: all
    binary_outputs: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """An input or output of a model."""

    name: str
    datatype: str
    shape: tuple[int, ...]  # -1: free

    def as_json(self) -> dict[str, Any]:
        """Return it as the metadata of a model states it."""
        return {"name": self.name, "datatype": self.datatype, "shape": list(self.shape)}


def decompress(body: bytes, encoding: str, max_bytes: int) -> bytes:
    """Return a decompressed body.

    Raises:
        ProtocolError: the encoding is unknown, the data is damaged, or it has more than ``max_bytes``.
    """
    if encoding in ("", "identity"):
        return body
    if encoding not in WINDOW_BITS:
        raise ProtocolError(f"Content-Encoding {encoding!r} is not supported; use gzip or deflate", 415)
    bits = WINDOW_BITS[encoding]
    if encoding == "deflate" and (not body or body[0] & 0x0F != 8):
        bits = RAW_DEFLATE
    inflater = zlib.decompressobj(bits)
    try:
        plain = inflater.decompress(body, max_bytes + 1)
    except zlib.error as error:
        raise ProtocolError(f"the body is no valid {encoding} data") from error
    if len(plain) > max_bytes or inflater.unconsumed_tail:
        raise ProtocolError(f"the body has more than {max_bytes} bytes when decompressed", 413)
    if not inflater.eof or inflater.unused_data:
        raise ProtocolError(f"the body is no complete {encoding} data")
    return plain


def parse_request(body: bytes, header_length: str | None) -> InferRequest:
    """Parse a decompressed request.

    Args:
        body: JSON, then binary tensors where ``header_length`` is given.
        header_length: the header ``Inference-Header-Content-Length``: bytes of the JSON.

    Raises:
        ProtocolError: it is malformed.
    """
    if header_length is None:
        split = len(body)
    elif not WHOLE_NUMBER.fullmatch(header_length) or int(header_length) > len(body):
        raise ProtocolError(f"{HEADER_LENGTH} {header_length[:20]!r} is not a length within the body")
    else:
        split = int(header_length)
    content = _object(_parse_json(body[:split]), "the request")
    request_id = content.get("id")
    if request_id is not None and not isinstance(request_id, str):
        raise ProtocolError("id is no string")
    tail = _Tail(body[split:])
    inputs: dict[str, ndarray] = {}
    for entry in _list(content.get("inputs"), "inputs"):
        tensor = _object(entry, "an input")
        name = tensor.get("name")
        if not isinstance(name, str) or name in inputs:
            raise ProtocolError(f"an input has the name {name!r}; every input needs a name of its own")
        inputs[name] = _tensor(name, tensor, tail)
    if tail.left:
        raise ProtocolError(f"{tail.left} bytes follow the last binary tensor")
    parameters = _parameters(content)
    binary = parameters.get("binary_data_output") is True
    outputs = None if content.get("outputs") in (None, []) else _outputs(content["outputs"], binary)
    return InferRequest(id=request_id, inputs=inputs, outputs=outputs, binary_outputs=binary)


def format_response(
    head: Mapping[str, Any], outputs: Mapping[str, ndarray], request: InferRequest
) -> tuple[bytes, int | None]:
    """Return the body of a response, and the bytes of its JSON where binary tensors follow.

    Raises:
        ProtocolError: an output does not exist, or the network gives infinite values or NaN.
    """
    wanted = request.outputs or tuple(RequestedOutput(name=name, binary=request.binary_outputs) for name in outputs)
    described: list[dict[str, Any]] = []
    tail: list[bytes] = []
    for output in wanted:
        if output.name not in outputs:
            raise ProtocolError(f"there is no output {output.name!r}; outputs: {', '.join(outputs)}")
        values = outputs[output.name]
        if not np.isfinite(values).all():
            raise ProtocolError(f"output {output.name!r} holds NaN or infinite values: input values are too large")
        datatype = next(name for name, dtype in DATATYPES.items() if dtype == values.dtype)
        entry: dict[str, Any] = {"name": output.name, "datatype": datatype, "shape": list(values.shape)}
        if output.binary:
            tail.append(np.ascontiguousarray(values, DATATYPES[datatype]).tobytes())
            entry["parameters"] = {"binary_data_size": len(tail[-1])}
        else:
            entry["data"] = values.ravel().tolist()
        described.append(entry)
    content = dict(head) | ({"id": request.id} if request.id is not None else {}) | {"outputs": described}
    text = json.dumps(content, allow_nan=False, separators=(",", ":")).encode()
    return (b"".join((text, *tail)), len(text)) if tail else (text, None)


class _Tail:
    """The bytes after the JSON."""

    def __init__(self, content: bytes) -> None:
        self._content, self._position = content, 0

    @property
    def left(self) -> int:
        return len(self._content) - self._position

    def take(self, size: int) -> memoryview:
        view = memoryview(self._content)[self._position : self._position + size]
        self._position += size
        return view


def _parse_json(text: bytes) -> object:
    def refuse(name: str) -> NoReturn:
        raise ProtocolError(f"{name} is no number of JSON")

    try:
        return json.loads(text.decode("utf-8"), parse_constant=refuse)
    except ProtocolError:
        raise
    except (ValueError, RecursionError) as error:
        raise ProtocolError("the request is no valid JSON") from error


def _tensor(name: str, tensor: Mapping[str, Any], tail: _Tail) -> ndarray:
    datatype, shape = tensor.get("datatype"), tensor.get("shape")
    if not isinstance(datatype, str) or datatype not in DATATYPES:
        raise ProtocolError(f"input {name!r} has the datatype {datatype!r}; supported: {', '.join(DATATYPES)}")
    if (
        not isinstance(shape, list)
        or not 0 < len(shape) <= MAX_AXES
        or not all(type(length) is int and 0 <= length < 2**31 for length in shape)
    ):
        raise ProtocolError(f"input {name!r} has no valid shape")
    dtype, count = DATATYPES[datatype], prod(shape)
    parameters = _parameters(tensor)
    if "shared_memory_region" in parameters:
        raise ProtocolError(f"input {name!r} is in shared memory, which this server does not read")
    size = parameters.get("binary_data_size")
    if size is None:
        return _from_list(name, tensor.get("data"), dtype, count).reshape(shape)
    if "data" in tensor:
        raise ProtocolError(f"input {name!r} has both data and binary_data_size")
    if type(size) is not int or size != count * dtype.itemsize:
        raise ProtocolError(f"input {name!r} of {count} {datatype} needs {count * dtype.itemsize} bytes, not {size!r}")
    if size > tail.left:
        raise ProtocolError(f"input {name!r} needs {size} bytes, but {tail.left} follow")
    return np.frombuffer(tail.take(size), dtype).reshape(shape)


def _from_list(name: str, data: object, dtype: "np.dtype[Any]", count: int) -> ndarray:
    flat: list[object] = []
    _flatten(_list(data, f"data of input {name!r}"), flat, 0)
    if len(flat) != count:
        raise ProtocolError(f"input {name!r} has {len(flat)} values, but its shape needs {count}")
    numbers = (int,) if dtype.kind in "iu" else (int, float)
    if not all(type(value) in numbers for value in flat):
        raise ProtocolError(f"input {name!r} holds a value that is no number of its datatype")
    try:
        with np.errstate(over="ignore"):  # a number beyond the range becomes infinite, which the model refuses
            return np.array(flat, np.float64 if dtype.kind == "f" else dtype).astype(dtype)
    except OverflowError as error:
        raise ProtocolError(f"input {name!r} holds a number that its datatype cannot hold") from error


def _flatten(values: Sequence[object], into: list[object], depth: int) -> None:
    if depth >= MAX_AXES:
        raise ProtocolError(f"data is nested more than {MAX_AXES} deep")
    for value in values:
        if isinstance(value, list):
            _flatten(value, into, depth + 1)
        else:
            into.append(value)


def _outputs(entries: object, binary: bool) -> tuple[RequestedOutput, ...]:
    outputs: list[RequestedOutput] = []
    for entry in _list(entries, "outputs"):
        output = _object(entry, "an output")
        parameters = _parameters(output)
        if unsupported := {"classification", "shared_memory_region"} & parameters.keys():
            raise ProtocolError(f"the output parameter {min(unsupported)} is not supported")
        name = output.get("name")
        if not isinstance(name, str) or any(name == other.name for other in outputs):
            raise ProtocolError(f"an output has the name {name!r}; every output needs a name of its own")
        outputs.append(RequestedOutput(name=name, binary=parameters.get("binary_data", binary) is True))
    return tuple(outputs)


def _parameters(content: Mapping[str, Any]) -> Mapping[str, Any]:
    return _object(content.get("parameters") or {}, "parameters")


def _object(value: object, name: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ProtocolError(f"{name} is no JSON object")
    return value


def _list(value: object, name: str) -> Sequence[object]:
    if not isinstance(value, list):
        raise ProtocolError(f"{name} is no JSON list")
    return value
