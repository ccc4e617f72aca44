"""Mutations of files that know their structure, so that a mutant passes the checks before the one it is to reach.

Checksums of PNG chunks and zip members are corrected, gzip streams are packed again, and digests of a bundle are
written into its manifest.
"""

import gzip
import io
import json
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from typing import Any

EXTREMES = (0, 1, 2, 7, 127, 128, 255, 256, 2**15 - 1, 2**15, 2**16 - 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**63)
HUGE_TEXT = (b"0", b"-1", b"65537", b"268435457", b"4294967296", b"1e308", b"nan", b"inf", b"9" * 40)
GZIP, PNG, ZIP = b"\x1f\x8b", b"\x89PNG\r\n\x1a\n", b"PK\x03\x04"
PNG_CHUNK_OVERHEAD = 12  # length, name and checksum
MAX_MUTANT_BYTES = 1 << 20
HEADER_BYTES = 400

Mutation = Callable[[bytearray, random.Random], None]


def flip_bits(content: bytearray, rng: random.Random) -> None:
    for _ in range(rng.randint(1, 8)):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def write_extreme(content: bytearray, rng: random.Random) -> None:
    """Overwrite a number in the header, of two, four or eight bytes in either byte order, at an even offset."""
    size, order = rng.choice((2, 4, 8)), rng.choice(("little", "big"))
    start = rng.randrange(0, min(HEADER_BYTES, len(content)), 2)
    content[start : start + size] = (rng.choice(EXTREMES) % 256**size).to_bytes(size, order)


def cut(content: bytearray, rng: random.Random) -> None:
    del content[rng.randrange(len(content)) :]


def drop(content: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(content))
    del content[start : start + rng.randint(1, 64)]


def repeat(content: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(content))
    piece = content[start : start + rng.randint(1, 256)]
    content[start:start] = piece * rng.randint(1, 8)


def write_number(content: bytearray, rng: random.Random) -> None:
    """Replace a number that is written in digits, as in NRRD, DICOM and NumPy headers."""
    digits = [index for index in range(len(content)) if 48 <= content[index] <= 57]
    if digits:
        start = end = rng.choice(digits)
        while end < len(content) and 48 <= content[end] <= 57:
            end += 1
        content[start:end] = rng.choice(HUGE_TEXT)


MUTATIONS: Sequence[Mutation] = (flip_bits, write_extreme, write_extreme, cut, drop, repeat, write_number)


def mutate(content: bytes, rng: random.Random) -> bytes:
    """Return a mutant of a file, at most ``MAX_MUTANT_BYTES`` long."""
    if content.startswith(GZIP) and rng.random() < 0.7:
        return gzip.compress(mutate(gzip.decompress(content), rng), 1)
    if content.startswith(ZIP) and rng.random() < 0.7:
        return _mutate_member(content, rng)
    mutant = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        if mutant:
            rng.choice(MUTATIONS)(mutant, rng)
    if content.startswith(PNG) and rng.random() < 0.8:
        mutant = _with_checksums(mutant)
    return bytes(mutant[:MAX_MUTANT_BYTES])


def mutate_json(value: Any, rng: random.Random) -> Any:
    """Return JSON data with one value replaced, removed, renamed or nested, anywhere in it."""
    root = json.loads(json.dumps(value))
    holder: Any = root
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        if not keys:
            return root
        key = rng.choice(keys)
        if isinstance(holder[key], dict | list) and rng.random() < 0.8:
            holder = holder[key]
            continue
        _change(holder, key, rng)
        return root


def _change(holder: Any, key: Any, rng: random.Random) -> None:
    match rng.randrange(4):
        case 0:
            holder[key] = rng.choice((None, True, 0, -1, 2**31, 2**70, 1e308, float("inf"), float("nan"), "", [], {}))
        case 1:
            holder[key] = rng.choice(("../a", "/dev/zero", "a\0b", "\udcff", "x" * 5000, "[/red]", "=1+1", "fp32.onnx"))
        case 2:
            del holder[key]
        case _:
            holder[key] = [holder[key]]


def _mutate_member(content: bytes, rng: random.Random) -> bytes:
    """Write a zip archive anew with one member mutated, and sometimes twice, compressed or under another name."""
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(packed, "w") as target:
        chosen = rng.choice(source.namelist())
        for name in source.namelist():
            member = source.read(name)
            if name == chosen:
                member = mutate(member, rng)
                name = rng.choice((name, name, name, "../a.npy", ""))
            target.writestr(name or "a", member, rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))
    return packed.getvalue()


def _with_checksums(content: bytearray) -> bytearray:
    """Correct the checksum of every PNG chunk that is complete."""
    position = len(PNG)
    while position + PNG_CHUNK_OVERHEAD <= len(content):
        (length,) = struct.unpack_from(">I", content, position)
        end = position + 8 + length
        if end + 4 > len(content):
            break
        struct.pack_into(">I", content, end, zlib.crc32(content[position + 4 : end]))
        position = end + 4
    return content
