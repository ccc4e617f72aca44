"""A full disk in the middle of ``infer`` or ``bench``: the kernel lets no file grow, as it does without space."""

import json
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from click.testing import CliRunner
from tiny import picture, write_nifti, write_pictures

from medseg_trt.bench.report.write import write_report
from medseg_trt.cli import cli, main
from medseg_trt.imaging.images import write_mask
from medseg_trt.inference import to_folder


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond ``size`` bytes; what is written beyond fails with EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def largest_mask(monkeypatch) -> dict[str, int]:
    """Write noise for masks: it cannot be compressed, so that a mask's size is that of its image.

    The limit holds while a mask is written, not for the copy of the graph that a session reads.
    """
    limit = {"bytes": 6000}  # the large mask alone would have more

    def write(mask, output, real=write_mask):
        rng = np.random.default_rng(0)
        mask.labels[:] = rng.integers(0, len(mask.classes.names), mask.labels.shape, np.uint8)
        with largest_file(limit["bytes"]):
            return real(mask, output)

    monkeypatch.setattr(to_folder, "write_mask", write)
    return limit


@pytest.fixture(params=["z.png", "z.nii.gz", "z.tif"])
def images(request, tmp_path) -> Path:
    """A small picture, and a large image of one of the kinds that are written."""
    folder = write_pictures(tmp_path / "data", count=1, size=(40, 52)) / "images"
    pixels = np.stack([picture(seed, (240, 260))[0] for seed in range(2)])
    if request.param == "z.nii.gz":
        write_nifti(folder / request.param, pixels.transpose(2, 1, 0))
    else:  # of a PNG the first alone
        first, *others = map(PIL.Image.fromarray, pixels)
        pages = {"save_all": True, "append_images": others} if request.param == "z.tif" else {}
        first.save(folder / request.param, **pages)
    return folder


@pytest.fixture
def command(images, tiny_bundle, tmp_path) -> list[str]:
    return ["medseg-trt", "infer", str(images), "--bundle", str(tiny_bundle), "-o", str(tmp_path / "out")]


@pytest.fixture
def complaints(command, largest_mask, monkeypatch, capsys) -> list[str]:
    """What the command says where the large mask does not fit."""
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "argv", command)
    try:
        with pytest.raises(SystemExit) as left:
            main()
    finally:
        signal.signal(signal.SIGTERM, handler)
        largest_mask["bytes"] = resource.RLIM_INFINITY
    assert left.value.code == 1
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("medseg-trt: ")]


def large(images: Path) -> str:
    (name,) = [path.name for path in images.iterdir() if path.name.startswith("z")]
    return name


def test_full_disk_error_is_one_line_naming_the_file(complaints, images, tmp_path):
    assert complaints == [f"medseg-trt: {tmp_path / 'out' / large(images)}: File too large"]


def test_full_disk_leaves_no_partial_files_and_keeps_finished_masks(complaints, command, images, tmp_path):
    out = tmp_path / "out"
    assert len(complaints) == 1
    assert complaints[0].endswith(": File too large")
    assert sorted(path.name for path in out.iterdir()) == [".finished", "areas.csv", "case0.png"]
    assert [path.name for path in (out / ".finished").iterdir()] == ["case0.json"]
    rows = (out / "areas.csv").read_text(encoding="utf-8").splitlines()
    assert {row.split(",")[0] for row in rows} == {"file", "case0.png"}
    small, made_ns = (out / "case0.png").read_bytes(), (out / "case0.png").stat().st_mtime_ns

    ran = CliRunner().invoke(cli, [*command[1:], "--continue"])  # with room again
    assert ran.exit_code == 0, ran.output
    assert ((out / "case0.png").read_bytes(), (out / "case0.png").stat().st_mtime_ns) == (small, made_ns)
    assert (out / large(images)).stat().st_size > 6000


def test_a_report_that_does_not_fit_leaves_the_earlier_one_and_prints_its_figures(
    tiny_bundle, tmp_path, monkeypatch, capsys, measured_here
):
    command = [
        "medseg-trt",
        "bench",
        "--bundle",
        str(tiny_bundle),
        "--tier",
        "quick",
        "--duration-s",
        "0",
        "--json",
        "-o",
        str(tmp_path / "report"),
    ]
    monkeypatch.setattr(sys, "argv", command)
    main()
    capsys.readouterr()
    before = {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()}
    assert set(before) == {"index.html", "report.json", "report.md"}
    assert len(before["index.html"]) > 8000 > len(before["report.md"])  # the page is what does not fit
    handler = signal.getsignal(signal.SIGTERM)

    def write(measured, folder, real=write_report):
        with largest_file(8000):
            return real(measured, folder)

    monkeypatch.setattr("medseg_trt.bench.report.write.write_report", write)
    try:
        with pytest.raises(SystemExit) as left:
            main()
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert left.value.code == 1
    said = capsys.readouterr()
    assert said.err.splitlines()[-1].endswith(": File too large")
    assert json.loads(said.out)["rows"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()} == before
