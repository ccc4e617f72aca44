"""The table of areas keeps the rows of masks that stay; no cell is a formula or holds control characters."""

import csv
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest

from medseg_trt.errors import UsageError
from medseg_trt.inference.areas_table import AREAS, HEADER, AreaTable, stored_areas
from medseg_trt.inference.csv_table import Row

MERGER = """
import sys
from contextlib import closing
from pathlib import Path
from medseg_trt.inference.areas_table import AreaTable

folder, run = Path(sys.argv[1]), sys.argv[2]
for number in range(20):
    (folder / f"{run}{number}.png").touch()
    with closing(AreaTable()) as table:
        table.add(f"{run}{number}.png", [(f"{run}{number}.png", "disc", "1", "5", "", "")])
        table.write(folder)
"""


def row(name: str, pixels: int = 5) -> tuple[str, ...]:
    return (name, "disc", "1", str(pixels), "", "", "")


def read_areas(folder: Path) -> list[Row]:
    return [*stored_areas(folder / AREAS)]


def merge_areas(folder: Path, masks: Sequence[str], rows: Sequence[Row]) -> None:
    """Write the table as a run does that has made these masks, each of an image with one row."""
    with closing(AreaTable()) as table:
        for mask, image_row in zip(masks, rows, strict=True):
            table.add(mask, [image_row])
        table.write(folder)


def merge(folder: Path, *images: tuple[str, str], pixels: int = 5) -> list[str]:
    """Write masks and merge their rows, and return the names in the table as another reader sees them."""
    for _, mask in images:
        (folder / mask).parent.mkdir(parents=True, exist_ok=True)
        (folder / mask).touch()
    merge_areas(folder, [mask for _, mask in images], [row(name, pixels) for name, _ in images])
    with (folder / AREAS).open(newline="", encoding="utf-8") as file:
        return [f"{cells['file']} {cells['pixels']}" for cells in csv.DictReader(file)]


def test_rows_of_masks_that_stay_stay_and_the_same_image_is_replaced(tmp_path):
    assert merge(tmp_path, ("a.png", "a.png"), ("scan.v1", "scan.v1.nii.gz")) == ["a.png 5", "scan.v1 5"]
    assert merge(tmp_path, ("b.jpg", "b.png")) == ["a.png 5", "scan.v1 5", "b.jpg 5"]
    assert merge(tmp_path, ("a.png", "a.png"), pixels=7) == ["scan.v1 5", "b.jpg 5", "a.png 7"]
    assert merge(tmp_path, ("b.png", "b.png")) == ["scan.v1 5", "a.png 7", "b.png 5"]  # the mask of b.jpg is replaced
    (tmp_path / "a.png").unlink()
    assert merge(tmp_path, ("c.nrrd", "c.nii.gz")) == ["scan.v1 5", "b.png 5", "c.nrrd 5"]
    assert merge(tmp_path, ("scan", "scan.nii.gz")) == ["scan.v1 5", "b.png 5", "c.nrrd 5", "scan 5"]


def test_a_table_of_an_earlier_version_gets_the_new_column(tmp_path):
    (tmp_path / "old.png").touch()
    (tmp_path / AREAS).write_text("file,class,label,pixels,mm2,ml\nold.png,disc,1,3,,\n", encoding="utf-8")
    assert merge(tmp_path, ("a.png", "a.png")) == ["old.png 3", "a.png 5"]
    assert read_areas(tmp_path) == [row("old.png", 3), row("a.png")]


def test_two_processes_that_merge_at_once_lose_nothing(tmp_path):
    command = [sys.executable, "-c", MERGER, str(tmp_path)]
    with subprocess.Popen([*command, "a"]) as first, subprocess.Popen([*command, "b"]) as second:
        assert (first.wait(), second.wait()) == (0, 0)
    names = [row[0] for row in read_areas(tmp_path)]
    assert sorted(names) == sorted(f"{run}{number}.png" for run in "ab" for number in range(20))


