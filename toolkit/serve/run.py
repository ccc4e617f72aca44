"""Run a server: open everything, serve until a signal, finish what is in flight, and end within ``drain_s``."""

import asyncio
import os
import shutil
import socket
import ssl
import time
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from medseg_trt.errors import UsageError
from medseg_trt.serve.app import make_app
from medseg_trt.serve.delivery import Delivery
from medseg_trt.serve.dicom_node import DicomNode
from medseg_trt.serve.jobs import JobRunner
from medseg_trt.serve.metrics import Metrics
from medseg_trt.serve.model import ServedModel, open_models
from medseg_trt.serve.send import Sender
from medseg_trt.serve.series import SeriesWatcher
from medseg_trt.serve.settings import DicomSettings, ServeSettings
from medseg_trt.serve.slow_clients import TimedH11Protocol
from medseg_trt.serve.spool import Spool
from medseg_trt.serve.state import ServerState

UPLOADS = "uploads"
BACKLOG = 2048
MIN_DRAIN_S = 1.0  # for jobs, where HTTP has used all of the time
DECODERS = max(4, 2 * (os.cpu_count() or 1))  # threads; most of them wait for the network


@dataclass(frozen=True, kw_only=True, slots=True)
class Running:
    """Where a server listens."""

    address: str  # of HTTP
    dicom_port: int | None
    models: dict[str, str]  # name -> version


def serve(settings: ServeSettings, on_ready: Callable[[Running], None]) -> None:
    """Serve until a signal.

    Args:
        settings: of the server.
        on_ready: called once everything listens.

    Raises:
        UsageError: a port or the spool is in use, TLS cannot be used, or the settings do not fit the bundles.
        ArtefactError: a bundle cannot be used.
    """
    _check_tls(settings)
    listening = _listen(settings)
    try:
        spool = Spool(settings.spool, settings.limits.min_free_bytes)
        try:
            _serve(settings, spool, listening, on_ready)
        finally:
            spool.close()
    finally:
        listening.close()


def _serve(
    settings: ServeSettings, spool: Spool, listening: socket.socket, on_ready: Callable[[Running], None]
) -> None:
    metrics = Metrics()
    models = {model.name: model for model in open_models(settings, metrics.record_batch)}
    try:
        for model in models.values():
            metrics.watch(metrics.queue, model.name, lambda model=model: model.queue.num_waiting)
            metrics.watch(metrics.open, model.name, lambda model=model: model.queue.num_open)
        for job_state in ("queued", "running", "done", "failed"):
            metrics.watch(metrics.jobs, job_state, lambda job_state=job_state: spool.count_jobs(job_state))
        shutil.rmtree(spool.folder / UPLOADS, ignore_errors=True)
        (spool.folder / UPLOADS).mkdir()
        delivery = {} if settings.dicom is None else {"deliver": Delivery(settings.dicom, spool.folder)}
        jobs = JobRunner(spool, models, settings.limits, metrics, **delivery)
        with ThreadPoolExecutor(DECODERS, thread_name_prefix="request") as threads:
            state = ServerState(
                settings=settings,
                models=models,
                spool=spool,
                jobs=jobs,
                metrics=metrics,
                threads=threads,
                uploads=spool.folder / UPLOADS,
            )
            dicom = None if settings.dicom is None else _Dicom(settings.dicom, state)
            server = _Server(_config(settings, state, dicom, on_ready, listening), state, dicom)
            jobs.start()
            try:
                if dicom is not None:
                    dicom.start()
                server.run(sockets=[listening])
            finally:
                _stop(state, dicom)
    finally:
        for model in models.values():
            model.close()


