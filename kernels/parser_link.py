"""Let TensorRT-RTX's ONNX parser find the library that it belongs to.

The wheel of TensorRT-RTX 1.7 ships ``libtensorrt_rtx.so.1`` alone, but its parser opens ``libtensorrt_rtx.so`` when it
adds a plugin, and ends the process if it cannot. The loader takes a library that is loaded already if it has the name
asked for, so a library of a few hundred bytes is made in memory that has the name and needs the real one: nothing is
written to disk, and a read-only installation will do.
Source: System V ABI, "Dynamic Linking"; glibc ``elf/dl-load.c``, ``_dl_map_object``; tried with TensorRT-RTX 1.7.1.116.
"""

import ctypes
import os
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

ASKED_FOR: Mapping[str, tuple[str, str]] = {  # package -> name that its parser opens, name of what is loaded
    "tensorrt_rtx": ("libtensorrt_rtx.so", "libtensorrt_rtx.so.1")
}
HEADER, SEGMENT, SYMBOL = 64, 56, 24  # bytes of the structures of ELF64
PAGE = 65536  # the largest page of any processor that TensorRT runs on
MACHINES: Mapping[str, int] = {"x86_64": 62, "aarch64": 183}
LOAD, DYNAMIC, READ_WRITE, SHARED_OBJECT = 1, 2, 6, 3
NEEDED, HASH, STRINGS, SYMBOLS, STRINGS_SIZE, SYMBOL_SIZE, SONAME = 1, 4, 5, 6, 10, 11, 14


def link_parser(trt: ModuleType) -> None:
    """Make the name that a library's ONNX parser opens known to this process; where it is known, nothing happens."""
    if trt.__name__ not in ASKED_FOR or sys.platform != "linux":
        return
    name, needed = ASKED_FOR[trt.__name__]
    try:
        ctypes.CDLL(name, mode=os.RTLD_NOLOAD)
    except OSError:
        _load(alias(name, needed, os.uname().machine))


def alias(name: str, needed: str, machine: str) -> bytes:
    """Return a shared library without code: whoever opens ``name`` gets it, and with it ``needed``.

    Args:
        name: its SONAME.
        needed: the SONAME of the library that it stands for.
        machine: a key of ``MACHINES``, which are little-endian and of 64 bits.
    """
    strings = b"\0" + name.encode() + b"\0" + needed.encode() + b"\0"
    strings_at = HEADER + 2 * SEGMENT
    symbols_at = _round_up(strings_at + len(strings))
    hash_at = symbols_at + SYMBOL  # one symbol, that of index 0, which means none
    hash_table = struct.pack("<4I", 1, 1, 0, 0)
    dynamic_at = hash_at + len(hash_table)
    tags = (
        (SONAME, 1),
        (NEEDED, 2 + len(name)),
        (STRINGS, strings_at),
        (STRINGS_SIZE, len(strings)),
        (SYMBOLS, symbols_at),
        (SYMBOL_SIZE, SYMBOL),
        (HASH, hash_at),
        (0, 0),
    )
    dynamic = b"".join(struct.pack("<2Q", *tag) for tag in tags)
    size = dynamic_at + len(dynamic)
    image = bytearray(size)
    parts = {
        0: struct.pack("<4s12B", b"\x7fELF", 2, 1, 1, *bytes(9))
        + struct.pack("<2HI3QI6H", SHARED_OBJECT, MACHINES[machine], 1, 0, HEADER, 0, 0, HEADER, SEGMENT, 2, 64, 0, 0),
        HEADER: struct.pack("<2I6Q", LOAD, READ_WRITE, 0, 0, 0, size, size, PAGE)
        + struct.pack("<2I6Q", DYNAMIC, READ_WRITE, dynamic_at, dynamic_at, dynamic_at, len(dynamic), len(dynamic), 8),
        strings_at: strings,
        hash_at: hash_table,
        dynamic_at: dynamic,
    }
    for start, content in parts.items():
        image[start : start + len(content)] = content
    return bytes(image)


def _load(library: bytes) -> None:
    file = os.memfd_create("alias", os.MFD_CLOEXEC)
    try:
        Path(f"/proc/self/fd/{file}").write_bytes(library)
        ctypes.CDLL(f"/proc/self/fd/{file}")
    finally:
        os.close(file)


def _round_up(offset: int) -> int:
    return -(-offset // 8) * 8
