"""Masks replace nothing but earlier masks: no input and no link, under whatever path, and nothing behind a link."""

import os
from pathlib import Path

import PIL.Image
import pytest
from infer_folder import infer_to_folder

from medseg_trt.errors import UsageError
from medseg_trt.imaging.images import find_images
from medseg_trt.inference.areas_table import AREAS
from medseg_trt.inference.output_folder import name_limit, require_safe
from medseg_trt.inference.resume import OVERLAYS, RECORDS_FOLDER


def contents(folder: Path) -> dict[str, tuple[int, bytes | str]]:
    """Return all that lies in a tree: links as what they lead to, files with their number and bytes."""
    return {
        path.relative_to(folder).as_posix(): (
            path.lstat().st_ino,
            os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else "folder",
        )
        for path in folder.rglob("*")
    }


def link_of_the_name_of_a_mask(out: Path, images: Path) -> None:
    (out / "scan.nii.gz").symlink_to("elsewhere.nii.gz")


def link_to_an_input(out: Path, images: Path) -> None:
    (out / "case0.png").symlink_to(images / "case0.png")


def hard_link_to_an_input(out: Path, images: Path) -> None:
    (out / "case0.png").hardlink_to(images / "case0.png")


def link_of_an_overlay(out: Path, images: Path) -> None:
    (out / OVERLAYS).mkdir()
    (out / OVERLAYS / "case1.png").symlink_to(images / "case1.png")


def folder_of_overlays_elsewhere(out: Path, images: Path) -> None:
    (out / OVERLAYS).symlink_to(images)


def folder_of_records_elsewhere(out: Path, images: Path) -> None:
    (out / RECORDS_FOLDER).symlink_to(images)


def table_elsewhere(out: Path, images: Path) -> None:
    (out / AREAS).symlink_to(images / "table")


def another_table(out: Path, images: Path) -> None:
    (out / AREAS).write_text("patient,dose\n")


@pytest.mark.parametrize(
    "plant",
    [
        link_of_the_name_of_a_mask,
        link_to_an_input,
        hard_link_to_an_input,
        link_of_an_overlay,
        folder_of_overlays_elsewhere,
        folder_of_records_elsewhere,
        table_elsewhere,
        another_table,
    ],
)
@pytest.mark.parametrize("resume", [False, True])
def test_infer_refuses_to_replace_links_inputs_or_foreign_files(tiny_bundle, images, tmp_path, plant, resume):
    out = tmp_path / "out"
    out.mkdir()
    plant(out, images)
    (out / ".partial-1").touch()
    before = contents(tmp_path)
    with pytest.raises(UsageError, match=r"choose another folder with -o$"):
        infer_to_folder([images], tiny_bundle, out, overlay=True, resume=resume, on_error=lambda *_: None)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("inside", [".", OVERLAYS])
def test_links_in_the_output_folder_are_no_inputs(tmp_path, images, inside):
    """The inputs are the links, which the masks would replace; what they lead to lies elsewhere."""
    folder = tmp_path / "out" / inside
    folder.mkdir(parents=True)
    (folder / "case0.png").symlink_to(images / "case0.png")
    with pytest.raises(UsageError, match="holds the images"):
        require_safe(tmp_path / "out", find_images([folder]))


def test_links_to_pictures_in_the_output_folder_are_no_inputs(tmp_path, images):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "a.png").symlink_to(images / "case0.png")
    with pytest.raises(UsageError, match="holds the images"):
        require_safe(images, find_images([tmp_path / "links"]))
    (tmp_path / "other_name").symlink_to(images)
    with pytest.raises(UsageError, match="holds the images"):
        require_safe(tmp_path / "other_name", find_images([images / "case0.png"]))


def test_links_as_inputs_and_earlier_masks_are_no_obstacle(tiny_bundle, images, tmp_path):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "a.png").symlink_to(images / "case0.png")
    for _ in range(2):
        written = infer_to_folder([tmp_path / "links"], tiny_bundle, tmp_path / "out", on_error=lambda *_: None)
        assert [path.name for path in written.masks] == ["a.png"]
    with PIL.Image.open(tmp_path / "out" / "a.png") as mask:
        assert mask.mode == "P"


def test_the_longest_name_is_that_of_the_disk_though_the_folder_is_not_there_yet(tmp_path, monkeypatch):
    assert name_limit(tmp_path / "a" / "b") == os.pathconf(tmp_path, "PC_NAME_MAX")
    monkeypatch.setattr(os, "pathconf", lambda folder, _: 143 if folder == tmp_path else 0)
    assert name_limit(tmp_path / "a" / "b") == 143
