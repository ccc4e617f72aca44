"""Which images the inputs of an archive hold, in which order, and why others are left out."""

import errno
import io
import os
import sqlite3
import sys
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from archive_runs import plan_of, planned, reasons, save_picture, save_slices, slices

from medseg_trt.archive import index as index_module
from medseg_trt.archive.grouping import Grouping
from medseg_trt.archive.index import sort_key
from medseg_trt.archive.request import Part
from medseg_trt.errors import InputError, UsageError
from medseg_trt.imaging.images import natural_key
from medseg_trt.imaging.listing import list_images

NAMES = ("a.png", "p1/x1.png", "p1/x10.png", "p1/x2.png", "p2/s/x1.png")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for seed, name in enumerate(NAMES):
        save_picture(tmp_path / "in" / name, seed)
    (tmp_path / "in" / "p1" / "notes.txt").write_text("no image")
    save_picture(tmp_path / "in" / ".hidden" / "y.png")
    return tmp_path / "in"


def test_images_of_any_depth_are_in_natural_order_under_their_folders(tree, tmp_path):
    assert [*planned([tree], tmp_path / "out")] == ["a", "p1/x1", "p1/x2", "p1/x10", "p2/s/x1"]
    assert reasons([tree], tmp_path / "out") == {"notes.txt": ("of another kind", False)}


def test_a_flat_folder_has_the_images_and_the_order_of_a_plain_run(tmp_path):
    names = ["b.png", "a10.png", "a9.png", "A1.png", "a-b.png", "a1b.png", "a01.png", "a1.png", "\udcfc.png", "é2.png"]
    for seed, name in enumerate(names):
        save_picture(tmp_path / "in" / name, seed)
    (tmp_path / "in" / "A1.png").unlink()
    plain = [source.stem for source in list_images([tmp_path / "in"]).sources]
    assert [*planned([tmp_path / "in"], tmp_path / "out")] == plain


def test_the_key_of_the_index_sorts_as_the_natural_key():
    names = [
        "a",
        "a1",
        "a1b",
        "a-b",
        "a b",
        "a01",
        "a001",
        "A1",
        "a10",
        "a9",
        "z²",
        "٣",
        "1",
        "01",
        "~",
        "ü\udcfc",
        "a!1",
    ]
    assert sorted(names, key=sort_key) == sorted(names, key=natural_key)


@pytest.mark.parametrize(
    ("pattern", "stems"),
    [
        ("**/*.png", ["a", "p1/x1", "p1/x2", "p1/x10", "p2/s/x1"]),
        ("p1/x?.png", ["x1", "x2"]),
        ("p*", ["p1/x1", "p1/x2", "p1/x10", "p2/s/x1"]),
        ("*/*/*.png", ["p2/s/x1"]),
        ("p[2]/**", ["p2/s/x1"]),
    ],
)
def test_a_pattern_keeps_the_folders_below_its_first_wildcard(tree, tmp_path, pattern, stems):
    assert [*planned([tree / pattern], tmp_path / "out")] == stems


def test_a_pattern_that_matches_nothing_is_refused(tree, tmp_path):
    assert reasons([tree / "*.nii"], tmp_path / "out") == {"*.nii": (f"{tree}/*.nii matches no file", True)}


def test_a_list_keeps_relative_paths_and_names_what_is_not_there(tree, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = ["in/p1/x2.png", "", "in/p2", str(tree / "a.png"), "in/../in/p1/x1.png", "in/gone.png"]
    (tmp_path / "list.txt").write_text("\n".join(lines), encoding="utf-8")
    asked = {"list_file": str(tmp_path / "list.txt")}
    below_root = str(tree / "a").lstrip("/")
    assert sorted(planned([], Path("out"), **asked)) == sorted(["in/p1/x2", "in/p2/s/x1", below_root])
    assert reasons([], Path("out"), **asked) == {
        "x1.png": ("in/../in/p1/x1.png leads out of the folder; write it without .., or as an absolute path", True),
        "gone.png": ("in/gone.png does not exist", True),
    }


def test_a_list_may_come_from_standard_input(tree, tmp_path, monkeypatch):
    monkeypatch.chdir(tree)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"p1/x1.png\r\np1/x2.png\n")))
    assert [*planned([], tmp_path / "out", list_file="-")] == ["p1/x1", "p1/x2"]
    with pytest.raises(InputError, match="gone cannot be read as a list of files: No such file"):
        planned([], tmp_path / "out", list_file="gone")


