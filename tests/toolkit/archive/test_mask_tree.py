"""Runs over archives: masks and tables are those of a plain run, parts join to them, a failure stops itself alone."""

import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from archive_runs import content, rows_of, save_picture, save_slices, segment_tree, slices
from infer_folder import infer_to_folder

from medseg_trt.archive.mask_tree import MaskTree
from medseg_trt.archive.request import ArchiveRequest, Part
from medseg_trt.bundles.bundle import load_bundle
from medseg_trt.errors import InputError, UsageError
from medseg_trt.pipeline import infer

NAMES = ("a.png", "p1/x1.png", "p1/x10.png", "p1/x2.png", "p2/s/x1.png")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for seed, name in enumerate(NAMES):
        save_picture(tmp_path / "in" / name, seed)
    save_slices([tmp_path / "in" / "p2" / "ct" / str(index) for index in range(3)], slices(4))
    (tmp_path / "in" / "p1" / "notes.txt").write_text("no image")
    return tmp_path / "in"


def fail(path: Path, error: InputError) -> None:
    raise AssertionError(f"{path}: {error}")


def test_a_flat_folder_gives_the_bytes_of_a_plain_run_and_skipped_csv(tiny_bundle, tmp_path):
    for seed, name in enumerate(("b.png", "a10.png", "a9.jpg")):
        save_picture(tmp_path / "in" / name, seed)
    save_slices([tmp_path / "in" / "ct" / str(index) for index in range(3)], slices(4))
    plain = infer_to_folder([tmp_path / "in"], tiny_bundle, tmp_path / "plain", overlay=True, on_error=fail)
    written = segment_tree([tmp_path / "in"], tiny_bundle, tmp_path / "tree", overlay=True)
    expected = content(tmp_path / "plain") | {"skipped.csv": b"file,kind,reason\r\n"}
    assert content(tmp_path / "tree") == expected
    assert (written.num_masks, written.num_sources) == (plain.num_masks, plain.num_sources) == (4, 4)


def test_masks_mirror_the_tree_and_a_run_is_continued(tiny_bundle, tree, tmp_path):
    out = tmp_path / "out"
    segment_tree([tree], tiny_bundle, out, overlay=True)
    masks = ["a.png", "p1/x1.png", "p1/x10.png", "p1/x2.png", "p2/ct.nii.gz", "p2/s/x1.png"]
    overlays = [f"overlays/{name.replace('.nii.gz', '.png')}" for name in masks]
    assert sorted(content(out)) == sorted([*masks, *overlays, "areas.csv", "skipped.csv"])
    assert [*dict.fromkeys(row["file"] for row in rows_of(out / "areas.csv"))] == [
        *("a.png", "p1/x1.png", "p1/x2.png", "p1/x10.png", "p2/ct", "p2/s/x1.png"),
    ]
    assert [(Path(row["file"]).name, row["kind"], row["reason"]) for row in rows_of(out / "skipped.csv")] == [
        ("notes.txt", "left out", "of another kind")
    ]
    for name in ("a.png", "p1/x1.png"):  # a file of a tree has the mask that it has by itself
        alone = infer_to_folder([tree / name], tiny_bundle, tmp_path / "alone", on_error=fail)
        assert alone.masks[0].read_bytes() == (out / name).read_bytes()
    before = content(out)
    (out / "p1" / "x1.png").write_bytes(b"changed")
    (out / "p1" / ".partial-0123456789abcdef.png").write_bytes(b"left behind")
    written = segment_tree([tree], tiny_bundle, out, overlay=True, resume=True)
    assert (written.num_masks, written.kept) == (6, 5)
    assert content(out) == before