@pytest.mark.parametrize("name", ["=1+1.png", "+a.png", "-x.png", "@SUM.png", "\uff1dd.png", "'=e.png"])
def test_no_cell_is_a_formula_and_every_name_comes_back(tmp_path, name):
    (tmp_path / name).touch()
    merge_areas(tmp_path, [name], [row(name)])
    with (tmp_path / AREAS).open(newline="", encoding="utf-8") as file:
        (_, (cell, *_)) = csv.reader(file)
    assert cell == f"'{name}"
    (tmp_path / "other.png").touch()
    for _ in range(2):  # neither loses it, nor adds another apostrophe
        merge_areas(tmp_path, ["other.png"], [row("other.png")])
        assert read_areas(tmp_path) == [row(name), row("other.png")]


@pytest.mark.parametrize("name", ["a.png", "'quoted'.png", "Überwachung 扫描.png", "a=b-c@d.png", 'x,"y".png'])
def test_ordinary_names_stand_as_they_are(tmp_path, name):
    assert merge(tmp_path, (name, name)) == [f"{name} 5"]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("M\udcfcller.png", r"M\xfcller.png"),  # not UTF-8
        ("a\nb.png", r"a\nb.png"),
        ("\t=1+1.png", r"\t=1+1.png"),
        ("\x1b[2Jc.png", r"\x1b[2Jc.png"),
        ("right\u202egnp.png", r"right\u202egnp.png"),
        ("p\udcfc/s\n/x.png", r"p\xfc/s\n/x.png"),
        ("p\\n/\udcfc.png", r"p\n/\xfc.png"),  # a backslash of the folder's own
    ],
)
def test_rows_of_escaped_names_are_kept_and_replaced(tmp_path, name, shown):
    for _ in range(2):
        assert merge(tmp_path, (name, name)) == [f"{shown} 5"]
    assert merge(tmp_path, ("a.png", "a.png")) == [f"{shown} 5", "a.png 5"]
    assert merge(tmp_path, (name, name), pixels=7) == ["a.png 5", f"{shown} 7"]
    (tmp_path / name).unlink()
    assert merge(tmp_path, ("a.png", "a.png")) == ["a.png 5"]


def test_raw_control_characters_of_a_table_of_an_earlier_version_are_escaped(tmp_path):
    for name in ("a\nb.png", "\tc.png"):
        (tmp_path / name).touch()
    with (tmp_path / AREAS).open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([HEADER, row("a\nb.png"), row("'\tc.png")])
    assert merge(tmp_path, ("d.png", "d.png")) == [r"a\nb.png 5", r"\tc.png 5", "d.png 5"]


def test_a_run_over_a_flat_folder_keeps_the_rows_of_a_tree(tmp_path):
    assert merge(tmp_path, ("p1/x.png", "p1/x.png"), ("p2/x.jpg", "p2/x.png")) == ["p1/x.png 5", "p2/x.jpg 5"]
    assert merge(tmp_path, ("x.png", "x.png")) == ["p1/x.png 5", "p2/x.jpg 5", "x.png 5"]


@pytest.mark.parametrize("name", ["../x.png", "/x.png"])
def test_a_row_that_leads_out_of_the_folder_is_dropped(tmp_path, name):
    (tmp_path / "x.png").touch()
    folder = tmp_path / "out"
    folder.mkdir()
    with (folder / AREAS).open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([HEADER, row(f"{tmp_path}{name}" if name.startswith("/") else name)])
    assert merge(folder, ("a.png", "a.png")) == ["a.png 5"]


@pytest.mark.parametrize(
    "content", [b"name,dose\na,5\n", b"\xff\xfe", b"file,class\n", ",".join(HEADER).encode() + b"\na,b\n"]
)
def test_foreign_areas_csv_is_refused_and_unchanged(tmp_path, content):
    (tmp_path / AREAS).write_bytes(content)
    with pytest.raises(UsageError, match="is not a table of areas, so it is not replaced"):
        merge_areas(tmp_path, [], [])
    assert (tmp_path / AREAS).read_bytes() == content
