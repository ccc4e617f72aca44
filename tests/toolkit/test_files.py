"""Files and folders appear whole or not at all, and names from outside stay inside."""

import hashlib
import json
import os
import stat
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from medseg_trt import files
from medseg_trt.errors import ArtefactError
from medseg_trt.files import atomic_file, atomic_folder, cache_folder, inside, open_regular, sha256, write_json


class StopError(Exception):
    pass


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("size", [0, 1, 99, 100, 101, 1000])
def test_the_digest_is_that_of_hashlib_whatever_the_chunks(size, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHUNK_BYTES", 100)
    content = bytes(index * 7 % 256 for index in range(size))
    (tmp_path / "file").write_bytes(content)
    assert sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_a_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "new" / "deeper" / "mask.v1.nii.gz"
    with atomic_file(path) as temporary:
        assert temporary.parent == path.parent
        assert temporary.name.startswith(".")
        assert temporary.name.endswith(".nii.gz")
        temporary.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert everything(tmp_path / "new") == ["deeper", "deeper/mask.v1.nii.gz"]


def test_where_no_file_can_be_created_the_error_names_the_one_that_was_wanted(tmp_path, monkeypatch):
    def refuse(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(files.os, "open", refuse)
    with pytest.raises(PermissionError) as caught, atomic_file(tmp_path / "areas.csv"):
        pass
    assert caught.value.filename == str(tmp_path / "areas.csv")


def write_half(atomic: AbstractContextManager[Path], stop: type[BaseException]) -> None:
    """Stop when a part is written, into a file or into a file of a folder."""
    with atomic as temporary:
        (temporary / "half" if temporary.is_dir() else temporary).write_text("half")
        raise stop


@pytest.mark.parametrize("stop", [StopError, KeyboardInterrupt, SystemExit])
def test_a_file_that_was_not_finished_leaves_the_old_one_and_nothing_else(stop, tmp_path):
    path = tmp_path / "mask.png"
    for old in (None, "old"):
        if old is not None:
            path.write_text(old)
        with pytest.raises(stop):
            write_half(atomic_file(path), stop)
        assert everything(tmp_path) == ([] if old is None else ["mask.png"])
    assert path.read_text() == "old"


def test_files_and_folders_have_the_usual_permissions(tmp_path):
    previous = os.umask(0o027)
    try:
        with atomic_file(tmp_path / "file") as temporary:
            temporary.write_text("content")
        with atomic_folder(tmp_path / "folder"):
            pass
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o750


def fill(folder: Path, content: str) -> None:
    (folder / content).write_text(content)


def test_atomic_folder_replaces_the_old_folder_when_complete(tmp_path):
    path = tmp_path / "new" / "model.medseg"
    for content in ("first", "second"):
        with atomic_folder(path) as temporary:
            assert temporary.parent == path.parent
            fill(temporary, content)
            assert not (path / content).exists()
        assert everything(tmp_path / "new") == ["model.medseg", f"model.medseg/{content}"]


@pytest.mark.parametrize("stop", [StopError, KeyboardInterrupt])
def test_a_folder_that_was_not_finished_leaves_the_old_one_and_nothing_else(stop, tmp_path):
    path = tmp_path / "model.medseg"
    with pytest.raises(stop):
        write_half(atomic_folder(path), stop)
    assert everything(tmp_path) == []
    path.mkdir()
    fill(path, "old")
    with pytest.raises(stop):
        write_half(atomic_folder(path), stop)
    assert everything(tmp_path) == ["model.medseg", "model.medseg/old"]


def test_the_old_folder_comes_back_if_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    path = tmp_path / "model.medseg"
    path.mkdir()
    fill(path, "old")
    rename = Path.replace

    def refuse(self: Path, target: Path) -> Path:
        if target == path and not (self / "old").exists():
            raise PermissionError("refused")
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(PermissionError, match="refused"), atomic_folder(path) as temporary:
        fill(temporary, "new")
    assert everything(tmp_path) == ["model.medseg", "model.medseg/old"]


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "report.json"
    write_json(path, {"classes": ["Leber", "Milz – links"], "dice": 0.5, "none": None})
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "classes": ["Leber", "Milz – links"],
        "dice": 0.5,
        "none": None,
    }
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_json(path, {"path": object()})
    assert path.read_bytes() == before
    assert everything(tmp_path) == ["report.json"]


@pytest.mark.parametrize("name", ["model.onnx", "engines/a.plan", "./a", "engines/../a", "..a", "linked"])
def test_inside_accepts_paths_within_the_folder(name, tmp_path):
    (tmp_path / "linked").symlink_to(tmp_path / "model.onnx")
    assert inside(tmp_path, name) == (tmp_path / name).resolve()
    assert inside(tmp_path, name).is_relative_to(tmp_path.resolve())


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "..",
        "../beside",
        "engines/../../beside",
        "../bundle-beside/a",
        "out/secret",
        "link",
        "a\0b",
        "loop",
    ],
)
def test_inside_refuses_path_traversal(name, tmp_path):
    folder, elsewhere = tmp_path / "bundle", tmp_path / "bundle-beside"
    folder.mkdir()
    elsewhere.mkdir()
    (elsewhere / "secret").touch()
    (folder / "out").symlink_to(elsewhere)
    (folder / "link").symlink_to("../bundle-beside/secret")
    (folder / "loop").symlink_to("/proc/self/root")
    with pytest.raises(ArtefactError, match="not to be trusted"):
        inside(folder, name)


def test_a_loop_of_links_is_refused_or_left_unfollowed(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    try:
        path = inside(tmp_path, "a")
    except ArtefactError:  # Python 3.12 and older
        return
    assert path.parent == tmp_path.resolve()


def test_cache_folder_follows_xdg_cache_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("blocks", "a") == tmp_path / "medseg-trt" / "blocks" / "a"
    assert not cache_folder("blocks").exists()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder("a") == tmp_path / "home" / ".cache" / "medseg-trt" / "a"


def test_atomic_writes_do_not_change_the_umask(tmp_path, monkeypatch):
    """Another thread would make files that anybody may write to meanwhile."""
    monkeypatch.setattr(os, "umask", lambda _: pytest.fail("the umask was changed"))
    with atomic_file(tmp_path / "file") as temporary:
        temporary.write_text("content")
    with atomic_folder(tmp_path / "folder"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder"}


@pytest.mark.parametrize(
    "name", ["b" * 251 + ".png", "b." + "c" * 246 + ".nii.gz", "a." + "ü" * 120 + ".png", "M\udcfc.png"]
)
def test_atomic_file_supports_long_and_non_utf8_names(tmp_path, name):
    suffix = ".nii.gz" if name.endswith(".nii.gz") else ".png"
    with atomic_file(tmp_path / name) as temporary:
        assert temporary.name.endswith(suffix)
        assert len(os.fsencode(temporary.name)) < 64
        temporary.write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_only_regular_files_are_opened(tmp_path):
    (tmp_path / "file").write_text("content")
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "fifo")
    with open_regular(tmp_path / "file") as file:
        assert file.read() == b"content"
    for path in (tmp_path / "link", tmp_path / "fifo", tmp_path, tmp_path / "absent"):
        with pytest.raises(OSError):  # noqa: PT011  # whatever the system says of it
            open_regular(path)
