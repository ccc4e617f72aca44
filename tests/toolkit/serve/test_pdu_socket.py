"""PDUs of the DICOM node have a largest size and a longest time."""

import socket
import struct
import time
from collections.abc import Iterator

import pytest

from medseg_trt.serve import pdu_socket
from medseg_trt.serve.pdu_socket import MAX_PDU_BYTES, PduSocket


@pytest.fixture
def ends() -> Iterator[tuple[PduSocket, socket.socket]]:
    near, far = socket.socketpair()
    with PduSocket(near) as node, far as peer:
        yield node, peer


def pdu(num_bytes: int, content: bytes = b"") -> bytes:
    return struct.pack(">BxI", 4, num_bytes) + content


def test_bytes_come_as_they_were_sent_and_never_across_two_pdus(ends):
    node, peer = ends
    sent = pdu(5, b"first") + pdu(0) + pdu(6, b"second")
    peer.sendall(sent)
    assert [node.recv(4096) for _ in range(5)] == [sent[:6], b"first", pdu(0), pdu(6), b"second"]
    peer.close()
    assert node.recv(6) == b""


@pytest.mark.parametrize("num_bytes", [MAX_PDU_BYTES + 1, 2**32 - 1])
def test_a_pdu_that_is_too_large_ends_the_connection_before_it_is_read(num_bytes, ends):
    node, peer = ends
    peer.sendall(pdu(num_bytes, bytes(100)))
    with pytest.raises(OSError, match=f"a PDU of {num_bytes} bytes"):
        node.recv(6)
    assert peer.recv(1) == b""


@pytest.mark.parametrize("start", [b"\x01\x00", pdu(1000, bytes(10))])
def test_a_pdu_that_stops_or_trickles_ends_the_connection_in_time(start, ends, monkeypatch):
    monkeypatch.setattr(pdu_socket, "PDU_S", 0.3)
    node, peer = ends
    peer.sendall(start)
    started = time.monotonic()

    def read() -> None:
        while True:
            node.recv(4)
            peer.sendall(b"\0")  # one more byte each time: a limit on every single wait would never end
            time.sleep(0.02)

    with pytest.raises(OSError, match="timed out"):
        read() if len(start) > 6 else node.recv(6) and node.recv(6)
    assert 0.2 < time.monotonic() - started < 5
    assert peer.recv(1) == b""
