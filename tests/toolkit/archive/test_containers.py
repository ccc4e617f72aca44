"""Zip and tar files are read member by member, and lie about their names and sizes in vain."""

import io
import struct
import tarfile
import zipfile
from contextlib import closing
from pathlib import Path

import pytest
from archive_runs import planned, reasons, save_picture, save_slices, slices

from medseg_trt.archive import containers
from medseg_trt.archive.containers import Container, is_container
from medseg_trt.errors import InputError


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for seed, name in enumerate(("a.png", "p1/x1.png", "p1/x2.png")):
        save_picture(tmp_path / "in" / name, seed)
    save_slices([tmp_path / "in" / "ct" / str(index) for index in range(3)], slices(4))
    return tmp_path / "in"


def zipped(tree: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(tree.rglob("*")):
            archive.write(file, file.relative_to(tree))
    return path


def tarred(tree: Path, path: Path) -> Path:
    with tarfile.open(path, "w") as archive:
        archive.add(tree, arcname=".")
    return path


@pytest.mark.parametrize("make", [zipped, tarred])
def test_an_archive_file_holds_the_images_of_its_tree(tree, tmp_path, make):
    path = make(tree, tmp_path / "in.archive.zip" if make is zipped else tmp_path / "in.tar")
    assert is_container(path)
    assert planned([path], tmp_path / "out") == planned([tree], tmp_path / "out")
    with closing(Container(path)) as container:
        container.copy("p1/x1.png", tmp_path / "copy.png")
        assert (tmp_path / "copy.png").read_bytes() == (tree / "p1" / "x1.png").read_bytes()
        with pytest.raises(InputError, match="gone cannot be read from the archive"):
            container.copy("gone", tmp_path / "gone")


def test_names_that_lead_out_links_and_encrypted_members_are_refused_and_the_rest_is_used(tmp_path):
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        archive.write(save_picture(tmp_path / "good.png"), "in/good.png")
        for name in ("../up.png", "/root.png", "a/../../up2.png", "C:\\drive.png", "..\\up3.png"):
            archive.writestr(name, b"x")
        link = zipfile.ZipInfo("in/link.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("in/secret.png", b"x")
        archive.infolist()[-1].flag_bits |= 1
    assert [*planned([tmp_path / "bad.zip"], tmp_path / "out")] == ["in/good"]
    reason_by_name = reasons([tmp_path / "bad.zip"], tmp_path / "out")
    assert {name: reason.rpartition(": ")[2] for name, (reason, _) in reason_by_name.items()} == {
        **dict.fromkeys(("up.png", "root.png", "up2.png", "C:\\drive.png", "..\\up3.png"), containers.LEADS_OUT),
        "link.png": "a link or a device",
        "secret.png": "an encrypted file",
    }
    assert all(is_error for _, is_error in reason_by_name.values())


def test_links_and_devices_in_a_tar_file_are_refused(tmp_path):
    with tarfile.open(tmp_path / "bad.tar", "w") as archive:
        archive.add(save_picture(tmp_path / "good.png"), "good.png")
        for name, kind in (
            ("link.png", tarfile.SYMTYPE),
            ("hard.png", tarfile.LNKTYPE),
            ("fifo.png", tarfile.FIFOTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
        archive.addfile(tarfile.TarInfo("../up.png"))
    assert [*planned([tmp_path / "bad.tar"], tmp_path / "out")] == ["good"]
    assert set(reasons([tmp_path / "bad.tar"], tmp_path / "out")) == {"link.png", "hard.png", "fifo.png", "up.png"}


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz"])
def test_a_compressed_tar_file_says_what_to_do(tree, tmp_path, name):
    with tarfile.open(tmp_path / name, "w:gz") as archive:
        archive.add(tree, arcname=".")
    (reason, is_error) = reasons([tmp_path / name], tmp_path / "out")[name]
    assert is_error
    assert reason.endswith("is a compressed tar file, whose members cannot be read in place; decompress it first")


def test_an_archive_inside_a_tree_is_named(tree, tmp_path):
    zipped(tree, tree / "p1" / "inner.zip")
    assert reasons([tree], tmp_path / "out")["inner.zip"] == ("an archive; give it as an input of its own", False)


def test_a_member_longer_than_the_limit_is_cut_off(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.png", bytes(1 << 20))
    monkeypatch.setattr(containers, "MAX_MEMBER_BYTES", 1 << 18)
    assert "longer than 0 MiB" in reasons([tmp_path / "bomb.zip"], tmp_path / "out")["bomb.png"][0]
    with (
        closing(Container(tmp_path / "bomb.zip")) as container,
        pytest.raises(InputError, match="is longer than 0 MiB"),
    ):
        container.copy("bomb.png", tmp_path / "copy")
    assert (tmp_path / "copy").stat().st_size <= 1 << 18


def test_a_zip_file_with_a_huge_list_of_members_is_refused_before_it_is_read(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.png", b"x")
    content = bytearray((tmp_path / "a.zip").read_bytes())
    struct.pack_into("<L", content, len(content) - 22 + 12, 1 << 30)
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(InputError, match="whose list takes 1073741824 bytes; divide it"):
        Container(tmp_path / "a.zip")


def test_a_tar_header_of_any_length_is_not_read_at_once(tmp_path):
    long_name = tarfile.TarInfo("././@LongLink")
    long_name.type, long_name.size = tarfile.GNUTYPE_LONGNAME, 1 << 40
    (tmp_path / "a.tar").write_bytes(long_name.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    with pytest.raises(InputError, match="cannot be read as an archive: a header of 1099511627776 bytes is too long"):
        Container(tmp_path / "a.tar")


@pytest.mark.parametrize("size", [10, 100, 700])
def test_truncated_zip_file_is_refused_in_one_line(tree, tmp_path, size):
    path = zipped(tree, tmp_path / "in.zip")
    path.write_bytes(path.read_bytes()[:size])
    (reason, is_error) = reasons([path], tmp_path / "out")["in.zip"]
    assert is_error
    assert "cannot be read as an archive" in reason


def test_a_tar_file_that_ends_within_a_member_names_it(tree, tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.add(tree / "a.png", arcname="a.png")
    (tmp_path / "cut.tar").write_bytes(buffer.getvalue()[:800])
    with pytest.raises(InputError, match="cannot be read"), closing(Container(tmp_path / "cut.tar")) as container:
        container.copy("a.png", tmp_path / "copy")


def header(name: str = "a.png", size: int = 0, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def extended(body: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    return header("x", len(body), kind) + body + bytes(-len(body) % 512)


BACK = header("a.png") + header("b.png", -512)  # the second size leads back to its own header, again and again
GLOBAL = extended(b"".join(b"13 key%05d=\n" % number for number in range(65)), tarfile.XGLTYPE)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (BACK, "the header of 'b.png' is not to be trusted"),
        (GLOBAL + header(), "the header of 'a.png' is not to be trusted"),
        (extended(b"3 a" * 300 + b"=") + header(), "an extended header is damaged"),  # keywords of the whole rest
        (extended(b"608 k=" + b"1" * 601 + b"\n") + header(), "a number of more than 128 digits"),
        ((header("x", 2, tarfile.GNUTYPE_LONGNAME) + b"a" + bytes(511)) * 2000 + header(), "recursion"),
    ],
)
def test_headers_of_a_tar_file_that_would_take_forever_are_refused(tmp_path, content, reason):
    (tmp_path / "a.tar").write_bytes(content + bytes(1024))
    with pytest.raises(InputError, match=reason):
        Container(tmp_path / "a.tar")


def test_extended_headers_that_tar_writes_are_read(tree, tmp_path):
    name = f"{'ä' * 120}/{'b' * 200}.png"
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        info = archive.gettarinfo(tree / "a.png", name)
        info.pax_headers = {"SCHILY.xattr.user.note": "1" * 100 + " = \n" + "x" * 900}
        with (tree / "a.png").open("rb") as file:
            archive.addfile(info, file)
    with closing(Container(tmp_path / "a.tar")) as container:
        (member,) = container.members()
        assert (member.name, member.reason) == (name, None)


def test_a_second_end_record_does_not_hide_the_size_of_the_list(tmp_path, monkeypatch):
    monkeypatch.setattr(containers, "MAX_DIRECTORY_BYTES", 1000)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.png", b"x")
    content = (tmp_path / "a.zip").read_bytes()
    start, end = content.find(b"PK\1\2"), content.rfind(containers.END)
    listed, first = content[start:end] * 100, content[:start]
    small, true = (
        struct.pack("<4sQ2H2L4Q", containers.END64, 44, 45, 45, 0, 0, 1, 1, size, len(first) + 56)
        for size in (10, len(listed))
    )
    locator = containers.LOCATOR64 + struct.pack("<LQL", 0, len(first), 1)
    last = struct.pack("<4s4H2LH", containers.END, 0, 0, 1, 1, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    (tmp_path / "a.zip").write_bytes(first + small + listed + true + locator + last)
    with pytest.raises(InputError, match="its list of members is damaged"):
        Container(tmp_path / "a.zip")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_zip_members_with_bzip2_or_lzma_are_refused(tmp_path, method):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", method) as archive:
        archive.writestr("a.png", bytes(5000))
    with closing(Container(tmp_path / "a.zip")) as container:
        assert [member.reason for member in container.members()] == [
            "compressed by another method than deflate; compress it again"
        ]
        with pytest.raises(InputError, match="another method than deflate"):
            container.copy("a.png", tmp_path / "copy.png")


def test_names_that_no_disk_holds_and_names_that_occur_twice_are_refused(tmp_path):
    picture = save_picture(tmp_path / "good.png").read_bytes()
    names = ("good.png", "1" * 5000 + ".png", "é" * 126 + ".png", "b" * 300 + "/c.png", "d/" * 2100 + "e.png")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in (*names, "f//g.png", "f/g.png"):
            archive.writestr(name, picture)
    reason_by_name = reasons([tmp_path / "a.zip"], tmp_path / "out")
    assert planned([tmp_path / "a.zip"], tmp_path / "out").keys() == {"good", "f/g"}
    assert reason_by_name.pop("g.png")[0].endswith("a later member has the same name")
    assert len(reason_by_name) == 4
    assert all(is_error and reason.endswith(containers.TOO_LONG) for reason, is_error in reason_by_name.values())


def test_a_damaged_dicom_member_stops_itself_alone(tmp_path):
    save_slices([tmp_path / "ct" / f"{index}.dcm" for index in range(3)], slices(4))
    save_picture(tmp_path / "ct" / "a.png")
    path = zipped(tmp_path / "ct", tmp_path / "in.zip")
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("2.dcm")
    content[info.header_offset + 30 + len("2.dcm") + info.compress_size // 2] ^= 0xFF
    path.write_bytes(content)
    refused = reasons([path], tmp_path / "out")
    assert [(name, is_error) for name, (_, is_error) in refused.items()] == [("2.dcm", True)]
    assert "in.zip/2.dcm cannot be read from the archive" in refused["2.dcm"][0]
    assert sorted(planned([path], tmp_path / "out").values()) == [("0.dcm", "1.dcm"), ("a.png",)]


def test_a_list_of_several_archives_with_slices_is_divided_by_archive(tmp_path):
    for name, seed in (("one", 3), ("two", 5)):
        save_slices(
            [tmp_path / name / f"{index}.dcm" for index in range(3)], slices(seed), SeriesInstanceUID=f"1.2.{seed}"
        )
        zipped(tmp_path / name, tmp_path / f"{name}.zip")
    (tmp_path / "list").write_text(f"{tmp_path}/one.zip\n{tmp_path}/two.zip\n")
    images = planned([], tmp_path / "out", list_file=str(tmp_path / "list"), names="dicom")
    assert len(images) == 2
    assert {len(files) for files in images.values()} == {3}
