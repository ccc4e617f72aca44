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
from medseg_trt.train.block.gguf_file import open_gguf

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
        "general.architecture": "llama",
        "u8": 200,
        "i16": -300,
        "u32": 70000,
        "i64": -(2**40),
        "f32": 0.5,
        "f64": 1e-5,
        "yes": True,
        "text": "Größe",
        "words": None,
        "numbers": None,
    }
    assert file.metadata.items() >= expected.items()


def test_the_tensors_of_a_real_file_fill_it_to_the_last_byte(llama_gguf):
    """Each begins where the one before has ended, but for the alignment: no size or place can be wrong."""
    file = open_gguf(llama_gguf)
    assert len(file.tensors) == 9 * file.metadata["llama.block_count"] + 2  # the layers, the words, the final norm
    tensors = sorted(file.tensors.values(), key=lambda tensor: tensor.start)
    ends = [tensor.start + tensor.size for tensor in tensors]
    assert all(0 <= tensor.start - end < 32 for tensor, end in zip(tensors[1:], ends, strict=False))
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
    tensor = file.tensors["rows"]
    expected = formula(np.frombuffer(path.read_bytes(), np.uint8, tensor.size, tensor.start)).reshape(ROWS.shape)
    rows = file.read("rows")
    assert rows.dtype == torch.float32
    # a product and a sum in float32, of numbers below 4: two roundings of at most 2.4e-7
    np.testing.assert_allclose(rows.numpy(), expected, rtol=0, atol=5e-7)
    # half a step between the most and the least of 32 normal numbers, of which there are 15 or 255
    assert np.abs(expected - ROWS).max() < (0.05 if kind == "Q8_0" else 0.6)


@pytest.mark.parametrize(("kind", "dtype"), [("F16", torch.float16), ("BF16", torch.bfloat16), ("F32", torch.float32)])
def test_floating_point_tensors_keep_their_type(kind, dtype, tmp_path):
    rows = open_gguf(write(tmp_path / "a.gguf", {"rows": ROWS}, kind)).read("rows")
    assert rows.dtype == dtype
    assert torch.equal(rows, torch.from_numpy(ROWS).to(dtype))


