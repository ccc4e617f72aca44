"""A connection of the DICOM node that limits the size of a PDU and the time that it may take.

pynetdicom reads a PDU whole, however long its header says it is, and waits for the rest of it without end.
Source: DICOM PS3.8 section 9.3.1, the header of a PDU.
"""

import socket
import struct
import time

HEADER = struct.Struct(">BxI")  # kind and length
MAX_PDU_BYTES = 1 << 20  # the node announces 16 KiB for data; a request for an association has some 100 KiB at most
PDU_S = 30.0  # from the first byte of a PDU to its last


class PduSocket(socket.socket):
    """A socket whose ``recv`` follows the PDUs of the peer; it takes over an open one."""

    def __init__(self, open_socket: socket.socket) -> None:
        super().__init__(fileno=open_socket.detach())
        self._head = bytearray()  # of the PDU that is arriving, until it is whole
        self._left = 0  # bytes of the PDU after its head
        self._deadline = 0.0

    def recv(self, bufsize: int, flags: int = 0, /) -> bytes:
        """Return bytes of one PDU.

        Raises:
            OSError: the PDU is too large, or did not arrive in time; the connection is shut down.
        """
        if not self._head and not self._left:
            self._deadline = time.monotonic() + PDU_S
        in_head = not self._left
        wanted = HEADER.size - len(self._head) if in_head else self._left
        try:
            left_s = self._deadline - time.monotonic()
            if left_s <= 0:  # although there may be a byte to read: the peer trickles
                raise TimeoutError("timed out")
            self.settimeout(left_s)
            content = super().recv(min(bufsize, wanted), flags)
            self.settimeout(PDU_S)  # for sending
        except TimeoutError:
            self._end()
            raise
        if not in_head:
            self._left -= len(content)
            return content
        self._head += content
        if len(self._head) == HEADER.size:
            _, self._left = HEADER.unpack(self._head)
            self._head.clear()
            if self._left > MAX_PDU_BYTES:
                self._end()
                raise OSError(f"a PDU of {self._left} bytes; at most {MAX_PDU_BYTES} are possible")
        return content

    def _end(self) -> None:
        try:
            self.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # the peer was faster
