import csv
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from infer_folder import infer_to_folder
from nibabel import Nifti1Image
from tiny import write_pictures

from medseg_trt.bundles.bundle import load_bundle
from medseg_trt.errors import InputError, UsageError
from medseg_trt.files import sha256
from medseg_trt.imaging.images import read_image
from medseg_trt.inference import to_folder


def read_indices(path: Path) -> np.ndarray:
    with PIL.Image.open(path) as mask:
        return np.asarray(mask)


def unexpected(path: Path, error: InputError) -> None:
    raise AssertionError(f"{path}: {error}")


def test_files_are_written_in_the_sources_size_and_geometry(tiny_bundle, images, tmp_path):
    written = infer_to_folder([images], tiny_bundle, tmp_path / "out", overlay=True, on_error=unexpected)
    assert [path.name for path in written.masks] == ["case0.png", "case1.png", "scan.nii.gz"]
    with PIL.Image.open(written.masks[0]) as mask:
        assert mask.mode == "P"
        assert mask.size == (52, 40)
        colors = np.array(mask.getpalette()).reshape(-1, 3)
        assert tuple(map(tuple, colors[:3])) == load_bundle(tiny_bundle).classes.colors
    source, volume = (
        Nifti1Image.from_filename(images / "scan.nii.gz"),
        Nifti1Image.from_filename(written.masks[2]),
    )
    assert volume.shape == source.shape
    np.testing.assert_array_equal(volume.affine, source.affine)
    overlays = sorted((tmp_path / "out" / "overlays").iterdir())
    assert [path.name for path in overlays] == ["case0.png", "case1.png", "scan.png"]
    assert all(read_image(path).size[1] >= 52 for path in overlays)


def test_the_table_of_areas_counts_the_masks(tiny_bundle, images, tmp_path):
    written = infer_to_folder([images], tiny_bundle, tmp_path / "out", on_error=unexpected)
    with written.areas.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["file"], row["class"]) for row in rows] == [
        (name, label) for name in ("case0.png", "case1.png", "scan.nii.gz") for label in ("disc", "bar")
    ]
    for row in rows:
        path = tmp_path / "out" / row["file"]
        labels = np.asarray(Nifti1Image.from_filename(path).dataobj) if path.suffix == ".gz" else read_indices(path)
        count = (labels == int(row["label"])).sum()
        assert int(row["pixels"]) == count
        millilitres = "" if path.suffix != ".gz" else f"{count * 2.0 * 1.5 * 3.0 / 1000:.4f}"
        assert row["ml"] == millilitres
        assert row["mm2"] == ""


def test_a_bad_file_is_named_and_the_rest_is_done(tiny_bundle, images, tmp_path):
    (images / "broken.png").write_bytes((images / "case0.png").read_bytes()[:60])
    failed = []
    written = infer_to_folder(
        [images], tiny_bundle, tmp_path / "out", on_error=lambda path, error: failed.append((path.name, str(error)))
    )
    assert [name for name, _ in failed] == ["broken.png"]
    assert "broken.png" in failed[0][1]
    assert len(written.masks) == 3
    assert not list((tmp_path / "out").glob(".partial*"))


def test_an_interrupt_keeps_what_is_finished_and_its_areas(tiny_bundle, images, tmp_path, monkeypatch):
    original = to_folder.write_mask

    def interrupted(mask, folder):
        if mask.path.name == "case1.png":
            raise KeyboardInterrupt
        return original(mask, folder)

    monkeypatch.setattr(to_folder, "write_mask", interrupted)
    with pytest.raises(KeyboardInterrupt):
        infer_to_folder([images], tiny_bundle, tmp_path / "out", on_error=unexpected)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"case0.png", "areas.csv", ".finished"}
    assert len((tmp_path / "out" / "areas.csv").read_text().splitlines()) == 3


def test_masks_never_overwrite_images_or_each_other(tiny_bundle, images, tmp_path):
    before = (images / "case0.png").read_bytes()
    with pytest.raises(UsageError, match="overwrite"):
        infer_to_folder([images], tiny_bundle, images, on_error=unexpected)
    assert (images / "case0.png").read_bytes() == before
    other = write_pictures(tmp_path / "other", count=1) / "images"
    with pytest.raises(UsageError, match="share the name"):
        infer_to_folder([images, other], tiny_bundle, tmp_path / "out", on_error=unexpected)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def segmented(monkeypatch) -> list[str]:
    """The images that were really read, all of which go through the network, by name."""
    names = []
    original = to_folder.read_image

    def spy(source):
        names.append(source.name)
        return original(source)

    monkeypatch.setattr(to_folder, "read_image", spy)
    return names


