"""What an archive holds and is not segmented has a row with the reason; nothing is lost in silence."""

import tarfile
from contextlib import closing
from pathlib import Path

import pytest
from archive_runs import planned, reasons, save_picture

from medseg_trt.archive.containers import Container

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
NAMES = [f"{number}.png" for number in range(4)]
LONG = "long" * 30 + ".png"  # GNU and pax write a header of its own for it


def tarred(tmp_path: Path, kind: str, names: list[str]) -> tuple[Path, int, int]:
    """Return a tar file, where the header of its second member is, and where its members end."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=FORMATS[kind]) as archive:
        for seed, name in enumerate(names):
            archive.add(save_picture(tmp_path / f"{seed}.png", seed), name)
        members_end = archive.offset
    with tarfile.open(path) as archive:
        second = archive.getmembers()[1].offset
    return path, second, members_end


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("damage", ["a bit of the checksum", "cut within the header"])
def test_a_tar_file_with_a_damaged_header_is_refused(tmp_path, kind, damage):
    path, second, _ = tarred(tmp_path, kind, NAMES)
    content = bytearray(path.read_bytes())
    content[second + 149] ^= 1
    path.write_bytes(content if damage.startswith("a bit") else content[: second + 300])
    found = reasons([path], tmp_path / "out")
    assert found.keys() == {"a.tar"}
    assert found["a.tar"][1]
    assert "a header is damaged or cut short" in found["a.tar"][0]
    assert planned([path], tmp_path / "out") == {}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("end", ["as written", "no zero blocks", "part of a zero block", "more after the zero blocks"])
def test_a_complete_tar_file_is_read_however_it_ends(tmp_path, kind, end):
    names = [*NAMES, "folder/" * 20 + LONG[:90]] if kind == "ustar" else [*NAMES, LONG]
    path, _, members_end = tarred(tmp_path, kind, names)
    content = path.read_bytes()
    endings = {
        "as written": content,
        "no zero blocks": content[:members_end],
        "part of a zero block": content[: members_end + 100],
        "more after the zero blocks": content + b"x" * 512,
    }
    path.write_bytes(endings[end])
    with closing(Container(path)) as container:
        assert [member.name for member in container.members()] == names
