"""The HTTP application: all routes, and every error as the JSON that the protocol prescribes."""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Match, Route

from medseg_trt.errors import InputError
from medseg_trt.serve import page, routes_dicomweb, routes_segment, routes_v2
from medseg_trt.serve.batching import BusyError, CancelledError
from medseg_trt.serve.middleware import Gate
from medseg_trt.serve.openapi import openapi
from medseg_trt.serve.protocol_v2 import ProtocolError
from medseg_trt.serve.spool import FullError
from medseg_trt.serve.state import ServerState

LOG = logging.getLogger("medseg_trt.serve")
Lifespan = Callable[[Starlette], AbstractAsyncContextManager[None]]
CLIENT_GONE = 499  # nobody reads the response; the number stands in the log


def make_app(state: ServerState, lifespan: Lifespan) -> Starlette:
    """Return the application of a server."""

    async def metrics(_request: Request) -> Response:
        return Response(state.metrics.text(), media_type="text/plain; version=0.0.4")

    async def describe(_request: Request) -> Response:
        return JSONResponse(openapi(state))

    groups: Sequence[Sequence[Route]] = (
        [Route("/metrics", metrics), Route("/openapi.json", describe)],
        page.routes(state),
        routes_v2.routes(state),
        routes_segment.routes(state),
        routes_dicomweb.routes(state),
    )
    return Starlette(
        routes=[route for group in groups for route in group],
        middleware=[Middleware(Gate, settings=state.settings, metrics=state.metrics)],
        exception_handlers={
            ProtocolError: _protocol_error,
            BusyError: _busy,
            FullError: _full,
            CancelledError: _cancelled,
            InputError: _input_error,
            HTTPException: _http_error,
            ClientDisconnect: _gone,
            Exception: _internal,
        },
        lifespan=lifespan,
    )


def _error(message: str, status: int, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": message}, status_code=status, headers=headers)


async def _protocol_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ProtocolError)
    headers = {"Retry-After": "5"} if error.status == 503 else None
    if error.status in (408, 413):  # the rest of the body is not read
        headers = {"Connection": "close"}
    return _error(str(error), error.status, headers)


async def _busy(_request: Request, error: Exception) -> Response:
    assert isinstance(error, BusyError)
    return _error(str(error), 429, {"Retry-After": str(max(1, round(error.retry_after_s)))})


async def _full(_request: Request, error: Exception) -> Response:
    return _error(f"{error}; nothing was accepted, try again later", 503, {"Retry-After": "60"})


async def _cancelled(_request: Request, error: Exception) -> Response:
    return _error(str(error), 503, {"Retry-After": "5"})


async def _input_error(_request: Request, error: Exception) -> Response:
    return _error(str(error), 422)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    if error.status_code == 405:  # the error names the methods of the first route of an address, which may have several
        headers["Allow"] = ", ".join(sorted(_methods(request)))
    return _error(error.detail, error.status_code, headers)


def _methods(request: Request) -> set[str]:
    matching = [route for route in request.app.routes if route.matches(request.scope)[0] != Match.NONE]
    return {method for route in matching for method in route.methods}


async def _gone(_request: Request, _error_: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)


async def _internal(request: Request, error: Exception) -> Response:
    LOG.error("internal error", exc_info=error, extra={"request": request.scope["state"]["request_id"]})
    return _error("internal error; the server's log has its reason under the request's id", 500)