def run(images: Path, bundle: Path, out: Path, **options) -> to_folder.MaskFolder:
    return infer_to_folder([images], bundle, out, resume=True, on_error=unexpected, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_resume_keeps_finished_masks_and_an_identical_table(tiny_bundle, images, tmp_path, segmented):
    run(images, tiny_bundle, tmp_path / "out", overlay=True)
    before = contents(tmp_path / "out")
    again = run(images, tiny_bundle, tmp_path / "out", overlay=True)
    assert segmented == ["case0.png", "case1.png", "scan.nii.gz"]
    assert again.kept == 3
    assert contents(tmp_path / "out") == before


def change_the_image(images: Path, out: Path) -> None:
    (images / "case0.png").write_bytes((images / "case1.png").read_bytes())


def damage_the_mask(images: Path, out: Path) -> None:
    (out / "case0.png").write_bytes(b"half of it")


def remove_the_overlay(images: Path, out: Path) -> None:
    (out / "overlays" / "case0.png").unlink()


def damage_the_record(images: Path, out: Path) -> None:
    (out / ".finished" / "case0.json").write_text('{"key"')


@pytest.mark.parametrize("change", [change_the_image, damage_the_mask, remove_the_overlay, damage_the_record])
def test_resume_redoes_an_image_whose_files_changed(tiny_bundle, images, tmp_path, segmented, change):
    out = tmp_path / "out"
    run(images, tiny_bundle, out, overlay=True)
    segmented.clear()
    change(images, out)
    assert run(images, tiny_bundle, out, overlay=True).kept == 2
    assert segmented == ["case0.png"]


def test_another_bundle_or_other_options_are_another_run(tiny_bundle, images, tmp_path, segmented):
    run(images, tiny_bundle, tmp_path / "out")
    other = shutil.copytree(tiny_bundle, tmp_path / "other.medseg")
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["source"]["checkpoint"] = "other.pt"
    (other / "manifest.json").write_text(json.dumps(manifest))
    assert run(images, other, tmp_path / "out").kept == 0
    assert run(images, other, tmp_path / "out", overlay=True).kept == 0
    assert run(images, other, tmp_path / "out", overlay=True).kept == 3


def test_without_continue_everything_is_done_again(tiny_bundle, images, tmp_path, segmented):
    for _ in range(2):
        infer_to_folder([images], tiny_bundle, tmp_path / "out", on_error=unexpected)
    assert len(segmented) == 6


def test_a_record_cannot_name_a_file_outside(tiny_bundle, images, tmp_path, segmented):
    out = tmp_path / "out"
    run(images, tiny_bundle, out)
    path = out / ".finished" / "case0.json"
    record = json.loads(path.read_text())
    (tmp_path / "secret").write_text("x")
    record["files"] = {"../secret": sha256(tmp_path / "secret")}
    path.write_text(json.dumps(record))
    assert run(images, tiny_bundle, out).kept == 2


def test_killed_at_any_moment_and_continued_gives_the_same_bytes(tiny_bundle, tmp_path):
    data = write_pictures(tmp_path / "data", count=40, size=(96, 96))
    command = [sys.executable, "-m", "medseg_trt", "infer", data / "images", "--bundle", tiny_bundle, "--overlay"]
    subprocess.run([*command, "-o", tmp_path / "whole"], check=True, capture_output=True)
    out = tmp_path / "killed"
    rng = np.random.default_rng(0)
    for finished in sorted(rng.choice(range(1, 39), 3, replace=False)):
        process = subprocess.Popen(
            [*command, "-o", out, "--continue"], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        while len(list((out / ".finished").glob("[!.]*.json"))) < finished and process.poll() is None:
            time.sleep(0.001)
        process.kill()
        process.wait()
        for path in out.glob("[!.]*.png"):
            assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes()  # never half a mask
        assert len(list(out.glob("[!.]*.png"))) < 40  # it was killed in the middle
    subprocess.run([*command, "-o", out, "--continue"], check=True, capture_output=True)
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("inside", ["", "masks"])
def test_output_folder_inside_the_bundle_is_refused(inside, tiny_bundle, images, tmp_path):
    bundle = tmp_path / "copy.medseg"
    shutil.copytree(tiny_bundle, bundle)
    before = sorted(path.name for path in bundle.iterdir())
    with pytest.raises(UsageError, match="is in the bundle"):
        infer_to_folder([images], bundle, bundle / inside, on_error=unexpected)
    assert sorted(path.name for path in bundle.iterdir()) == before


def test_a_mask_is_not_kept_where_the_voxels_beside_a_header_have_changed(tiny_bundle, tmp_path):
    header = tmp_path / "in" / "v.nhdr"
    header.parent.mkdir()
    lines = ("NRRD0004", "type: uchar", "dimension: 2", "sizes: 52 40", "encoding: raw", "data file: v.raw", "")
    header.write_text("\n".join(lines), encoding="ascii")
    kept: list[int] = []
    for value in (0, 255, 255):
        header.with_name("v.raw").write_bytes(bytes([value]) * 52 * 40)
        kept.append(
            infer_to_folder([header.parent], tiny_bundle, tmp_path / "out", resume=True, on_error=unexpected).kept
        )
    assert kept == [0, 0, 1]
