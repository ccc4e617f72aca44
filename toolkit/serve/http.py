"""What the routes share: reading a body within its limits, noticing that a client has gone, errors of the protocol."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import ClientDisconnect, Request

from medseg_trt.serve.batching import RequestQueue
from medseg_trt.serve.protocol_v2 import ProtocolError
from medseg_trt.serve.settings import Limits

__all__ = ["ClientDisconnect", "chunks_of", "drop_when_gone", "read_body"]


async def chunks_of(request: Request, limits: Limits) -> AsyncIterator[bytes]:
    """Yield the body of a request.

    Raises:
        ProtocolError: it is larger than ``max_body_bytes``, or takes longer than ``body_timeout_s``.
        ClientDisconnect: the client has gone.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limits.max_body_bytes:
        raise ProtocolError(f"the body has {declared} bytes; at most {limits.max_body_bytes} are possible", 413)
    size = 0
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            async for chunk in request.stream():
                size += len(chunk)
                if size > limits.max_body_bytes:
                    raise ProtocolError(f"the body has more than {limits.max_body_bytes} bytes", 413)
                yield chunk
    except TimeoutError as error:
        raise ProtocolError(f"the body did not arrive within {limits.body_timeout_s:g} s", 408) from error


async def read_body(request: Request, limits: Limits) -> bytes:
    """Return the whole body; see ``chunks_of`` for the errors."""
    return b"".join([chunk async for chunk in chunks_of(request, limits)])


@asynccontextmanager
async def drop_when_gone(request: Request, waiting: RequestQueue) -> AsyncGenerator[None, None]:
    """Cancel what a request waits for as soon as its client closes the connection; the body must have been read."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        waiting.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