def test_an_archive_file_gives_the_bytes_of_its_tree(tiny_bundle, tree, tmp_path):
    with zipfile.ZipFile(tmp_path / "in.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in tree.rglob("*"):
            archive.write(file, file.relative_to(tree))
        archive.writestr("p1/bad.png", b"\x89PNG\r\n\x1a\n cut short")
    errors: list[str] = []
    segment_tree([tree], tiny_bundle, tmp_path / "out")
    written = segment_tree(
        [tmp_path / "in.zip"], tiny_bundle, tmp_path / "zip", on_error=lambda _, error: errors.append(str(error))
    )
    different = {"skipped.csv"}
    assert {name: data for name, data in content(tmp_path / "zip").items() if name not in different} == {
        name: data for name, data in content(tmp_path / "out").items() if name not in different
    }
    assert len(errors) == len(written.refused) == 1
    assert errors[0].startswith(f"{tmp_path / 'in.zip' / 'p1' / 'bad.png'} ")
    assert rows_of(tmp_path / "zip" / "skipped.csv")[-1] == {
        "file": str(tmp_path / "in.zip" / "p1" / "bad.png"),
        "kind": "refused",
        "reason": errors[0],
    }


def test_parts_are_joined_by_the_last_and_again_on_request(tiny_bundle, tree, tmp_path):
    (tree / "p1" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n cut short")
    (tree / "gone.png").symlink_to("nowhere")
    errors: list[str] = []

    def note(_path: Path, error: InputError) -> None:
        errors.append(str(error))

    whole = segment_tree([tree], tiny_bundle, tmp_path / "whole", on_error=note)
    out, expected = tmp_path / "out", content(tmp_path / "whole")
    request, bundle = ArchiveRequest(), load_bundle(tiny_bundle)
    joined: list[bool] = []
    for number in (2, 3, 1):
        part = Part(number=number, of=3)
        joined.append(segment_tree([tree], tiny_bundle, out, part=part, on_error=note).is_joined)
        if number == 3:
            with pytest.raises(UsageError, match=r"1 of 3 parts have not ended, .*: 1/3; run them with --part"):
                MaskTree(out, request, on_error=note).join([tree], bundle)
    assert joined == [False, False, True]
    assert content(out) == expected
    assert len(set(errors)) == 2

    (out / "areas.csv").unlink()
    again = MaskTree(out, request, on_error=note)
    again.join([tree], bundle)
    assert content(out) == expected
    assert again.num_masks == whole.num_masks
    assert sorted(again.refused) == sorted(whole.refused)
    (out / "p1" / "x2.png").write_bytes(b"changed")
    with pytest.raises(UsageError, match=r"masks are missing or have changed; .* again with --continue: \d/3$"):
        MaskTree(out, request, on_error=note).join([tree], bundle)
    save_picture(tree / "p9" / "new.png")
    with pytest.raises(UsageError, match="3 of 3 parts have not ended"):
        MaskTree(out, request, on_error=note).join([tree], bundle)


def test_parts_of_different_options_are_not_joined(tiny_bundle, tree, tmp_path):
    for number, batch in ((1, 1), (2, 2)):
        written = MaskTree(tmp_path / "out", ArchiveRequest(), part=Part(number=number, of=2))
        for _ in infer([tree], tiny_bundle, destination=written, backend="onnxruntime", threads=1, batch=batch):
            pass
        assert not written.is_joined
    with pytest.raises(UsageError, match="different bundles, back-ends or options"):
        MaskTree(tmp_path / "out", ArchiveRequest()).join([tree], load_bundle(tiny_bundle))


def test_no_mask_is_written_through_a_link(tiny_bundle, tree, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    out = tmp_path / "out"
    out.mkdir()
    (out / "p1").symlink_to(tmp_path / "elsewhere")
    (out / "a.png").symlink_to(tree / "a.png")
    original, errors = (tree / "a.png").read_bytes(), list[str]()
    written = segment_tree([tree], tiny_bundle, out, on_error=lambda _, error: errors.append(str(error)))
    assert [*(tmp_path / "elsewhere").iterdir()] == []
    assert (tree / "a.png").read_bytes() == original
    assert written.num_masks == 2
    assert sum("is a link, which no mask is written through; remove it" in error for error in errors) == 4


def test_rows_of_other_masks_are_kept_while_these_exist(tiny_bundle, tree, tmp_path):
    out = tmp_path / "out"
    segment_tree([tree / "p1"], tiny_bundle, out)
    first = rows_of(out / "areas.csv")
    segment_tree([tree / "p2"], tiny_bundle, out)
    second = rows_of(out / "areas.csv")
    assert [*dict.fromkeys(row["file"] for row in second)] == ["x1.png", "x2.png", "x10.png", "ct", "s/x1.png"]
    assert second[: len(first)] == first
    (out / "x2.png").unlink()
    segment_tree([tree / "p2"], tiny_bundle, out)
    assert "x2.png" not in {row["file"] for row in rows_of(out / "areas.csv")}


def test_foreign_skipped_csv_is_not_replaced(tiny_bundle, tree, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "skipped.csv").write_text("my,own,table,of\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"skipped.csv is not a table"):
        segment_tree([tree], tiny_bundle, tmp_path / "out")


def test_input_without_usable_image_is_an_error_and_skipped_csv_lists_reasons(tiny_bundle, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.txt").write_text("no image")
    with pytest.raises(InputError, match=r"hold no image that can be used; .*skipped.csv lists the reasons"):
        segment_tree([tmp_path / "in"], tiny_bundle, tmp_path / "out")
    assert [row["reason"] for row in rows_of(tmp_path / "out" / "skipped.csv")] == ["of another kind"]


def command(bundle: Path, *arguments: str | Path) -> list[str]:
    program = [sys.executable, "-m", "medseg_trt", "infer", "--bundle", str(bundle), "--backend", "onnxruntime"]
    program += ["--threads", "1"]
    return [*program, *map(str, arguments)]


def test_a_killed_run_goes_on_to_the_same_bytes(tiny_bundle, tmp_path):
    """500 pictures and 5 series in a tree, killed in the middle, then resumed; and another run that was not killed."""
    pixels = [save_picture(tmp_path / f"{seed}.png", seed, (24, 24)) for seed in range(8)]
    for number in range(500):
        target = tmp_path / "in" / f"p{number // 50}" / f"s{number % 50 // 10}" / f"{number}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(pixels[number % 8], target)
    for number in range(5):
        paths = [tmp_path / "in" / f"p{number}" / "ct" / f"{index}.dcm" for index in range(4)]
        save_slices(paths, slices(number, 4), SeriesInstanceUID=f"1.2.{number}")
    out = tmp_path / "out"
    running = subprocess.Popen(
        command(tiny_bundle, tmp_path / "in", "--tree", "-o", out), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while sum(1 for _ in (out / ".finished").rglob("*.json")) < 100:
        assert running.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    done = sum(1 for _ in (out / ".finished").rglob("*.json"))
    assert 100 <= done < 505
    written = segment_tree([tmp_path / "in"], tiny_bundle, out, resume=True)
    assert written.num_masks == 505
    assert done - 1 <= written.kept <= done
    segment_tree([tmp_path / "in"], tiny_bundle, tmp_path / "whole")
    assert content(out) == content(tmp_path / "whole")
    assert len(content(out)) == 505 + 2


def test_planted_notes_of_parts_are_not_believed(tiny_bundle, tree, tmp_path):
    parts = tmp_path / "out" / ".finished" / ".parts"
    parts.mkdir(parents=True)
    for name in ("1-of-99999999999", "1-of-999999999", "1-of-0", "2-of-1"):
        (parts / f"{name}.json").write_text("{}")
    (parts / "1-of-2.json").symlink_to("gone")
    written = MaskTree(tmp_path / "out", ArchiveRequest())
    with pytest.raises(UsageError, match="has no parts to join"):
        written.join([tree], load_bundle(tiny_bundle))
    parts.rename(tmp_path / "elsewhere")
    parts.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="is a link or a file; remove it"):
        MaskTree(tmp_path / "out", ArchiveRequest()).join([tree], load_bundle(tiny_bundle))
