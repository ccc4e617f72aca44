"""Provide the library name that TensorRT-RTX's ONNX parser opens.

The wheel of TensorRT-RTX 1.7 contains only ``libtensorrt_rtx.so.1``, but its parser opens ``libtensorrt_rtx.so`` when
it adds a plugin, and aborts the process on failure. The dynamic loader reuses a loaded library whose SONAME matches. So
a library of a few hundred bytes with this SONAME, which depends on the real library, is created in memory. Nothing is
written to disk, and a read-only installation works.
Source: System V ABI, "Dynamic Linking"; glibc ``elf/dl-load.c``, ``_dl_map_object``; tried with TensorRT-RTX 1.7.1.116.
"""

import ctypes
import os
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

ASKED_FOR: Mapping[str, tuple[str, str]] = {  # package -> name that its parser opens, name of the loaded library
    "tensorrt_rtx": ("libtensorrt_rtx.so", "libtensorrt_rtx.so.1")
}
HEADER, SEGMENT, SYMBOL = 64, 56, 24  # bytes of the structures of ELF64
PAGE = 65536  # the largest page of any processor that TensorRT runs on
MACHINES: Mapping[str, int] = {"x86_64": 62, "aarch64": 183}
LOAD, DYNAMIC, READ_WRITE, SHARED_OBJECT = 1, 2, 6, 3
NEEDED, HASH, STRINGS, SYMBOLS, STRINGS_SIZE, SYMBOL_SIZE, SONAME = 1, 4, 5, 6, 10, 11, 14


def link_parser(trt: ModuleType) -> None:
    """Load an alias for the library that the ONNX parser opens, unless the name is already loaded."""
    if trt.__name__ not in ASKED_FOR or sys.platform != "linux":
        return
    name, needed = ASKED_FOR[trt.__name__]
    try:
        ctypes.CDLL(name, mode=os.RTLD_NOLOAD)
    except OSError:
        _load(alias(name, needed, os.uname().machine))


def alias(name: str, needed: str, machine: str) -> bytes:
    """Return a shared library without code that has the SONAME ``name`` and depends on ``needed``.

    Args:
        name: its SONAME.
        needed: the SONAME of the real library.
        machine: a key of ``MACHINES``, which are little-endian and of 64 bits.
    """
    strings = b"\0" + name.encode() + b"\0" + needed.encode() + b"\0"
    strings_at = HEADER + 2 * SEGMENT
    symbols_at = _round_up(strings_at + len(strings))
    hash_at = symbols_at + SYMBOL  # one symbol, the null symbol of index 0
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