class _Dicom:
    """The DICOM node with its threads."""

    def __init__(self, settings: DicomSettings, state: ServerState) -> None:
        model = _dicom_model(settings, state.models)
        self._watcher = SeriesWatcher(state.spool, state.jobs, model, settings, state.storing)
        self.node = DicomNode(settings, state.spool, self._watcher, state.metrics)
        self._senders = [Sender(destination, settings, state.spool, state.metrics) for destination in settings.send_to]
        self._started: list[SeriesWatcher | Sender] = []

    def start(self) -> None:
        self.node.start()
        for thread in (self._watcher, *self._senders):
            thread.start()
            self._started.append(thread)

    def stop(self) -> None:
        self.node.stop()
        for thread in self._started:
            thread.stop()


def _dicom_model(settings: DicomSettings, models: Any) -> ServedModel:
    if settings.model is None and len(models) == 1:
        return next(iter(models.values()))
    if settings.model not in models:
        raise UsageError(f"name the bundle that segments DICOM series: --dicom-model with one of {', '.join(models)}")
    return models[settings.model]


class _Server(uvicorn.Server):
    """uvicorn's server; a signal also stops new work, and its process ends with success."""

    def __init__(self, config: uvicorn.Config, state: ServerState, dicom: _Dicom | None) -> None:
        super().__init__(config)
        self._state, self._dicom = state, dicom

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._state.is_ready = False
        self._state.drain_started = time.monotonic()
        if self._dicom is not None:
            self._dicom.node.is_ready = False
        super().handle_exit(sig, frame)

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        with super().capture_signals():
            yield
            self._captured_signals.clear()  # uvicorn would raise them again


def _config(
    settings: ServeSettings,
    state: ServerState,
    dicom: _Dicom | None,
    on_ready: Callable[[Running], None],
    listening: socket.socket,
) -> uvicorn.Config:
    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncGenerator[None, None]:
        host, port = listening.getsockname()[:2]
        scheme = "http" if settings.tls_certificate is None else "https"
        on_ready(
            Running(
                address=f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}",
                dicom_port=None if dicom is None else dicom.node.port,
                models={name: model.version for name, model in state.models.items()},
            )
        )
        yield

    return uvicorn.Config(
        _quiet_shutdown(make_app(state, lifespan)),
        http=TimedH11Protocol,
        ws="none",
        lifespan="on",
        access_log=False,
        log_config=None,
        server_header=False,
        limit_concurrency=settings.limits.max_connections,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=round(settings.limits.drain_s),
        ssl_certfile=settings.tls_certificate,
        ssl_keyfile=settings.tls_key,
    )


def _check_tls(settings: ServeSettings) -> None:
    """Refuse a certificate and key that do not work; an encrypted key would ask for its password at the terminal."""
    if settings.tls_certificate is None:
        return
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(settings.tls_certificate, settings.tls_key, password="")
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise UsageError(
            f"{settings.tls_certificate} and {settings.tls_key} are no certificate and its unencrypted key "
            f"in PEM: {getattr(error, 'reason', None) or error}"
        ) from error


def _quiet_shutdown(app: ASGIApp) -> ASGIApp:
    """Return an application whose lifespan ends like any other where a second signal cancels it."""

    async def quiet(scope: Scope, receive: Receive, send: Send) -> None:
        async def receive_lifespan() -> Message:
            try:
                return await receive()
            except asyncio.CancelledError:
                return {"type": "lifespan.shutdown"}

        await app(scope, receive_lifespan if scope["type"] == "lifespan" else receive, send)

    return quiet


def _stop(state: ServerState, dicom: _Dicom | None) -> None:
    if dicom is not None:
        dicom.stop()
    deadline = (state.drain_started or time.monotonic()) + state.settings.limits.drain_s
    state.jobs.stop(max(deadline, time.monotonic() + MIN_DRAIN_S))


def _listen(settings: ServeSettings) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[
            0
        ]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(BACKLOG)  # a client may connect as soon as the address is printed
    except OSError as error:
        raise UsageError(
            f"port {settings.port} on {settings.host} cannot be opened ({error.strerror}); choose another with --port"
        ) from error
    return listening
