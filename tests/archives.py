"""DICOM archives for tests: Orthanc, started on free ports, and a small one that records what it gets."""

import hashlib
import json
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import pydicom
import pynetdicom
import pytest
from pynetdicom import evt
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.transport import AssociationSocket

IMPLICIT_AND_EXPLICIT = ["1.2.840.10008.1.2", "1.2.840.10008.1.2.1"]
SEGMENTATION, CAPTURE = "1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.7"


def _close(self: AssociationSocket) -> None:
    """Close an association's socket even where its peer is gone.

    pynetdicom 3.0 calls ``shutdown`` and ``close`` in one ``try``: where the first fails, its socket stays open until
    it is collected, and the warning of that would be counted against whatever test runs then.
    """
    if self.socket is not None:
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


AssociationSocket._shutdown_socket = _close


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class RecordingArchive:
    """An archive that keeps the digests of everything it got, by SOP instance UID."""

    port: int
    title: str = "ARCHIVE"
    digests: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    objects: list[Any] = field(default_factory=list)
    server: Any = None

    @property
    def destination(self) -> str:
        return f"{self.title}@127.0.0.1:{self.port}"

    def start(self) -> "RecordingArchive":
        entity = pynetdicom.AE(ae_title=self.title)
        for sop_class in (SEGMENTATION, CAPTURE):
            entity.add_supported_context(sop_class, IMPLICIT_AND_EXPLICIT)
        self.server = entity.start_server(
            ("127.0.0.1", self.port), block=False, evt_handlers=[(evt.EVT_C_STORE, self._store)]
        )
        return self

    def stop(self) -> None:
        if self.server is not None:
            self.server.shutdown()
            self.server = None

    def wait_for(self, count: int, timeout_s: float = 120.0) -> list[Any]:
        """Return the objects once there are so many different ones."""
        self.wait_until(lambda: len(self.digests) >= count, timeout_s)
        return self.objects

    def wait_until(self, is_complete: Callable[[], bool], timeout_s: float = 120.0) -> None:
        """Wait for objects."""
        deadline = time.monotonic() + timeout_s
        while not is_complete():
            assert time.monotonic() < deadline, f"only {len(self.digests)} objects arrived"
            time.sleep(0.05)

    def _store(self, event: Any) -> int:
        dataset = event.dataset
        dataset.file_meta = event.file_meta
        self.digests[str(dataset.SOPInstanceUID)].append(
            hashlib.sha256(event.encoded_dataset(include_meta=False)).hexdigest()
        )
        self.objects.append(dataset)
        return 0x0000


@contextmanager
def recording_archive(title: str = "ARCHIVE") -> Iterator[RecordingArchive]:
    archive = RecordingArchive(port=free_port(), title=title).start()
    try:
        yield archive
    finally:
        archive.stop()


def send(paths: list[Path], port: int, called: str = "MEDSEG", calling: str = "TESTS") -> list[int | None]:
    """Send files with pynetdicom in one association and return the statuses; none where it was rejected."""
    datasets = [pydicom.dcmread(path) for path in paths]
    entity = pynetdicom.AE(ae_title=calling)
    contexts = {(dataset.SOPClassUID, dataset.file_meta.TransferSyntaxUID) for dataset in datasets}
    for sop_class, syntax in sorted(contexts):
        entity.add_requested_context(sop_class, syntax)
    association = entity.associate("127.0.0.1", port, ae_title=called)
    if not association.is_established:
        return []
    statuses = [association.send_c_store(dataset).get("Status") for dataset in datasets]
    association.release()
    return statuses


def store_bytes(port: int, encoded: bytes, sop_class: str, uid: str, syntax: str) -> int:
    """Send bytes as the data set of a C-STORE, whatever they are."""
    entity = pynetdicom.AE(ae_title="TESTS")
    entity.add_requested_context(sop_class, syntax)
    association = entity.associate("127.0.0.1", port, ae_title="MEDSEG")
    assert association.is_established
    request = C_STORE()
    request.MessageID, request.Priority = 1, 2
    request.AffectedSOPClassUID, request.AffectedSOPInstanceUID = sop_class, uid
    request.DataSet = BytesIO(encoded)
    association._reactor_checkpoint.clear()
    context = association.accepted_contexts[0].context_id
    assert context is not None
    association.dimse.send_msg(request, context)
    _, response = association.dimse.get_msg(block=True)
    association._reactor_checkpoint.set()
    association.release()
    assert isinstance(response, C_STORE)
    assert response.Status is not None
    return response.Status


@dataclass
class Orthanc:
    """A running Orthanc."""

    http_port: int
    dicom_port: int
    title: str = "ORTHANC"

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}{path}", timeout=30) as response:
            return response.read()

    def json(self, path: str) -> Any:
        return json.loads(self.get(path))

    def wait_for_instances(self, count: int, timeout_s: float = 180.0) -> list[str]:
        deadline = time.monotonic() + timeout_s
        while len(instances := self.json("/instances")) < count:
            assert time.monotonic() < deadline, f"{len(instances)} of {count} instances arrived"
            time.sleep(0.2)
        return instances


@contextmanager
def running_orthanc(folder: Path) -> Iterator[Orthanc]:
    """Start Orthanc on free loopback ports, without plugins and remote access; skip where it is not installed."""
    program = shutil.which("Orthanc")
    if program is None:
        pytest.skip("needs Orthanc (Debian package orthanc)")
    orthanc = Orthanc(http_port=free_port(), dicom_port=free_port())
    folder.mkdir()
    configuration = {
        "Name": "tests",
        "StorageDirectory": str(folder / "storage"),
        "IndexDirectory": str(folder / "storage"),
        "HttpPort": orthanc.http_port,
        "DicomPort": orthanc.dicom_port,
        "DicomAet": orthanc.title,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False,
        "Plugins": [],
        "DicomAlwaysAllowStore": True,
    }
    (folder / "orthanc.json").write_text(json.dumps(configuration))
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([program, str(folder / "orthanc.json")], stdout=log, stderr=log)
        try:
            _wait_until_it_answers(orthanc, process)
            yield orthanc
        finally:
            process.terminate()
            process.wait()


def _wait_until_it_answers(orthanc: Orthanc, process: "subprocess.Popen[bytes]") -> None:
    stop = threading.Event()
    for _ in range(600):
        assert process.poll() is None, "Orthanc has ended"
        try:
            orthanc.get("/system")
            return
        except OSError:
            stop.wait(0.1)
    raise AssertionError("Orthanc does not answer")