def test_a_list_from_closed_standard_input_is_refused(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InputError, match="standard input is closed"):
        plan_of([], tmp_path / "out", list_file="-")


def test_links_in_a_circle_end_and_each_folder_is_listed_once(tree, tmp_path):
    (tree / "a_link").symlink_to(tree / "p1")
    (tree / "p1" / "up").symlink_to(tree)
    (tree / "self").symlink_to("self")
    assert [*planned([tree], tmp_path / "out")] == ["a", "p1/x1", "p1/x2", "p1/x10", "p2/s/x1"]
    reason_by_name = reasons([tree], tmp_path / "out")
    assert (
        reason_by_name["a_link"]
        == reason_by_name["up"]
        == ("a link to a folder that is listed under another name", False)
    )
    assert reason_by_name["self"] == (f"{tree / 'self'} cannot be read: Too many levels of symbolic links", True)


def test_a_folder_that_cannot_be_opened_is_named_and_the_rest_goes_on(tree, tmp_path, monkeypatch):
    def scandir(path, real=os.scandir):
        if path == tree / "p1":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert [*planned([tree], tmp_path / "out")] == ["a", "p2/s/x1"]
    assert reasons([tree], tmp_path / "out")["p1"] == (f"{tree / 'p1'} cannot be read: Permission denied", True)
    assert "p1" in reasons([tree / "**" / "*.png"], tmp_path / "out")  # which may hold what the pattern matches


def test_names_that_would_be_one_mask_are_refused_and_the_rest_goes_on(tmp_path):
    reserved = {
        "Overlays/d.png": "overlays/, the name of the overlays",
        "areas.csv/e.png": "areas.csv/, the name of a table",
        "Skipped.CSV/x/f.png": "skipped.csv/, the name of a table",
    }
    for name in ("x/a.png", "x/A.png", "y/b.png", "y/b.jpg", "y/c.png", *reserved):
        save_picture(tmp_path / "in" / name)
    assert [*planned([tmp_path / "in"], tmp_path / "out")] == ["y/c"]
    reason_by_name = reasons([tmp_path / "in"], tmp_path / "out")
    assert {name for name, (_, is_error) in reason_by_name.items() if is_error} == {
        "a.png",
        "A.png",
        "b.png",
        "b.jpg",
        *(Path(name).name for name in reserved),
    }
    assert "in/x/A.png and " in reason_by_name["A.png"][0]
    assert (
        "would share the name of their masks in a case or form of letters that many disks ignore"
        in reason_by_name["a.png"][0]
    )
    assert "disks" not in reason_by_name["b.png"][0]
    for name, held in reserved.items():
        assert reason_by_name[Path(name).name][0].endswith(f"its mask would lie in {held}; rename that folder")


