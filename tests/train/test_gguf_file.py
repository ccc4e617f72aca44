"""GGUF files: what the gguf package writes is read back, and a header that cannot be true is refused at once."""

import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_trt.errors import ArtefactError
from medseg_trt.train.gguf_file import open_gguf

ROWS = np.random.default_rng(0).standard_normal((6, 64)).astype(np.float32)


def write(path: Path, tensors: Mapping[str, np.ndarray], kind: str = "F32", alignment: int | None = None) -> Path:
    """Write a small file with one value of each kind of metadata."""
    writer = GGUFWriter(path, "llama")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    writer.add_uint8("u8", 200)
    writer.add_int16("i16", -300)
    writer.add_uint32("u32", 70000)
    writer.add_int64("i64", -(2**40))
    writer.add_float32("f32", 0.5)
    writer.add_float64("f64", 1e-5)
    writer.add_bool("yes", True)
    writer.add_string("text", "Größe")
    writer.add_array("words", ["one", "two"])
    writer.add_array("numbers", [1, 2, 3])
    for name, tensor in tensors.items():
        quantisation = GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quants.quantize(tensor, quantisation), raw_dtype=quantisation)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("alignment", [None, 64, 256])
def test_what_the_gguf_package_writes_is_read_back(alignment, tmp_path):
    tensors = {"odd": ROWS[:3, :7], "rows": ROWS, "vector": ROWS[0], "cube": ROWS.reshape(2, 3, 64)}
    file = open_gguf(write(tmp_path / "a.gguf", tensors, alignment=alignment))
    for name, tensor in tensors.items():
        assert file.tensors[name].shape == tensor.shape
        np.testing.assert_array_equal(file.read(name).numpy(), tensor)
    expected = {
        "general.architecture": "llama", "u8": 200, "i16": -300, "u32": 70000, "i64": -(2**40), "f32": 0.5, "f64": 1e-5,
        "yes": True, "text": "Größe", "words": None, "numbers": None,
    }  # fmt: skip
    assert file.metadata.items() >= expected.items()


def test_the_tensors_of_a_real_file_fill_it_to_the_last_byte(llama_gguf):
    """Each begins where the one before has ended, but for the alignment: no size or place can be wrong."""
    file = open_gguf(llama_gguf)
    assert len(file.tensors) == 9 * file.metadata["llama.block_count"] + 2  # the layers, the words, the final norm
    places = sorted(file.tensors.values(), key=lambda place: place.start)
    ends = [place.start + place.size for place in places]
    assert all(0 <= place.start - end < 32 for place, end in zip(places[1:], ends, strict=False))
    assert 0 <= llama_gguf.stat().st_size - ends[-1] < 32
    assert file.tensors["blk.0.attn_k.weight"].shape == (192, 576)


def q8_0(data: np.ndarray) -> np.ndarray:
    blocks = data.reshape(-1, 34)
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float64)
    return scale * blocks[:, 2:].view(np.int8)


def q4_0(data: np.ndarray) -> np.ndarray:
    blocks = data.reshape(-1, 18)
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float64)
    return scale * (np.hstack((blocks[:, 2:] & 15, blocks[:, 2:] >> 4)).astype(np.float64) - 8)


def q4_1(data: np.ndarray) -> np.ndarray:
    blocks = data.reshape(-1, 20)
    scale, low = (blocks[:, i : i + 2].copy().view(np.float16).astype(np.float64) for i in (0, 2))
    return scale * np.hstack((blocks[:, 4:] & 15, blocks[:, 4:] >> 4)) + low


@pytest.mark.parametrize(("kind", "formula"), [("Q8_0", q8_0), ("Q4_0", q4_0), ("Q4_1", q4_1)])
def test_blocks_of_32_are_dequantised_as_ggml_defines_them(kind, formula, tmp_path):
    """Source of the formulas: ggml, ``ggml-quants.c``, ``dequantize_row_q8_0`` and its neighbours."""
    path = write(tmp_path / "a.gguf", {"first": ROWS[:1], "rows": ROWS}, kind)
    file = open_gguf(path)
    place = file.tensors["rows"]
    expected = formula(np.frombuffer(path.read_bytes(), np.uint8, place.size, place.start)).reshape(ROWS.shape)
    found = file.read("rows")
    assert found.dtype == torch.float32
    # a product and a sum in float32, of numbers below 4: two roundings of at most 2.4e-7
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=5e-7)
    # half a step between the most and the least of 32 normal numbers, of which there are 15 or 255
    assert np.abs(expected - ROWS).max() < (0.05 if kind == "Q8_0" else 0.6)


@pytest.mark.parametrize(("kind", "dtype"), [("F16", torch.float16), ("BF16", torch.bfloat16), ("F32", torch.float32)])
def test_floating_point_tensors_keep_their_type(kind, dtype, tmp_path):
    found = open_gguf(write(tmp_path / "a.gguf", {"rows": ROWS}, kind)).read("rows")
    assert found.dtype == dtype
    assert torch.equal(found, torch.from_numpy(ROWS).to(dtype))


