"""An archive in parts: joined they are the archive, each has its digest, and equal files make equal parts."""

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from medseg_trt.errors import UsageError
from medseg_trt.kit import parts as parts_module
from medseg_trt.kit.parts import MANIFEST, Manifest, PartWriter, write_parts
from medseg_trt.kit.spec import parse_size

PART_BYTES = 10_000


@pytest.fixture
def content(tmp_path) -> Path:
    folder = tmp_path / "content"
    (folder / "wheels").mkdir(parents=True)
    for index, size in enumerate((0, 1, 511, 512, 30_000)):
        (folder / "wheels" / f"{index}.whl").write_bytes(os.urandom(size))
    (folder / "run.sh").write_text("generated", encoding="utf-8")
    return folder


def joined(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.glob("kit.tar.*")))


def test_the_joined_parts_are_an_archive_of_the_same_files(content, tmp_path):
    out = tmp_path / "kit"
    out.mkdir()
    parts, total = write_parts(content, out, PART_BYTES)
    assert [part.num_bytes for part in parts[:-1]] == [PART_BYTES] * (len(parts) - 1)
    assert len(parts) > 3
    for part in parts:
        data = (out / part.name).read_bytes()
        assert (part.num_bytes, part.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert total == hashlib.sha256(joined(out)).hexdigest()
    (tmp_path / "kit.tar").write_bytes(joined(out))
    subprocess.run(["tar", "-xf", "kit.tar", "--one-top-level=unpacked"], cwd=tmp_path, check=True)
    for path in content.rglob("*.whl"):
        assert (tmp_path / "unpacked" / path.relative_to(content)).read_bytes() == path.read_bytes()


def test_equal_files_make_equal_parts_whatever_their_times_and_permissions(content, tmp_path):
    totals = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        totals.append(write_parts(content, tmp_path / name, PART_BYTES)[1])
        for path in content.rglob("*.whl"):
            os.utime(path, (1, 1))
            path.chmod(0o600)
    assert totals[0] == totals[1]


def test_a_kit_of_too_many_parts_is_refused_with_the_next_step(content, tmp_path, monkeypatch):
    monkeypatch.setattr(parts_module, "MAX_PARTS", 2)
    (tmp_path / "kit").mkdir()
    with pytest.raises(UsageError, match="more than 2 parts; choose larger ones, for example --parts 48M"):
        write_parts(content, tmp_path / "kit", PART_BYTES)


@pytest.mark.parametrize("sizes", [[25], [10, 10], [3, 3, 3, 3], [10, 1]])
def test_a_part_is_full_before_the_next_begins(sizes, tmp_path):
    writer = PartWriter(tmp_path, 10)
    for size in sizes:
        assert writer.write(b"x" * size) == size
    writer.close()
    whole, rest = divmod(sum(sizes), 10)
    assert [part.num_bytes for part in writer.parts] == [10] * whole + [rest] * bool(rest)


def test_the_last_line_of_the_manifest_is_the_digest_of_the_others(tmp_path):
    Manifest(
        project="medseg-trt", version="1", python="3.12", abi="abi", given=("torch==2",), parts=(), total_sha256="ab"
    ).write(tmp_path / MANIFEST, ())
    *lines, seal = (tmp_path / MANIFEST).read_bytes().splitlines(keepends=True)
    assert seal.decode() == f"seal {hashlib.sha256(b''.join(lines)).hexdigest()}\n"
    assert b"given torch==2\n" in lines


@pytest.mark.parametrize(("text", "size"), [("48M", 48 << 20), ("1K", 1024), ("2G", 2 << 30)])
def test_a_size_is_in_powers_of_two(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["48", "0M", "48MB", "-1M", "1.5G", "M", "48m", ""])
def test_what_is_no_size_is_refused_with_an_example(text):
    with pytest.raises(UsageError, match="for example --parts 48M"):
        parse_size(text)
