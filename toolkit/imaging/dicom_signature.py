"""Recognise DICOM by its first bytes, with or without the preamble that Part 10 requires.

Source: DICOM PS3.10 section 7.1 (preamble) and PS3.5 section 7.1 (data elements).
"""

import struct

SIGNATURE_BYTES = 1024  # enough for the preamble, or for the first elements of a file without one
PREAMBLE_BYTES, MARK = 128, b"DICM"
FIRST_GROUPS = (0x0002, 0x0008)  # file meta information, identification
MIN_ELEMENTS = 3  # that a file without a preamble must begin with to count as DICOM
LONG_VRS = (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")  # 4-byte length


def starts_like_dicom(block: bytes) -> bool:
    """Return whether the first ``SIGNATURE_BYTES`` of a file are those of a DICOM file.

    Without a preamble, the first data elements must be in order and of even length in one of the three encodings.
    """
    if block[PREAMBLE_BYTES : PREAMBLE_BYTES + len(MARK)] == MARK:
        return True
    encodings = (("<", False), ("<", True), (">", True))
    return any(_count_elements(block, order, explicit) >= MIN_ELEMENTS for order, explicit in encodings)


def _count_elements(block: bytes, order: str, is_explicit: bool) -> int:
    """Count the valid elements at the start, up to ``MIN_ELEMENTS``."""
    position, count, last_tag = 0, 0, (0, -1)
    while count < MIN_ELEMENTS and position + 12 <= len(block):
        tag = struct.unpack_from(f"{order}HH", block, position)
        if tag <= last_tag or (count == 0 and tag[0] not in FIRST_GROUPS):
            break
        value_at, length = position + 8, 0
        if not is_explicit:
            (length,) = struct.unpack_from(f"{order}L", block, position + 4)
        elif (vr := block[position + 4 : position + 6]) in LONG_VRS:
            value_at += 4
            (length,) = struct.unpack_from(f"{order}L", block, position + 8)
        elif vr.isalpha() and vr.isupper():
            (length,) = struct.unpack_from(f"{order}H", block, position + 6)
        else:
            break
        if length % 2:
            break
        position, count, last_tag = value_at + length, count + 1, tag
    return count
