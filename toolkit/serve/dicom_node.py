"""The DICOM node: C-ECHO and C-STORE through pynetdicom."""

import logging
import socket
from typing import Any

from medseg_trt.errors import UsageError, require
from medseg_trt.serve.metrics import Metrics
from medseg_trt.serve.objects import OUT_OF_RESOURCES, RefusedError, accept
from medseg_trt.serve.pdu_socket import PduSocket
from medseg_trt.serve.series import SeriesWatcher
from medseg_trt.serve.settings import EXTRA, DicomSettings
from medseg_trt.serve.spool import FullError, Spool

LOG = logging.getLogger("medseg_trt.serve")
SUCCESS, PROCESSING_FAILURE = 0x0000, 0x0110
MAX_ASSOCIATIONS = 16
TOO_MANY = 3  # the source of a rejection: the limit, or congestion (DICOM PS3.8 table 9-21)
MAX_OBJECT_BYTES = 1 << 30
TIMEOUT_S = 30.0  # of one step of the protocol
IDLE_S = 120.0  # of an association without a message
MAX_COMMENT = 64
SYNTAXES = (  # those that the extra ``medical`` decodes
    "1.2.840.10008.1.2",
    "1.2.840.10008.1.2.1",
    "1.2.840.10008.1.2.1.99",
    "1.2.840.10008.1.2.2",
    "1.2.840.10008.1.2.5",
    "1.2.840.10008.1.2.4.90",
    "1.2.840.10008.1.2.4.91",
)


class DicomNode:
    """Accepts associations until ``stop``."""

    def __init__(self, settings: DicomSettings, spool: Spool, watcher: SeriesWatcher, metrics: Metrics) -> None:
        self._settings, self._spool, self._watcher, self._metrics = settings, spool, watcher, metrics
        self._received: dict[Any, int] = {}  # association -> bytes of the message that is arriving
        self._server: Any = None
        self.is_ready = True

    def start(self) -> None:
        """Listen.

        Raises:
            UsageError: the port is in use.
        """
        netdicom, events = require("pynetdicom", EXTRA), require("pynetdicom.events", EXTRA)
        transport = require("pynetdicom.transport", EXTRA)

        class Handler(transport.RequestHandler):
            def setup(self) -> None:
                self.request = PduSocket(self.request)

        class Entity(netdicom.AE):
            def make_server(self, *args: Any, **options: Any) -> Any:
                return super().make_server(*args, request_handler=Handler, **options)

        entity = Entity(ae_title=self._settings.ae_title)
        entity.require_called_aet = True
        entity.require_calling_aet = list(self._settings.allowed)
        entity.maximum_associations = MAX_ASSOCIATIONS
        entity.acse_timeout = entity.dimse_timeout = TIMEOUT_S
        entity.network_timeout = IDLE_S
        entity.add_supported_context("1.2.840.10008.1.1")
        for context in netdicom.AllStoragePresentationContexts:
            if context.abstract_syntax.name.find("Image Storage") >= 0:
                entity.add_supported_context(context.abstract_syntax, list(SYNTAXES))
        handlers = [
            (events.EVT_C_ECHO, lambda _event: SUCCESS),
            (events.EVT_C_STORE, self._store),
            (events.EVT_DATA_RECV, self._limit),
            (events.EVT_CONN_CLOSE, self._end),
            (events.EVT_REJECTED, self._rejected),
        ]
        try:
            self._server = entity.start_server(
                (self._settings.host, self._settings.port), block=False, evt_handlers=handlers
            )
        except OSError as error:
            raise UsageError(
                f"port {self._settings.port} on {self._settings.host} cannot be opened ({error.strerror}); "
                "choose another with --dicom-port"
            ) from error

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return self._server.socket.getsockname()[1]

    def stop(self) -> None:
        """End all associations and close the port."""
        if self._server is not None:
            self._server.shutdown()

    def _store(self, event: Any) -> Any:
        self._received.pop(event.assoc, None)
        status, message = SUCCESS, ""
        try:
            if not self.is_ready:
                raise FullError("the node is shutting down")
            request = event.request
            expected = str(request.AffectedSOPClassUID or ""), str(request.AffectedSOPInstanceUID or "")
            instance = accept(self._spool, event.encoded_dataset(), expected)
            self._watcher.associations.note(event.assoc, instance.series)
        except RefusedError as error:
            status, message = error.status, str(error)
        except FullError as error:
            status, message = OUT_OF_RESOURCES, str(error)
        except Exception as error:  # whatever it is, the peer gets a status
            status, message = PROCESSING_FAILURE, f"internal error: {type(error).__name__}"
            LOG.exception("a DICOM object could not be stored")
        self._metrics.stored.labels(f"0x{status:04X}").inc()
        if status == SUCCESS:
            return SUCCESS
        self._metrics.failures.labels("dicom").inc()
        LOG.warning("DICOM object refused with status 0x%04X: %s", status, message)
        response = require("pydicom", "medical").Dataset()
        response.Status, response.ErrorComment = status, message[:MAX_COMMENT]
        return response

    def _limit(self, event: Any) -> None:
        """End an association whose message has become too large to hold."""
        size = self._received.get(event.assoc, 0) + len(event.data)
        self._received[event.assoc] = size
        if size > MAX_OBJECT_BYTES:
            LOG.warning("an association was ended: one object has more than %d bytes", MAX_OBJECT_BYTES)
            event.assoc.dul.socket.socket.shutdown(socket.SHUT_RDWR)  # an abort would wait for this very thread

    def _end(self, event: Any) -> None:
        if event.assoc.requestor.primitive is None:  # pynetdicom would wait 30 s for one, and count it
            event.assoc.dul.to_user_queue.put(None)
        self._received.pop(event.assoc, None)
        self._watcher.associations.release(event.assoc)

    def _rejected(self, event: Any) -> None:
        reasons = {TOO_MANY: f"{MAX_ASSOCIATIONS} are open"}
        reason = reasons.get(
            event.assoc.acceptor.primitive.result_source, "its AE titles are not those that are allowed"
        )
        LOG.warning("an association was rejected: %s", reason)
