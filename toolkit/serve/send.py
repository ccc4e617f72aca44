"""Send finished files to their destinations, each in a thread of its own, until each is acknowledged.

A file is sent from the disk, unchanged, so a transfer that is repeated, because its acknowledgement was lost or this
process was killed before it noted it, carries the same SOP Instance UID and the same bytes: an archive keeps one.
"""

import http.client
import logging
import threading
import time
import uuid
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from medseg_trt.errors import MedsegError, require
from medseg_trt.serve.metrics import Metrics
from medseg_trt.serve.settings import EXTRA, Destination, DicomSettings
from medseg_trt.serve.spool import Send, Spool

LOG = logging.getLogger("medseg_trt.serve")
POLL_S = 0.1
TIMEOUT_S = 30.0
SUCCESS, WARNING_MASK, WARNING = 0x0000, 0xF000, 0xB000


class SendError(MedsegError):
    """A destination did not take a file."""


class Sender:
    """The thread of one destination."""

    def __init__(self, destination: Destination, settings: DicomSettings, spool: Spool, metrics: Metrics) -> None:
        self._destination, self._settings, self._spool, self._metrics = destination, settings, spool, metrics
        self._failures = 0  # since the last success
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"send to {destination.name}", daemon=True)
        metrics.watch(metrics.sends, destination.name, lambda: len(spool.sends(destination.name)))

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the transfer that has begun."""
        self._stopping.set()
        self._thread.join(TIMEOUT_S)

    def _work(self) -> None:
        while not self._stopping.wait(POLL_S):
            for send in self._spool.sends(self._destination.name):
                if self._stopping.is_set() or send.next > time.time():
                    break
                if not self._try(send):
                    break  # the pause holds for the whole destination

    def _try(self, send: Send) -> bool:
        try:
            transfer(self._spool.folder / send.file, self._destination, self._settings.ae_title)
        except (SendError, OSError) as error:
            self._failures += 1
            pause_s = min(self._settings.retry_s * 2 ** (self._failures - 1), self._settings.max_retry_s)
            self._spool.postpone(send, time.time() + pause_s)
            self._metrics.failures.labels("send").inc()
            LOG.warning(
                "a segmentation could not be sent: %s; next attempt in %.0f s",
                error,
                pause_s,
                extra={"destination": self._destination.name, "job": send.job},
            )
            self._stopping.wait(min(pause_s, self._settings.retry_s))
            return False
        self._failures = 0
        self._spool.sent(send)
        LOG.info("segmentation sent", extra={"destination": self._destination.name, "job": send.job})
        return True


def transfer(path: Path, destination: Destination, ae_title: str) -> None:
    """Send a DICOM file.

    Args:
        path: the file.
        destination: a node, or a DICOMweb service.
        ae_title: of this node.

    Raises:
        SendError: it was not taken.
    """
    if destination.url:
        _stow(path, destination)
    else:
        _c_store(path, destination, ae_title)


def _c_store(path: Path, destination: Destination, ae_title: str) -> None:
    netdicom, pydicom = require("pynetdicom", EXTRA), require("pydicom", "medical")
    dataset: Any = pydicom.dcmread(path)
    entity = netdicom.AE(ae_title=ae_title)
    entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = entity.connection_timeout = TIMEOUT_S
    entity.add_requested_context(dataset.SOPClassUID, dataset.file_meta.TransferSyntaxUID)
    association = entity.associate(destination.host, destination.port, ae_title=destination.ae_title)
    if not association.is_established:
        raise SendError("no association: it cannot be reached, rejects this AE title, or does not accept the SOP class")
    try:
        status = association.send_c_store(dataset)
    finally:
        association.release()
    code = status.get("Status") if status else None
    if code is None:
        raise SendError("it did not answer")
    if code != SUCCESS and code & WARNING_MASK != WARNING:
        raise SendError(f"it answered with status 0x{code:04X}")


def _stow(path: Path, destination: Destination) -> None:
    address = urlsplit(destination.url)
    kind = http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
    boundary = uuid.uuid4().hex
    body = b"".join(
        (
            f"--{boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode(),
            path.read_bytes(),
            f"\r\n--{boundary}--\r\n".encode(),
        )
    )
    headers = {
        "Content-Type": f'multipart/related; type="application/dicom"; boundary={boundary}',
        "Accept": "application/dicom+json",
    }
    connection = kind(destination.host, destination.port, timeout=TIMEOUT_S)
    try:
        connection.request("POST", f"{address.path}/studies", body, headers)
        response = connection.getresponse()
        response.read()
    except http.client.HTTPException as error:
        raise SendError(f"no HTTP response: {type(error).__name__}") from error
    finally:
        connection.close()
    if response.status not in (200, 202):
        raise SendError(f"it answered with HTTP status {response.status}")
