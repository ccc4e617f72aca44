"""Engines are described without their library, and rebuilt where they do not fit."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from engines_here import WithEngines, run, seal_again

from medseg_trt.bundles.bundle import Bundle, load_bundle
from medseg_trt.engines import build as engines
from medseg_trt.engines.child import EngineBuild
from medseg_trt.engines.fingerprint import read_fingerprint, write_fingerprint
from medseg_trt.engines.rebuild import rebuild_engines
from medseg_trt.errors import ArtefactError, UsageError
from medseg_trt.export.engine_layers import LayerReport
from medseg_trt.inspection.engine import inspect_engine, read_layer_report
from medseg_trt.spec import EngineSpec, from_dict

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'medseg-trt[tensorrt-rtx]'")


def test_inspect_shows_layers_expectations_and_fingerprint(with_engines: WithEngines, tmp_path: Path):
    plan, svg = with_engines.plan("int8"), tmp_path / "layers.svg"
    result = run("inspect", plan, "--picture", svg)
    assert result.exit_code == 0, result.output
    assert all(word in result.output for word in ("Int8", "attention is one", "state: intact", "multiply-accumulates:"))
    boxes = [
        rect for rect in ElementTree.parse(svg).iter("{http://www.w3.org/2000/svg}rect") if rect.find("*") is not None
    ]
    report = read_layer_report(plan)
    assert len(boxes) == len(report.layers)
    assert {box.get("fill") for box in boxes} >= {"#E69F00", "#999999"}  # Int8, Float
    described = json.loads(run("inspect", plan, "--json").output)
    assert from_dict(LayerReport, described["report"], "json") == report
    assert run("inspect", plan, "--picture", tmp_path / "a.png").exit_code != 0


def test_inspect_opens_no_library(with_engines: WithEngines):
    program = (
        "import sys; from click.testing import CliRunner; from medseg_trt.cli import cli\n"
        "done = CliRunner().invoke(cli, ['inspect', sys.argv[1]]); assert done.exit_code == 0, done.output\n"
        "print(sorted({'tensorrt_rtx', 'tensorrt', 'torch', 'onnx'} & sys.modules.keys()))"
    )
    command = [sys.executable, "-c", program, str(with_engines.plan("fp16"))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_inspect_of_damaged_files(copied: Bundle):
    plan = copied.folder / copied.content.engines[0].plan
    plan.write_bytes(plan.read_bytes()[:-1])
    assert inspect_engine(plan).state.startswith("damaged")
    plan.unlink()
    assert inspect_engine(plan).state == "missing"
    for content in ("", "{}", "[" * 100_000, '{"layers": 1}'):
        plan.with_suffix(".layers.json").write_text(content)
        with pytest.raises(ArtefactError):
            read_layer_report(plan)


def test_an_engine_that_fits_is_not_built_again(copied: Bundle, monkeypatch):
    monkeypatch.setattr(engines, "build_in_child", None)
    assert rebuild_engines(copied).content == copied.content


def test_an_engine_of_another_version_is_built_again_from_the_bundle(copied: Bundle, images: Path, tmp_path: Path):
    stale = next(engine for engine in copied.content.engines if engine.variant == "fp16" and not engine.spec.plugins)
    plan = copied.folder / stale.plan
    write_fingerprint(replace(read_fingerprint(plan), version="1.6.0"), plan.parent)
    seal_again(copied.folder, copied.content.engines)
    result = run("infer", images / "case0.png", "--bundle", copied.folder, "-o", tmp_path / "masks", "--rebuild")
    assert result.exit_code == 0, result.output
    after = load_bundle(copied.folder)
    (fresh,) = [engine for engine in after.content.engines if engine not in copied.content.engines]
    assert fresh.variant == "fp16"
    assert read_fingerprint(after.folder / fresh.plan).version == "1.7.1.116"
    assert not plan.exists()
    assert len(after.content.engines) == len(copied.content.engines)
    assert {path.name for path in plan.parent.iterdir()} == {
        Path(name).name for name in after.content.files if name.startswith("engines/")
    }


def test_a_rebuild_that_is_interrupted_leaves_the_bundle_whole(copied: Bundle, monkeypatch):
    plan = copied.folder / copied.content.engines[0].plan
    write_fingerprint(replace(read_fingerprint(plan), version="1.6.0"), plan.parent)
    seal_again(copied.folder, copied.content.engines)
    before = load_bundle(copied.folder)

    asked: list[int] = []

    def interrupted(graph: Path, plan: Path, spec: EngineSpec, cache: Path | None, gpu_number: int) -> EngineBuild:
        asked.append(gpu_number)
        plan.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(engines, "build_in_child", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rebuild_engines(before, gpu_number=1)
    assert asked == [1]
    assert load_bundle(copied.folder).content == before.content


def test_a_bundle_without_engines_has_none_to_build_again(built):
    with pytest.raises(UsageError, match="--target"):
        rebuild_engines(load_bundle(built.bundle))
