"""``multipart/related`` bodies, as DICOMweb uses them (RFC 2387 and 2046)."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from medseg_trt.serve.protocol_v2 import ProtocolError

BOUNDARY = re.compile(r'boundary="?([A-Za-z0-9\'()+_,./:=? -]{1,70})"?')
MAX_PART_HEADERS = 8192
MAX_PARTS = 4096


def boundary_of(content_type: str) -> bytes:
    """Return the boundary of a Content-Type.

    Raises:
        ProtocolError: it is no ``multipart/related``, or has none.
    """
    match = BOUNDARY.search(content_type)
    if not content_type.lower().startswith("multipart/related") or match is None:
        raise ProtocolError("the body must be multipart/related with a boundary", 415)
    return match[1].rstrip().encode()


def parts(body: bytes, boundary: bytes) -> Iterator[bytes]:
    """Return the content of every part; the whole body is checked before the first one.

    Raises:
        ProtocolError: the body is malformed, or has more than ``MAX_PARTS`` parts.
    """
    spans = list(_spans(body, b"--" + boundary))
    return (body[start:end] for start, end in spans)


def _spans(body: bytes, mark: bytes) -> Iterator[tuple[int, int]]:
    position = body.find(mark)
    if position < 0:
        raise ProtocolError("the body does not contain its boundary")
    for _ in range(MAX_PARTS + 1):
        position += len(mark)
        if body[position : position + 2] == b"--":
            return
        start = body.find(b"\r\n\r\n", position, position + MAX_PART_HEADERS)
        end = body.find(b"\r\n" + mark, position)
        if start < 0 or end < start + 2:
            raise ProtocolError("a part of the body is malformed")
        yield start + 4, end
        position = end + 2
    raise ProtocolError(f"the body has more than {MAX_PARTS} parts", 413)


def join(paths: Iterable[Path], boundary: str) -> Iterator[bytes]:
    """Yield a body whose parts are DICOM files."""
    for path in paths:
        yield f"--{boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode()
        yield path.read_bytes()
        yield b"\r\n"
    yield f"--{boundary}--\r\n".encode()