def test_a_type_that_cannot_be_dequantised_is_named(tmp_path):
    writer = GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("rows", ROWS.astype(np.float64))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ArtefactError, match=r"a\.gguf: rows has the type F64"):
        open_gguf(tmp_path / "a.gguf").read("rows")


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def entry(key: str, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def place(name: str, shape: Sequence[int] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    """Return a tensor's entry; ``shape`` has the fastest axis first, as in the file."""
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def header(
    *parts: bytes, entries: int = 0, tensors: int = 0, version: int = 3, magic: bytes = b"GGUF", data: int = 64
) -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, entries) + b"".join(parts) + bytes(data)


HUGE = 2**62
UINT32, BOOL, STRING, ARRAY = 4, 7, 8, 9
BAD_HEADERS: Mapping[str, tuple[bytes, str]] = {
    "empty": (b"", "cannot mmap an empty file"),
    "three bytes": (b"GGU", "asks for 4 bytes at byte 0, but the file ends at 3"),
    "other letters": (header(magic=b"GGML"), "does not begin with the letters GGUF"),
    "version 1": (header(version=1), "of version 1; versions 2 and 3"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(64), "of version 50331648; .* little-endian"),
    "tensors without end": (header(tensors=HUGE), f"claims {HUGE} tensors"),
    "entries without end": (header(entries=HUGE), f"claims {HUGE} metadata entries"),
    "text without end": (header(struct.pack("<Q", HUGE), entries=1), f"claims {HUGE} bytes of text"),
    "text past the end": (header(struct.pack("<Q", 1000), entries=1), "asks for 1000 bytes"),
    "text that is no UTF-8": (header(struct.pack("<Q", 2) + b"\xff\xfe", entries=1), "utf-8"),
    "unknown value": (header(entry("a", 99, bytes(8)), entries=1), "unknown type 99"),
    "array without end": (
        header(entry("a", ARRAY, struct.pack("<IQ", UINT32, HUGE)), entries=1),
        f"claims {HUGE} array items",
    ),
    "array past the end": (
        header(entry("a", ARRAY, struct.pack("<IQ", UINT32, 1000)), entries=1),
        "asks for 4000 bytes",
    ),
    "texts past the end": (
        header(entry("a", ARRAY, struct.pack("<IQQ", STRING, 2, HUGE)), entries=1),
        f"asks for {HUGE} bytes",
    ),
    "arrays in arrays": (
        header(entry("a", ARRAY, struct.pack("<IQ", ARRAY, 1) * 9), entries=1),
        "unknown type 9",
    ),
    "an entry twice": (header(entry("a", BOOL, b"\1") * 2, entries=2), "names a metadata entry twice"),
    "a tensor twice": (header(place("a") * 2, tensors=2), "names a tensor twice"),
    "alignment zero": (header(entry("general.alignment", UINT32, bytes(4)), entries=1), "general.alignment is 0"),
    "alignment of text": (
        header(entry("general.alignment", STRING, string("a")), entries=1),
        "general.alignment is 'a'",
    ),
    "dimensions without end": (header(place("a", [1] * 5), tensors=1), "'a' claims 5 dimensions"),
    "nothing in it": (header(place("a", [0, HUGE]), tensors=1), "'a' of shape"),
    "no dimensions": (header(place("a", []), tensors=1), r"'a' of shape \(\)"),
    "unknown tensor type": (header(place("a", kind=999), tensors=1), "999 is not a valid"),
    "half a quantisation block": (header(place("a", [33], kind=8), tensors=1), "cannot hold whole Q8_0 blocks of 32"),
    "tensor past the end": (header(place("a", [17]), tensors=1), "'a' ends at byte 132, but the file ends at"),
    "offset past the end": (header(place("a", offset=HUGE), tensors=1), "but the file ends at"),
    "shape without end": (header(place("a", [HUGE] * 4), tensors=1), "but the file ends at"),
}


@pytest.mark.parametrize("fault", BAD_HEADERS)
def test_a_header_that_cannot_be_true_is_refused(fault, tmp_path):
    content, problem = BAD_HEADERS[fault]
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(ArtefactError, match=rf"a\.gguf is not a usable GGUF file: .*{problem}"):
        open_gguf(tmp_path / "a.gguf")


def test_the_headers_above_are_refused_for_their_fault_alone(tmp_path):
    sound = header(entry("a", BOOL, b"\1"), place("t", [16]), entries=1, tensors=1, data=31 + 64)
    (tmp_path / "a.gguf").write_bytes(sound)
    file = open_gguf(tmp_path / "a.gguf")
    assert file.metadata == {"a": True}
    assert torch.equal(file.read("t"), torch.zeros(16))


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("small") / "a.gguf", {"rows": ROWS, "vector": ROWS[0]}, "Q8_0")


def test_a_file_cut_short_at_any_byte_is_refused(small, tmp_path):
    whole = small.read_bytes()
    last = max(place.start + place.size for place in open_gguf(small).tensors.values())
    for size in range(0, last, 3):
        (tmp_path / "a.gguf").write_bytes(whole[:size])
        with pytest.raises(ArtefactError):
            open_gguf(tmp_path / "a.gguf")


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_damaged_header_is_read_or_refused_and_nothing_else(small, data):
    content = bytearray(small.read_bytes())
    origin = min(place.start for place in open_gguf(small).tensors.values())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, origin - 1))] = data.draw(st.integers(0, 255))
    path = small.with_name("damaged.gguf")
    path.write_bytes(content)
    with suppress(ArtefactError):
        file = open_gguf(path)
        for name, place in file.tensors.items():
            assert file.read(name).shape == place.shape
