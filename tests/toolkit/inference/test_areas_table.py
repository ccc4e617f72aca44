"""The table of areas keeps the rows of masks that stay, and no cell of it is a formula."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from medseg_trt.errors import UsageError
from medseg_trt.inference.areas_table import AREAS, HEADER, merge_areas, read_areas

MERGER = """
import sys
from pathlib import Path
from medseg_trt.inference.areas_table import merge_areas

folder, run = Path(sys.argv[1]), sys.argv[2]
for number in range(20):
    (folder / f"{run}{number}.png").touch()
    merge_areas(folder, [f"{run}{number}.png"], [(f"{run}{number}.png", "disc", "1", "5", "", "")])
"""


def row(name: str, pixels: int = 5) -> tuple[str, ...]:
    return (name, "disc", "1", str(pixels), "", "")


def merge(folder: Path, *images: tuple[str, str], pixels: int = 5) -> list[str]:
    """Write masks and merge their rows, and return the names in the table as another reader sees them."""
    for _, mask in images:
        (folder / mask).touch()
    merge_areas(folder, [mask for _, mask in images], [row(name, pixels) for name, _ in images])
    with (folder / AREAS).open(newline="", encoding="utf-8") as file:
        return [f"{each['file']} {each['pixels']}" for each in csv.DictReader(file)]


def test_rows_of_masks_that_stay_stay_and_the_same_image_is_replaced(tmp_path):
    assert merge(tmp_path, ("a.png", "a.png"), ("scan.v1", "scan.v1.nii.gz")) == ["a.png 5", "scan.v1 5"]
    assert merge(tmp_path, ("b.jpg", "b.png")) == ["a.png 5", "scan.v1 5", "b.jpg 5"]
    assert merge(tmp_path, ("a.png", "a.png"), pixels=7) == ["scan.v1 5", "b.jpg 5", "a.png 7"]
    assert merge(tmp_path, ("b.png", "b.png")) == ["scan.v1 5", "a.png 7", "b.png 5"]  # the mask of b.jpg is replaced
    (tmp_path / "a.png").unlink()
    assert merge(tmp_path, ("c.nrrd", "c.nii.gz")) == ["scan.v1 5", "b.png 5", "c.nrrd 5"]
    assert merge(tmp_path, ("scan", "scan.nii.gz")) == ["scan.v1 5", "b.png 5", "c.nrrd 5", "scan 5"]


def test_two_processes_that_merge_at_once_lose_nothing(tmp_path):
    command = [sys.executable, "-c", MERGER, str(tmp_path)]
    with subprocess.Popen([*command, "a"]) as first, subprocess.Popen([*command, "b"]) as second:
        assert (first.wait(), second.wait()) == (0, 0)
    names = [row[0] for row in read_areas(tmp_path / AREAS)]
    assert sorted(names) == sorted(f"{run}{number}.png" for run in "ab" for number in range(20))


@pytest.mark.parametrize(
    "name", ["=1+1.png", "+a.png", "-x.png", "@SUM.png", "\tb.png", "\rc.png", "\uff1dd.png", "'=e.png"]
)
def test_no_cell_is_a_formula_and_every_name_comes_back(tmp_path, name):
    (tmp_path / name).touch()
    merge_areas(tmp_path, [name], [row(name)])
    with (tmp_path / AREAS).open(newline="", encoding="utf-8") as file:
        (_, (cell, *_)) = csv.reader(file)
    assert cell == f"'{name}"
    (tmp_path / "other.png").touch()
    for _ in range(2):  # neither loses it, nor adds another apostrophe
        merge_areas(tmp_path, ["other.png"], [row("other.png")])
        assert read_areas(tmp_path / AREAS) == [row(name), row("other.png")]


@pytest.mark.parametrize(
    "name", ["a.png", "'quoted'.png", "Überwachung 扫描.png", "a=b-c@d.png", 'x,"y".png', "a\nb.png"]
)
def test_ordinary_names_stand_as_they_are(tmp_path, name):
    assert merge(tmp_path, (name, name)) == [f"{name} 5"]


def test_rows_of_names_that_are_no_utf8_are_kept_and_replaced(tmp_path):
    latin = "M\udcfcller.png"
    (tmp_path / latin).touch()
    for _ in range(2):
        merge_areas(tmp_path, [latin], [row(r"M\xfcller.png")])
    assert merge(tmp_path, ("a.png", "a.png")) == [r"M\xfcller.png 5", "a.png 5"]


@pytest.mark.parametrize(
    "content", [b"name,dose\na,5\n", b"\xff\xfe", b"file,class\n", ",".join(HEADER).encode() + b"\na,b\n"]
)
def test_another_table_is_refused_and_kept(tmp_path, content):
    (tmp_path / AREAS).write_bytes(content)
    with pytest.raises(UsageError, match="is not a table of areas, so it is not replaced"):
        merge_areas(tmp_path, [], [])
    assert (tmp_path / AREAS).read_bytes() == content
