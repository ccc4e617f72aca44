"""``build``, ``infer`` and ``bench`` on the command line, where a bundle has several precisions."""

import json
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
from tiny import write_nifti, write_volumes

from medseg_trt import pipeline
from medseg_trt.building import variants
from medseg_trt.bundles.bundle import load_bundle
from medseg_trt.bundles.tables import execution_table
from medseg_trt.cli import main
from medseg_trt.imaging import segment
from medseg_trt.sessions.backends import BACKENDS
from medseg_trt.train.checkpoint import load_checkpoint, save_checkpoint

CPU_BACKENDS = [name for name, backend in BACKENDS.items() if not backend.gpu]
Typed = Callable[..., tuple[int, str, str]]


@pytest.fixture
def typed(monkeypatch, capsys) -> Typed:
    """A function from what a user types to the exit code, stdout and stderr."""
    handler = signal.getsignal(signal.SIGTERM)

    def typed(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["medseg-trt", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as left:
            code = int(left.code or 0)
        finally:
            signal.signal(signal.SIGTERM, handler)
        return code, *capsys.readouterr()

    return typed


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_table_has_a_row_for_every_way_to_run_the_bundle(built, typed, monkeypatch):
    bundle = load_bundle(built.bundle)
    dropped = replace(
        bundle, content=replace(bundle.content, rejected_executions=("int8 with openvino in bf16: it died",))
    )
    monkeypatch.setattr(pipeline, "build", lambda *_: dropped)
    monkeypatch.setenv("COLUMNS", "300")
    code, out, _ = typed("build", "--ckpt", built.checkpoint)
    assert code == 0
    assert out.splitlines()[0].endswith("infer uses the first row")
    rows = [line for line in out.splitlines() if any(backend in line for backend in CPU_BACKENDS) and "│" in line]
    assert len(rows) == len(bundle.content.executions)
    for line, execution in zip(rows, bundle.content.executions, strict=True):
        assert bundle.variant(execution).precision in line
        assert f"{execution.median_ms:.2f}" in line
    header = next(line for line in out.splitlines() if "back-end" in line)
    assert [word.strip() for word in header.split("┃")[1:-1]] == execution_table(bundle)[0]
    assert out.splitlines()[-1] == "not used: int8 with openvino in bf16: it died"
    assert "the first row passed its check and took" in out


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "w4a16", "vit=int8,block=w8a16,decoder=fp16"])
def test_infer_takes_the_precision_and_the_backend_that_are_named(built, typed, tmp_path, precision, backend):
    image = built.data / "images" / "scan2.nii.gz"
    options = ["--precision", precision, "--backend", backend, "--threads", 1, "--json"]
    code, out, err = typed("infer", image, "--bundle", built.bundle, "-o", tmp_path / "masks", *options)
    assert code == 0, err
    (mask,) = json.loads(out)["masks"]
    assert Path(mask).name == image.name
    assert nibabel.Nifti1Image.load(mask).shape == nibabel.Nifti1Image.load(image).shape
    shown = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}[backend]
    assert any(line.startswith(f"run {built.bundle} with {shown}") and precision in line for line in err.splitlines())


def test_infer_says_what_it_chose(built, typed, tmp_path):
    code, _, err = typed("infer", built.data / "images", "--bundle", built.bundle, "-o", tmp_path / "masks")
    assert code == 0
    assert f"(auto: the fastest of {len(built.manifest['executions'])} at the build" in err


def test_a_precision_that_the_bundle_lacks_is_refused_with_what_it_holds(built, typed, tmp_path):
    options = ["--precision", "w8a16", "-o", tmp_path / "masks"]
    code, out, err = typed("infer", built.data / "images", "--bundle", built.bundle, *options)
    assert (code, out) == (2, "")
    assert "holds nothing for w8a16; it holds" in err
    assert "onnxruntime int8" in err


def test_infer_refuses_a_modified_graph_with_exit_code_5(built, typed, tmp_path):
    edited = shutil.copytree(built.bundle, tmp_path / "edited.medseg")
    graph = edited / "int8.onnx"
    graph.write_bytes(graph.read_bytes().replace(b"_rounded", b"_rounder", 1))
    code, out, err = typed("infer", built.data / "images", "--bundle", edited, "-o", tmp_path / "masks")
    assert (code, out) == (5, "")
    (line,) = err.splitlines()
    assert line.startswith(f"medseg-trt: {graph} is not what manifest.json says it is")
    assert not (tmp_path / "masks").exists()


@pytest.mark.usefixtures("measured_here")
def test_bench_has_a_row_for_every_precision(built, typed, tmp_path):
    options = ["--duration-s", "0", "--warmup-ms", "0", "--max-dice-drop", "0.3", "-o", tmp_path / "report", "--json"]
    code, out, err = typed(
        "bench", "--bundle", built.bundle, "--ckpt", built.checkpoint, "--data", built.data, *options
    )
    assert code == 0, err
    reference, *rows = json.loads(out)["rows"]
    assert reference["backend"] == "pytorch"
    executed = {(entry["variant"], entry["compute_dtype"]) for entry in built.manifest["executions"]}
    precisions = {built.manifest["variants"][name]["precision"]: dtype for name, dtype in executed if dtype != "bf16"}
    assert {row["name"].split()[1] for row in rows} - {"bf16"} == precisions.keys()  # of bf16 where it is computed
    assert len(rows) == len({row["name"] for row in rows})
    assert all(row["agreement"]["labels"] > 0.9 for row in rows)


