"""A file as a response: whole, or one range of its bytes; it is sent to its end even where it is removed meanwhile.

Several ranges in one request, and other units than bytes, are answered with the whole file.
Source: RFC 9110, sections 13.1.5 and 14.
"""

import asyncio
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

BYTES = re.compile(r"(?P<first>[0-9]{1,18})-(?P<last>[0-9]{0,18})|-(?P<length>[0-9]{1,18})")
CHUNK_BYTES = 1 << 18


class FileResponse(StreamingResponse):
    """Sends a file that is open already, and closes it."""

    def __init__(self, path: Path, request: Request, media_type: str, tag: str) -> None:
        """Open the file.

        Args:
            path: the file.
            request: names the range, if any.
            media_type: of the content.
            tag: names the content; another content never has it.

        Raises:
            FileNotFoundError: it is gone.
            HTTPException: it has no such range (416).
        """
        self._file = path.open("rb")
        try:
            size = os.fstat(self._file.fileno()).st_size
            part = _requested_part(request, size, f'"{tag}"')
        except BaseException:
            self._file.close()
            raise
        headers = {
            "Content-Disposition": f'inline; filename="{path.name}"',
            "Accept-Ranges": "bytes",
            "ETag": f'"{tag}"',
            "Vary": "Accept",
        }
        status, sent = 200, range(size)
        if part is not None:
            status, sent = 206, part
            headers["Content-Range"] = f"bytes {part.start}-{part.stop - 1}/{size}"
        headers["Content-Length"] = str(len(sent))
        content = _chunks(self._file, range(0) if request.method == "HEAD" else sent)
        super().__init__(content, status, headers, media_type)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        with self._file:
            await super().__call__(scope, receive, send)


async def _chunks(file: BinaryIO, sent: range) -> AsyncIterator[bytes]:
    file.seek(sent.start)
    left = len(sent)
    while left:
        chunk = await asyncio.to_thread(file.read, min(CHUNK_BYTES, left))
        if not chunk:
            raise EOFError("a result became shorter while it was sent")
        left -= len(chunk)
        yield chunk


def _requested_part(request: Request, size: int, tag: str) -> range | None:
    """Return the bytes that the request asks for; None: all."""
    unit, _, text = request.headers.get("range", "").partition("=")
    if request.method != "GET" or unit.strip().lower() != "bytes" or "," in text:
        return None
    if request.headers.get("if-range", tag) != tag:
        return None
    part = range(0)
    if match := BYTES.fullmatch(text.strip()):
        first, last, length = match["first"], match["last"], match["length"]
        if length:
            part = range(max(size - int(length), 0), size)
        else:
            part = range(int(first), min(int(last) + 1, size) if last else size)
    if not part:
        raise HTTPException(
            416, f"no such range of the {size} bytes; write bytes=FIRST-LAST", {"Content-Range": f"bytes */{size}"}
        )
    return part