def q4_k(block: np.ndarray) -> np.ndarray:
    """Return 256 values of 144 bytes, as the largest terms of each and their sum."""
    scale, low = block[:4].copy().view(np.float16).astype(np.float64)
    packed, quants = block[4:16].astype(int), block[16:].reshape(4, 32)
    parts = []
    for part in range(8):
        if part < 4:
            steps, least = packed[part] & 63, packed[part + 4] & 63
        else:
            steps = (packed[part + 4] & 15) | (packed[part - 4] >> 6 << 4)
            least = (packed[part + 4] >> 4) | (packed[part] >> 6 << 4)
        nibbles = quants[part // 2] & 15 if part % 2 == 0 else quants[part // 2] >> 4
        parts.append(np.stack((scale * steps * nibbles, np.full(32, -low * least))))
    return np.hstack(parts)


def q6_k(block: np.ndarray) -> np.ndarray:
    """Return 256 values of 210 bytes, each as a sum of one term."""
    low, high = block[:128].reshape(2, 2, 32), block[128:192].reshape(2, 32)
    steps = block[192:208].view(np.int8).astype(np.float64).reshape(2, 8)
    scale = block[208:].copy().view(np.float16).astype(np.float64)
    values = np.empty((2, 4, 32))
    for half in range(2):
        for quarter in range(4):
            nibbles = low[half, quarter % 2] & 15 if quarter < 2 else low[half, quarter % 2] >> 4
            numbers = (nibbles | ((high[half] >> 2 * quarter & 3) << 4)).astype(np.float64) - 32
            values[half, quarter] = scale * np.repeat(steps[half, 2 * quarter : 2 * quarter + 2], 16) * numbers
    return values.reshape(1, 256)


@pytest.mark.parametrize(("kind", "formula"), [("Q4_K", q4_k), ("Q6_K", q6_k)])
def test_blocks_of_256_are_dequantised_as_ggml_defines_them(kind, formula, tmp_path):
    """Source of the formulas: ggml, ``ggml-quants.c``, ``dequantize_row_q4_K`` and ``dequantize_row_q6_K``."""
    data = random_blocks(GGMLQuantizationType[kind], rows=5, blocks_of_row=2)
    rows = open_gguf(write_stored(tmp_path / "a.gguf", {"rows": (kind, data)})).read("rows").numpy()
    terms = np.stack([formula(block) for block in data.reshape(10, -1)])  # (blocks, terms, 256)
    # float32 rounds two products and a sum, each by 2**-24 of the largest term; twice that
    assert (np.abs(rows.reshape(10, 256) - terms.sum(1)) <= 6 * 2.0**-24 * np.abs(terms).max(1)).all()
    assert rows.std() > 0


def random_blocks(kind: GGMLQuantizationType, rows: int, blocks_of_row: int) -> np.ndarray:
    """Return random bytes of which every block means finite numbers."""
    rng = np.random.default_rng(0)
    size = gguf.GGML_QUANT_SIZES[kind][1]
    data = rng.integers(0, 256, (rows * blocks_of_row, size), np.uint8)
    while len(bad := np.flatnonzero(~np.isfinite(dequantised(data, kind)).all(1))):
        data[bad] = rng.integers(0, 256, (len(bad), size), np.uint8)
    return data.reshape(rows, blocks_of_row * size)


def dequantised(data: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        return gguf.quants.dequantize(data, kind)


def write_stored(path: Path, tensors: Mapping[str, tuple[str, np.ndarray]]) -> Path:
    """Write a file of tensors whose rows are bytes of the named types."""
    writer = GGUFWriter(path, "llama")
    for name, (kind, data) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def can_be_dequantised(kind: GGMLQuantizationType) -> bool:
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


READABLE = [kind.name for kind in GGMLQuantizationType if can_be_dequantised(kind)]
UNREADABLE = [kind.name for kind in GGMLQuantizationType if not can_be_dequantised(kind)]


def test_the_types_of_published_models_can_be_read():
    published = {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"}
    by_importance = {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"}
    assert set(READABLE) >= published | by_importance | {"TQ1_0", "TQ2_0", "MXFP4"}


@pytest.mark.parametrize("kind", READABLE)
def test_every_type_that_gguf_dequantises_is_read_in_its_place(kind, tmp_path):
    """Between two others, of several rows of several blocks, so that neither place, row nor block can be mixed up."""
    quantisation = GGMLQuantizationType[kind]
    data = random_blocks(quantisation, rows=3, blocks_of_row=2)
    other = random_blocks(quantisation, rows=1, blocks_of_row=1)
    path = write_stored(tmp_path / "a.gguf", {"a": (kind, other), "rows": (kind, data), "z": (kind, other)})
    file = open_gguf(path)
    rows, expected = file.read("rows"), dequantised(data, quantisation)
    assert file.tensors["rows"].shape == expected.shape == (3, 2 * gguf.GGML_QUANT_SIZES[quantisation][0])
    np.testing.assert_array_equal(rows.float().numpy(), expected)
    assert len(np.unique(expected, axis=0)) == 3


@pytest.mark.parametrize("kind", UNREADABLE)
def test_a_type_that_cannot_be_dequantised_is_named(kind, tmp_path):
    size = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1]
    path = write_stored(tmp_path / "a.gguf", {"rows": (kind, np.zeros((2, 3 * size), np.uint8))})
    with pytest.raises(ArtefactError, match=rf"a\.gguf: rows has the type {kind}, which cannot be .*to F16 or Q8_0"):
        open_gguf(path).read("rows")


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def entry(key: str, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def tensor_entry(name: str, shape: Sequence[int] = (4,), kind: int = 0, offset: int = 0) -> bytes:
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
    "a tensor twice": (header(tensor_entry("a") * 2, tensors=2), "names a tensor twice"),
    "alignment zero": (header(entry("general.alignment", UINT32, bytes(4)), entries=1), "general.alignment is 0"),
    "alignment of text": (
        header(entry("general.alignment", STRING, string("a")), entries=1),
        "general.alignment is 'a'",
    ),
    "dimensions without end": (header(tensor_entry("a", [1] * 5), tensors=1), "'a' claims 5 dimensions"),
    "nothing in it": (header(tensor_entry("a", [0, HUGE]), tensors=1), "'a' of shape"),
    "no dimensions": (header(tensor_entry("a", []), tensors=1), r"'a' of shape \(\)"),
    "unknown tensor type": (header(tensor_entry("a", kind=999), tensors=1), "999 is not a valid"),
    "half a quantisation block": (
        header(tensor_entry("a", [33], kind=8), tensors=1),
        "cannot hold whole Q8_0 blocks of 32",
    ),
    "tensor past the end": (header(tensor_entry("a", [17]), tensors=1), "'a' ends at byte 132, but the file ends at"),
    "offset past the end": (header(tensor_entry("a", offset=HUGE), tensors=1), "but the file ends at"),
    "shape without end": (header(tensor_entry("a", [HUGE] * 4), tensors=1), "but the file ends at"),
}


@pytest.mark.parametrize("fault", BAD_HEADERS)
def test_a_header_that_cannot_be_true_is_refused(fault, tmp_path):
    content, problem = BAD_HEADERS[fault]
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(ArtefactError, match=rf"a\.gguf is not a usable GGUF file: .*{problem}"):
        open_gguf(tmp_path / "a.gguf")


def test_valid_counterpart_of_the_bad_gguf_headers_is_accepted(tmp_path):
    sound = header(entry("a", BOOL, b"\1"), tensor_entry("t", [16]), entries=1, tensors=1, data=31 + 64)
    (tmp_path / "a.gguf").write_bytes(sound)
    file = open_gguf(tmp_path / "a.gguf")
    assert file.metadata == {"a": True}
    assert torch.equal(file.read("t"), torch.zeros(16))


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("small") / "a.gguf", {"rows": ROWS, "vector": ROWS[0]}, "Q8_0")


def test_a_file_cut_short_at_any_byte_is_refused(small, tmp_path):
    whole = small.read_bytes()
    last = max(tensor.start + tensor.size for tensor in open_gguf(small).tensors.values())
    for size in range(0, last, 3):
        (tmp_path / "a.gguf").write_bytes(whole[:size])
        with pytest.raises(ArtefactError):
            open_gguf(tmp_path / "a.gguf")


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_damaged_header_is_read_or_refused_and_nothing_else(small, data):
    content = bytearray(small.read_bytes())
    origin = min(tensor.start for tensor in open_gguf(small).tensors.values())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, origin - 1))] = data.draw(st.integers(0, 255))
    path = small.with_name("damaged.gguf")
    path.write_bytes(content)
    with suppress(ArtefactError):
        file = open_gguf(path)
        for name, tensor in file.tensors.items():
            assert file.read(name).shape == tensor.shape
