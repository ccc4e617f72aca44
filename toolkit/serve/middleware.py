"""What every HTTP request passes: its identity, the token, the host name, metrics and one line of the log."""

import hmac
import ipaddress
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.responses import JSONResponse

from medseg_trt.serve.metrics import Metrics
from medseg_trt.serve.settings import ServeSettings

LOG = logging.getLogger("medseg_trt.serve")
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
OPEN_PATHS = frozenset({"/", "/page.css", "/page.js", "/v2/health/live", "/v2/health/ready"})  # without a token
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
SendMessage = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, SendMessage], Awaitable[None]]


class Gate:
    """The outermost layer of the application."""

    def __init__(self, app: App, settings: ServeSettings, metrics: Metrics) -> None:
        self._app, self._metrics, self._settings = app, metrics, settings
        self._token = None if settings.token is None else settings.token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: SendMessage) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        started, status, sent = time.perf_counter(), 499, 0

        async def send_noted(message: MutableMapping[str, Any]) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *HEADERS, (b"x-request-id", request_id.encode())]
            else:
                sent += len(message.get("body", b""))
            await send(message)

        try:
            refusal = self._refusal(scope["path"], headers)
            await (self._app if refusal is None else refusal)(scope, receive, send_noted)
        except Exception:
            status = 500  # the response is sent further out
            raise
        finally:
            seconds = time.perf_counter() - started
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.latency.labels(route).observe(seconds)
            fields = {
                "request": request_id,
                "method": scope["method"],
                "route": route,
                "status": status,
                "ms": round(1000 * seconds, 2),
                "bytes": sent,
            }
            LOG.info("request", extra=fields)

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> JSONResponse | None:
        """Return the response to a request that may not pass."""
        if self._token is not None:
            scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
            is_right = scheme.lower() == b"bearer" and hmac.compare_digest(token, self._token)
            if path in OPEN_PATHS or is_right:
                return None
            return JSONResponse(
                {"error": "a valid token is needed, as the header Authorization: Bearer TOKEN"},
                status_code=401,
                headers={"WWW-Authenticate": "Bearer"},
            )
        if self._settings.insecure or self._is_own_host(headers.get(b"host", b"").decode("latin-1")):
            return None
        # a page of another site can lead its own name to this address and would then read the answers
        return JSONResponse(
            {"error": "the Host header names another machine; answering to it needs --token-file or --insecure"},
            status_code=421,
        )

    def _is_own_host(self, host: str) -> bool:
        name = host.rpartition(":")[0] if re.search(r":\d+$", host) else host
        name = name.strip("[]").lower()
        if name in ("localhost", self._settings.host.lower()):
            return True
        try:
            return ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False