def test_a_line_of_a_list_leads_into_no_records(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_picture(Path(".finished/a.png"))
    Path("list").write_text(".finished/a.png\n")
    reason, is_error = reasons([], tmp_path / "out", list_file="list")["a.png"]
    assert is_error
    assert "in .finished/, the name of the records" in reason


@pytest.mark.parametrize(
    ("image", "folder", "written"),
    [
        ("p/r.png", "p/r.json/s", "record"),  # .finished/p/r.json is a file
        ("p/r.jpg", "p/R.PNG", "mask"),
        ("p/r.jpg", "p/r.json/x.json", "record"),
    ],
)
def test_images_in_a_folder_with_the_name_of_a_mask_or_record_are_refused(tmp_path, image, folder, written):
    for name in (image, f"{folder}/inner.png", "other.json/inner2.png"):
        save_picture(tmp_path / "in" / name)
    inputs = [tmp_path / "in"]
    assert sorted(planned(inputs, tmp_path / "out")) == ["other.json/inner2", "p/r"]
    (refused,) = [reason for reason, is_error in reasons(inputs, tmp_path / "out").values() if is_error]
    assert refused == (
        f"{inputs[0] / folder / 'inner.png'} lies in a folder *{'.png' if written == 'mask' else '.json'} that would "
        f"have the name of the {written} of {inputs[0] / image}; rename that folder"
    )


def test_two_inputs_that_map_to_one_output_are_refused(tree, tmp_path):
    inputs = [tree / "p1", tree / "p2" / "s"]
    assert [*planned(inputs, tmp_path / "out")] == ["x2", "x10"]
    assert reasons(inputs, tmp_path / "out")["x1.png"][1]
    assert [*planned([tree / "a.png", tree], tmp_path / "out")].count("a") == 1  # the same image twice is one


def test_images_in_the_folder_of_the_masks_are_refused(tree, tmp_path):
    save_picture(tree / "out" / "old.png")
    (tree / "link.png").symlink_to(tree / "out" / "old.png")
    (tree / "out" / ".finished").mkdir()  # an earlier run has written it
    assert "old" not in " ".join(planned([tree], tree / "out"))
    assert reasons([tree], tree / "out")["link.png"][1]
    assert planned([tree], tree) == {}
    assert "it lies in the folder of the masks" in reasons([tree], tree)["in"][0]
    assert reasons([tree / "p1"], tree)["p1"][1]
    assert reasons([tree / "a.png"], tree)["a.png"][1]


def test_parts_are_disjoint_and_complete(tree, tmp_path):
    with_all = [*planned([tree], tmp_path / "out")]
    parts = []
    for number in (1, 2, 3):
        plan = plan_of([tree], tmp_path / "out", part=Part(number=number, of=3))
        stems = [source.stem for source in plan]
        assert len(plan) == len(stems)
        assert [plan[position].stem for position in range(len(plan))] == stems
        parts.append(stems)
        plan.close()
    assert sorted(stem for stems in parts for stem in stems) == sorted(with_all)
    assert [len(stems) for stems in parts] == [2, 2, 1]


def looks(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return the list of files that are looked at from now on."""
    seen: list[Path] = []
    real = index_module.kind_of
    monkeypatch.setattr(index_module, "kind_of", lambda path: seen.append(path) or real(path))
    return seen


def test_archive_index_is_reused_and_only_changed_files_are_inspected(tree, tmp_path, monkeypatch):
    first = planned([tree], tmp_path / "out")
    seen = looks(monkeypatch)
    assert planned([tree], tmp_path / "another") == first
    assert seen == []
    save_picture(tree / "p1" / "x2.png", 7, (30, 30))
    save_picture(tree / "p3" / "new.png")
    (tree / "a.png").unlink()
    assert [*planned([tree], tmp_path / "out")] == ["p1/x1", "p1/x2", "p1/x10", "p2/s/x1", "p3/new"]
    assert sorted(path.name for path in seen) == ["new.png", "x2.png"]


def test_an_interrupted_index_goes_on_where_it_stopped(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "BATCH", 2)
    seen = looks(monkeypatch)
    with monkeypatch.context() as patch:
        real = index_module._look_at

        def look_at(path, *arguments):
            if len(seen) == 5:
                raise KeyboardInterrupt
            return real(path, *arguments)

        patch.setattr(index_module, "_look_at", look_at)
        with pytest.raises(KeyboardInterrupt):
            planned([tree], tmp_path / "out")
    assert len(planned([tree], tmp_path / "out")) == len(NAMES)
    assert len(seen) == 5 + 2  # of six files, four were committed


def test_a_damaged_index_is_made_anew(tree, tmp_path, cache, caplog):
    first = planned([tree], tmp_path / "out")
    (path,) = cache.glob("*.sqlite")
    path.write_bytes(b"no database" * 100)
    assert planned([tree], tmp_path / "out") == first
    assert "is damaged; the archive is indexed again" in caplog.text
    assert sqlite3.connect(path).execute("SELECT count(*) FROM file").fetchone() == (6,)


def test_an_unreadable_file_whose_name_is_not_utf_8_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "in"
    folder.mkdir()
    path = folder / os.fsdecode(b"a\xff.dcm")
    path.write_bytes(b"closed")

    def closed(*_: Any, **__: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", "a")

    monkeypatch.setattr(Path, "open", closed)
    ((reason, _),) = reasons([folder], tmp_path / "out").values()
    assert reason.endswith("cannot be read: Permission denied")


@pytest.mark.parametrize("names", [("0000", "0001", "0002"), ("0.dcm", "1.dcm", "2.dcm")])
def test_files_that_cannot_be_read_are_refused_until_they_can(tmp_path, monkeypatch, names):
    """They were left out as of another kind, or each read by itself for ever after."""
    paths = [tmp_path / "in" / "p" / name for name in names]
    paths[0].parent.mkdir(parents=True)
    save_slices(paths, slices(0), SeriesInstanceUID="1.2.3")
    real = Path.open

    def closed(path: Path, *arguments: Any, **options: Any) -> Any:
        if path in paths:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", closed)
        refused = reasons([tmp_path / "in"], tmp_path / "out")
        assert planned([tmp_path / "in"], tmp_path / "out") == {}
    assert refused == {path.name: (f"{path} cannot be read: Permission denied", True) for path in paths}
    assert planned([tmp_path / "in"], tmp_path / "out") == {"p": names}
    assert reasons([tmp_path / "in"], tmp_path / "out") == {}


def test_a_file_that_stays_unreadable_does_not_group_the_archive_again(tree, tmp_path, monkeypatch):
    real, grouped = Path.open, []

    def closed(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == "closed.png":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *arguments, **options)

    def group(self: Grouping, number: int, parent: bytes) -> None:
        grouped.append(parent)
        original(self, number, parent)

    original = Grouping._group_folder
    monkeypatch.setattr(Grouping, "_group_folder", group)
    save_picture(tree / "closed.png")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", closed)
        first = planned([tree], tmp_path / "out")
        num_folders = len(grouped)
        assert planned([tree], tmp_path / "out") == first
        assert len(grouped) == num_folders
        assert reasons([tree], tmp_path / "out")["closed.png"][1]
    assert len(planned([tree], tmp_path / "out")) == len(first) + 1
    assert len(grouped) == 2 * num_folders


def test_an_index_that_another_program_uses_is_not_called_a_full_disk(tree, tmp_path, monkeypatch, cache):
    planned([tree], tmp_path / "out")
    (path,) = cache.glob("*.sqlite")
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        monkeypatch.setattr(index_module.sqlite3, "connect", partial(sqlite3.connect, timeout=0))
        with pytest.raises(UsageError, match=r"is used by another program: database is locked$"):
            planned([tree], tmp_path / "out")


def test_an_error_of_our_own_sql_is_not_called_a_full_disk(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "SCHEMA", "CREATE nonsense")
    with pytest.raises(sqlite3.OperationalError, match="syntax error"):
        planned([tree], tmp_path / "out")


def test_no_space_for_the_index_is_one_line_and_the_index_is_kept(tree, tmp_path, monkeypatch, cache, caplog):
    planned([tree], tmp_path / "out")
    (before,) = cache.glob("*.sqlite")
    identity = before.stat().st_ino
    for number in range(200):
        save_picture(tree / "more" / f"{number}.png")
    monkeypatch.setattr(index_module, "SCHEMA", f"PRAGMA max_page_count = 1; {index_module.SCHEMA}")
    with pytest.raises(UsageError, match="cannot be written: database or disk is full; free some space"):
        planned([tree], tmp_path / "out")
    assert before.stat().st_ino == identity
    assert "is damaged" not in caplog.text


def test_lines_of_a_list_that_name_no_file_are_refused_alone(tree, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    lines = (tree / "a.png", "x\0y.png", "a" * 300, tmp_path / "pipe", "9" * 5000)
    (tmp_path / "list.txt").write_text("\n".join(map(str, lines)), encoding="utf-8")
    asked = {"list_file": str(tmp_path / "list.txt")}
    assert len(planned([], tmp_path / "out", **asked)) == 1
    refused = reasons([], tmp_path / "out", **asked)
    assert len(refused) == len(lines) - 1
    assert all(is_error for _, is_error in refused.values())
    assert "has a zero byte; write one path a line" in refused["x\0y.png"][0]
