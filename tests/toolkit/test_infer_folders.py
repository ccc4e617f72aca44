"""The command ``infer`` on folders as people have them: hardly anything of it is a picture with a plain name."""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from dicoms import save_series
from nibabel import Nifti1Image
from tiny import picture, write_pictures

LATIN1, LATIN1_SERIES = b"M\xfcller", b"Sch\xe4del"
LONG = "b" * 251  # with .png as long as a name can be
TOO_LONG = "c" * 252  # with .h5 as long as a name can be, and the mask's is longer
ASCII_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def command(bundle: Path, *arguments: str | Path) -> list[str]:
    program = [sys.executable, "-m", "medseg_trt", "infer", "--bundle", str(bundle), "--backend", "onnxruntime"]
    return [*program, *map(str, arguments)]


def infer(
    bundle: Path, *arguments: str | Path, cwd: Path, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(bundle, *arguments),
        cwd=cwd,
        env=os.environ | (environment or {}),
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
        timeout=300,
    )


def save_picture(folder: Path, name: bytes, seed: int = 0) -> None:
    folder.mkdir(exist_ok=True)
    with open(folder / os.fsdecode(name), "wb") as file:
        PIL.Image.fromarray(picture(seed, (40, 52))[0]).save(file, "PNG")


def files_in_table(out: Path) -> list[str]:
    with (out / "areas.csv").open(newline="", encoding="utf-8") as file:
        return list(dict.fromkeys(row["file"] for row in csv.DictReader(file)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with pictures whose names are of all kinds, and much that is no picture."""
    root = tmp_path / "in"
    names = (
        b"a.png",
        LATIN1 + b".png",
        "扫描é.png".encode(),
        b"=1+1.png",
        b"z\x1b[31m\nwarning: [b].png",
        LONG.encode() + b".png",
    )
    for seed, name in enumerate(names):
        save_picture(root, name, seed)
    (root / f"{TOO_LONG}.h5").write_bytes(b"")
    (root / "gone.png").symlink_to("nowhere.png")
    (root / "b.webp").touch()
    save_picture(root / "more", b"c.png")
    scan = save_series(root / "scan", np.stack([picture(seed, (36, 28))[0] for seed in range(3)]).astype(np.int16))
    scan.rename(root / os.fsdecode(LATIN1_SERIES))
    save_series(root / ("d" * 250), np.zeros((3, 36, 28), np.int16))
    return root


SHOWN = (
    "=1+1.png",
    "a.png",
    f"{LONG}.png",
    r"Sch\xe4del",
    r"M\xfcller.png",
    "z\x1b[31m\nwarning: [b].png",
    "扫描é.png",
)


@pytest.mark.parametrize("environment", [{}, ASCII_LOCALE])
def test_every_name_is_done_or_refused_by_itself_in_any_locale(tiny_bundle, folder, tmp_path, environment):
    ran = infer(tiny_bundle, "in", "-o", "out", "--json", "--overlay", cwd=tmp_path, environment=environment)
    assert ran.returncode == 1, ran.stderr
    assert "Traceback" not in ran.stderr
    assert "\x1b" not in ran.stderr
    result = json.loads(ran.stdout)
    ran.stdout.encode("ascii")  # which every reader takes, and no lone surrogate among it
    assert sorted(Path(mask).name.removesuffix(".nii.gz") for mask in result["masks"]) == sorted(SHOWN)
    assert set(result["failed"]) == {"in/gone.png", f"in/{TOO_LONG}.h5", f"in/{'d' * 250}"}
    assert "the name of its mask would have 256 bytes, and 255 are possible" in result["failed"][f"in/{TOO_LONG}.h5"]
    assert result["skipped"] == [
        {"path": "in/b.webp", "reason": "of another kind", "files": 1},
        {"path": "in/more", "reason": "in a sub-folder, which is not searched", "files": 1},
    ]
    lines = ran.stderr.splitlines()
    for reason in result["failed"].values():
        assert lines.count(f"medseg-trt: {reason}") == 1
    assert sum(line.startswith("warning: ") for line in lines) == 2
    assert lines[-1] == "medseg-trt: 3 of 10 files could not be used; they are named above"

    in_table = [name.replace("=1", "'=1").replace("\x1b", r"\x1b").replace("\n", r"\n") for name in SHOWN]
    assert sorted(files_in_table(tmp_path / "out")) == sorted(in_table)
    masks = set(os.listdir(os.fsencode(tmp_path / "out")))
    assert {LATIN1 + b".png", LATIN1_SERIES + b".nii.gz", "扫描é.png".encode(), LONG.encode() + b".png"} <= masks
    with PIL.Image.open(tmp_path / "out" / os.fsdecode(LATIN1 + b".png")) as mask:
        assert mask.size == (52, 40)
    volume = Nifti1Image.from_filename(tmp_path / "out" / os.fsdecode(LATIN1_SERIES + b".nii.gz"))
    assert volume.shape == (28, 36, 3)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.*")}
    again = infer(tiny_bundle, "in", "-o", "out", "--overlay", "--continue", cwd=tmp_path, environment=environment)
    assert "7 masks of an earlier run were kept" in again.stderr
    assert again.stdout == "7 masks in out, 3 files refused, 2 left out; areas in out/areas.csv\n"
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.*")}
    assert {name for name in before if before[name] != after[name]} == {"areas.csv"}


def test_runs_beside_each_other_lose_neither_masks_nor_areas(tiny_bundle, tmp_path):
    """One run into a folder, and meanwhile others with --continue, as a script over many folders starts them."""
    for name, count in (("first", 60), ("others", 2)):
        images = write_pictures(tmp_path / name, count=count, size=(64, 64)) / "images"
        for path in images.iterdir():
            path.rename(images / f"{name}{path.name}")

    def start(arguments: Sequence[str | Path]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command(tiny_bundle, *arguments, "-o", "out"),
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    with start(["first/images"]) as first:
        while True:
            with start(["others/images", "--continue"]) as other:
                said = other.communicate(timeout=120)[1]
            assert other.returncode == 0, said
            if first.poll() is not None:
                break
        assert first.stderr is not None
        assert first.returncode == 0, first.stderr.read()
    names = {f"first{path}.png" for path in (f"case{number}" for number in range(60))}
    names |= {f"otherscase{number}.png" for number in range(2)}
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == names
    assert set(files_in_table(tmp_path / "out")) == names


def test_consecutive_infer_runs_share_areas_csv(tiny_bundle, tmp_path):
    for name in ("one", "two", "one"):
        save_picture(tmp_path / "in", f"{name}.png".encode())
        assert infer(tiny_bundle, f"in/{name}.png", "-o", "out", cwd=tmp_path).returncode == 0
    assert files_in_table(tmp_path / "out") == ["two.png", "one.png"]


def test_nothing_to_do_is_an_error_that_names_every_input(tiny_bundle, tmp_path):
    (tmp_path / "a.gif").touch()
    ran = infer(tiny_bundle, "a.gif", "nowhere.png", cwd=tmp_path)
    assert ran.returncode == 1
    lines = ran.stderr.splitlines()
    assert lines[0].startswith("medseg-trt: a.gif is of an unsupported format")
    assert lines[1:] == [
        "medseg-trt: nowhere.png does not exist",
        "medseg-trt: none of 2 inputs can be used; they are named above",
    ]
    assert not (tmp_path / "masks").exists()


def test_control_characters_of_an_argument_never_reach_the_terminal(tiny_bundle, tmp_path):
    for arguments in (
        ["a\x1b[31m\nwarning: b.png"],
        ["in", "--bundle", "b\x1b[31m.medseg"],
        ["a", "--batch", "\x1b[1m"],
    ):
        ran = infer(tiny_bundle, *arguments, cwd=tmp_path)
        assert ran.returncode in (1, 2, 5)
        assert "\x1b" not in ran.stderr
        assert not any(line.startswith("warning: b.png") for line in ran.stderr.splitlines())
