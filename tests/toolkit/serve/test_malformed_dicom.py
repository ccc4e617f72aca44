"""Malformed objects and associations: every object gets a status or an abort, and the next good series is segmented."""

import json
import random
import socket
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import pydicom
import pytest
from archives import IMPLICIT_AND_EXPLICIT, send, store_bytes
from dicoms import AXIAL, CT, save_series
from fuzz.mutations import cut, drop, flip_bits, repeat, write_extreme, write_number
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from server_process import running_server

ROOT = "1.2.826.0.1.3680043.8.498.77"
EXPLICIT = IMPLICIT_AND_EXPLICIT[1]
MUTATIONS = (flip_bits, write_extreme, cut, drop, repeat, write_number)
ANSWER_S = 20.0  # less than the server waits for the rest of a PDU: the end of the stream must end the association
SPARE = 4  # descriptors that a job or an association in progress may have open
REFUSED, STORED = {0xA700, 0xA900, 0xC000}, 0x0000


@pytest.fixture(scope="module")
def node(bundle, archive, tmp_path_factory):
    options = ("--dicom-port", "0", "--quiet-s", "0.2", "--retry-s", "0.2", "--send-to", archive.destination)
    with running_server([bundle], tmp_path_factory.mktemp("node") / "spool", *options) as server:
        yield server


def good_series(folder: Path, number: int, slices: int = 3) -> list[Path]:
    pixels = np.random.default_rng(number).integers(0, 255, (slices, 20, 24)).astype(np.int16)
    study = f"{ROOT}.{number}"
    labelled = {"StudyInstanceUID": study, "FrameOfReferenceUID": f"{study}.2"}
    save_series(folder, pixels, AXIAL, order=range(slices), SeriesInstanceUID=f"{study}.1", **labelled)
    return sorted(folder.iterdir())


def recorded(files: list[Path], port: int) -> bytes:
    """Return the bytes that a client sends for files, from its request for an association to its end."""
    seen = bytearray()

    def pass_on(source: socket.socket, target: socket.socket, record: bytearray) -> None:
        with suppress(OSError):
            while content := source.recv(1 << 16):
                record += content
                target.sendall(content)
            target.shutdown(socket.SHUT_WR)

    def relay() -> None:
        client, _ = listening.accept()
        with client, socket.create_connection(("127.0.0.1", port)) as server:
            back = threading.Thread(target=pass_on, args=(server, client, bytearray()))
            back.start()
            pass_on(client, server, seen)
            back.join()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        relaying = threading.Thread(target=relay)
        relaying.start()
        assert send(files, listening.getsockname()[1]) == [STORED] * len(files)
        relaying.join()
    return bytes(seen)


def send_objects(node, file: Path, count: int, rng: random.Random) -> Counter[int]:
    """Send mutants of an object, each with a UID of its own, and return how many got each status."""
    statuses = Counter[int]()
    dataset = pydicom.dcmread(file)
    for number in range(count):
        uid = f"{ROOT}.99.{number}"
        encoded = bytearray(data_set(dataset, uid))
        rng.choice(MUTATIONS)(encoded, rng)
        statuses[store_bytes(node.dicom_port, bytes(encoded) or b"\0\0", CT, uid, EXPLICIT)] += 1
    return statuses


def data_set(dataset: pydicom.Dataset, uid: str) -> bytes:
    """Return an object as C-STORE sends it, without the header of a file."""
    dataset.SOPInstanceUID = uid
    buffer = DicomBytesIO()
    buffer.is_little_endian, buffer.is_implicit_VR = True, False
    write_dataset(buffer, dataset)
    return buffer.getvalue()


def send_associations(node, conversation: bytes, count: int, rng: random.Random) -> Counter[str]:
    """Send mutants of what a client says, and return how many ended in which way."""
    ends = Counter[str]()
    for number in range(count):
        stream = bytearray(conversation) if number % 5 else bytearray(rng.randbytes(rng.randint(1, 3000)))
        for _ in range(rng.randint(1, 3)):
            rng.choice(MUTATIONS)(stream, rng)
            stream = stream or bytearray(1)
        with socket.create_connection(("127.0.0.1", node.dicom_port), timeout=ANSWER_S) as client:
            answered = bytearray()
            try:
                client.sendall(stream)
                client.shutdown(socket.SHUT_WR)
                while content := client.recv(1 << 16):
                    answered += content
                ends["answered" if answered else "closed"] += 1
            except TimeoutError:
                ends["open"] += 1
            except OSError:
                ends["reset"] += 1
    return ends


def num_descriptors(node) -> int:
    return len(list(Path(f"/proc/{node.process.pid}/fd").iterdir()))


def run_malformed(node, archive, folder: Path, count: int, seed: int) -> None:
    """Send ``count`` malformed objects and associations, half of each, and check the node after them."""
    rng = random.Random(seed)
    files = good_series(folder / "good", 10 * seed, slices=1)
    conversation = recorded(files, node.dicom_port)
    descriptors = num_descriptors(node)
    statuses = send_objects(node, files[0], count // 2, rng)
    ends = send_associations(node, conversation, count - count // 2, rng)
    print(f"objects: { {f'{status:04X}': n for status, n in statuses.items()} }, associations: {dict(ends)}")
    assert set(statuses) <= {STORED, *REFUSED}
    assert sum(statuses[status] for status in REFUSED) > count / 8, "few of the mutants were malformed"
    assert ends["open"] == 0
    assert send(good_series(folder / "after", 10 * seed + 1), node.dicom_port) == [STORED] * 3
    study = f"{ROOT}.{10 * seed + 1}"
    archive.wait_until(lambda: any(made.StudyInstanceUID == study for made in list(archive.objects)))
    unexpected = [line for line in node.lines if not line.startswith("{") or json.loads(line)["level"] == "error"]
    assert not unexpected, "\n".join(unexpected)
    archive.wait_until(lambda: num_descriptors(node) <= descriptors + SPARE)
    status, _, _ = node.get("/v2/health/ready")
    assert status == 200


def test_malformed_objects_and_associations_leave_the_node_alive(node, archive, tmp_path):
    run_malformed(node, archive, tmp_path, 60, seed=0)


@pytest.mark.slow
def test_five_hundred_malformed_objects_and_associations_leave_the_node_alive(node, archive, tmp_path):
    run_malformed(node, archive, tmp_path, 500, seed=1)