def few(data: Path) -> None:
    shutil.rmtree(data)
    write_volumes(data, count=3, slices=1)


def black(data: Path) -> None:
    for name in ("scan0.nii.gz", "scan1.nii.gz"):  # the train split
        write_nifti(data / "images" / name, np.zeros((28, 36, 5), np.uint8))


def leaked(data: Path) -> None:
    shutil.copyfile(data / "images" / "scan2.nii.gz", data / "images" / "scan0.nii.gz")


@pytest.mark.parametrize(
    ("precision", "damage", "message"),
    [
        ("int9", None, "no precision is called 'int9'; choose one of: fp32, int8"),
        ("fp32,vit=int9", None, "no precision is called 'int9'"),
        ("encoder=int8", None, "no part of the network is called 'encoder'"),
        ("vit=int8,vit=fp16", None, "names vit twice"),
        ("fp32,fp32", None, "must be different ones"),
        ("int8", few, "2 different calibration images are too few; give at least 4: --data DIR"),
        ("int8", black, "needs images to calibrate on"),
        ("int8", leaked, "5 of the images of generated, split val are also calibration images"),
    ],
)
def test_failed_build_prints_one_line_and_keeps_the_old_bundle(
    built, tiny_bundle, typed, in_process, tmp_path, precision, damage, message
):
    data = shutil.copytree(built.data, tmp_path / "data")
    if damage is not None:
        damage(data)
    out = shutil.copytree(tiny_bundle, tmp_path / "model.medseg")
    before = contents(out)
    command = ["build", "--ckpt", built.checkpoint, "--data", data, "-o", out, "--precision", precision, "-q"]
    code, printed, err = typed(*command)
    assert (code, printed) == (2, "")
    assert message in err.splitlines()[-1]
    assert sum(line.startswith("medseg-trt: ") for line in err.splitlines()) == 1
    assert contents(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "model.medseg"]


def test_a_gate_that_cannot_hold_leaves_with_3_and_the_old_bundle_stays(
    built, tiny_bundle, typed, in_process, tmp_path, monkeypatch
):
    def too_wide(observe, images, names, original=variants.calibrate):
        observed = original(observe, images, names)
        wide = {
            name: replace(
                activation, low=1e4 * activation.low, high=1e4 * activation.high, bound=1e4 * activation.bound
            )
            for name, activation in observed.ranges.items()
        }
        return replace(observed, ranges=wide)

    monkeypatch.setattr(variants, "calibrate", too_wide)
    out = shutil.copytree(tiny_bundle, tmp_path / "model.medseg")
    before = contents(out)
    code, printed, err = typed(
        "build", "--ckpt", built.checkpoint, "--data", built.data, "-o", out, "--precision", "int8", "-q"
    )
    assert (code, printed) == (3, "")
    assert err.splitlines()[-1].startswith("medseg-trt: int8 draws other masks than PyTorch")
    assert contents(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["model.medseg"]


# Masks made inside the graph


@pytest.mark.parametrize("spacing_mm", [pytest.param(None, marks=pytest.mark.slow), 1.5])  # stretched, or cropped
def test_masks_from_the_graph_are_the_same_bytes(built, typed, in_process, tmp_path, monkeypatch, spacing_mm):
    loaded = load_checkpoint(built.checkpoint)
    placed = replace(loaded, preprocessing=replace(loaded.preprocessing, spacing_mm=spacing_mm))
    save_checkpoint(placed, tmp_path / "model.pt")
    for outputs in ("logits", "mask"):
        command = ["build", "--ckpt", tmp_path / "model.pt", "--data", built.data, "--outputs", outputs]
        code, _, err = typed(*command, "-o", tmp_path / f"{outputs}.medseg")
        assert code == 0, err
    for execution in load_bundle(tmp_path / "mask.medseg").content.executions:
        assert execution.verification.own_masks_agreement == 1
    for backend in CPU_BACKENDS:
        written = {}
        for name in ("logits", "mask"):
            bundle = tmp_path / f"{name}.medseg"
            with monkeypatch.context() as patch:
                if name == "mask":
                    patch.setattr(segment, "restore", lambda *_: pytest.fail("the labels were not made in the graph"))
                folder = tmp_path / f"{name}-{backend}"
                options = ["--backend", backend, "--precision", "fp32", "--threads", 1, "-o", folder]
                code, _, err = typed("infer", built.data / "images", "--bundle", bundle, *options)
                assert code == 0, err
            written[name] = {path: data for path, data in contents(folder).items() if not path.startswith(".finished")}
        assert len(written["mask"]) == 4  # three masks and areas.csv
        assert written["mask"] == written["logits"]
