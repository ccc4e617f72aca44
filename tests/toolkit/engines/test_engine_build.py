"""The engines of a bundle, built with TensorRT-RTX, which needs no GPU; they are not run."""

import json
import shutil
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest
from engines_here import SPEC, WithEngines, run

from medseg_trt import processes
from medseg_trt.bundles.bundle import MANIFEST, Bundle, load_bundle
from medseg_trt.bundles.tables import engine_table
from medseg_trt.engines import build as engines
from medseg_trt.engines.build import build_engines, check_engines
from medseg_trt.engines.child import build_in_child
from medseg_trt.engines.fingerprint import metadata_path, read_fingerprint
from medseg_trt.errors import ArtefactError, DeviceError, MedsegError, MissingExtraError, UsageError
from medseg_trt.export.tensorrt.build import LIBRARIES, check_engine_spec, dialect_for, shell_command
from medseg_trt.export.tensorrt.graph import EngineGraph
from medseg_trt.files import sha256, write_json
from medseg_trt.spec import EngineSpec

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'medseg-trt[tensorrt-rtx]'")


def test_every_precision_has_an_engine_with_a_fingerprint(with_engines: WithEngines):
    content = with_engines.bundle.content
    precisions = [content.variants[engine.variant].precision for engine in content.engines if not engine.spec.plugins]
    assert sorted(precisions) == sorted({variant.precision for variant in content.variants.values()})
    assert any("w8a16" in engine for engine in precisions)
    assert "w4a16" in precisions
    for engine in content.engines:
        plan = with_engines.bundle.folder / engine.plan
        fingerprint, variant = read_fingerprint(plan), content.variants[engine.variant]
        assert (fingerprint.sha256, fingerprint.bytes) == (sha256(plan), plan.stat().st_size)
        assert (fingerprint.library, fingerprint.version, fingerprint.cuda) == ("tensorrt-rtx", "1.7.1.116", "13")
        assert (fingerprint.targets, fingerprint.batch, fingerprint.gpu) == (("sm86", "sm89"), (1, 1, 4), None)
        assert (fingerprint.graph, fingerprint.graph_sha256) == (variant.graph, content.files[variant.graph].sha256)
        assert fingerprint.weights_sha256 == content.files[variant.weights].sha256
        assert not engine.executed
        assert engine.peak_resident_mb > 50


def test_the_table_says_that_no_engine_has_run(with_engines: WithEngines):
    header, rows = engine_table(with_engines.bundle)
    assert {row[header.index("executed")] for row in rows} == {"no"}


def test_a_changed_plan_or_side_car_is_refused_with_the_bundle(copied: Bundle):
    for name in (copied.content.engines[0].plan, metadata_path(Path(copied.content.engines[0].plan)).as_posix()):
        path = copied.folder / name
        content = path.read_bytes()
        path.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
        with pytest.raises(ArtefactError, match=path.name):
            load_bundle(copied.folder)
        path.write_bytes(content)
    data = json.loads((copied.folder / MANIFEST).read_text())
    del data["files"][copied.content.engines[0].plan]
    write_json(copied.folder / MANIFEST, data)
    with pytest.raises(ArtefactError, match="no digest"):
        load_bundle(copied.folder)


def test_two_builds_with_a_fixed_batch_are_the_same_bytes(with_engines: WithEngines, tmp_path: Path):
    plans = [tmp_path / "first" / "a.plan", tmp_path / "second, with a longer name" / "a.plan"]
    for plan in plans:
        plan.parent.mkdir()
        build_in_child(with_engines.graph("int8"), plan, replace(SPEC, max_batch=1, reproducible=True), None)
    assert plans[0].read_bytes() == plans[1].read_bytes()
    assert plans[0].read_bytes() != with_engines.plan("int8").read_bytes()


# What is refused


def test_float32_products_on_sm75_are_explained(with_engines: WithEngines, tmp_path: Path):
    with pytest.raises(MedsegError, match=r"sm75 multiplies no float32.*--precision fp16"):
        build_in_child(with_engines.graph("fp32"), tmp_path / "a.plan", replace(SPEC, targets=("sm75",)), None)
    assert list(tmp_path.iterdir()) == []


def test_one_engine_that_fails_leaves_the_others(with_engines: WithEngines, tmp_path: Path, caplog):
    folder = shutil.copytree(with_engines.bundle.folder, tmp_path / "b", ignore=shutil.ignore_patterns("engines"))
    variants = {name: with_engines.bundle.content.variants[name] for name in ("fp32", "fp16")}
    result = build_engines(folder, variants, set(variants), replace(SPEC, targets=("sm75",)), variants)
    assert [engine.variant for engine in result.built] == ["fp16"]
    (line,) = result.rejected
    assert line.startswith("fp32 engine: ")
    assert "sm75 multiplies no float32" in line
    unverified = build_engines(folder, variants, set(), SPEC, variants)
    assert unverified.built == ()
    assert all("no back-end has verified its graph" in line for line in unverified.rejected)


def test_a_workspace_that_is_too_small_is_explained(with_engines: WithEngines, tmp_path: Path):
    with pytest.raises(MedsegError, match="--workspace-gib"):
        build_in_child(with_engines.graph("fp16"), tmp_path / "a.plan", replace(SPEC, workspace_gib=2**-20), None)


def test_a_damaged_graph_is_refused(with_engines: WithEngines, tmp_path: Path):
    path = tmp_path / "a.onnx"
    path.write_bytes(with_engines.graph("fp16").read_bytes()[:1000])
    with pytest.raises(ArtefactError, match="no ONNX file"):
        build_in_child(path, tmp_path / "a.plan", SPEC, None)


def test_a_builder_that_is_killed_is_one_line(monkeypatch, tmp_path: Path):
    kill = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    monkeypatch.setattr(processes, "python_command", lambda *_: kill)
    with pytest.raises(ArtefactError, match=r"killed by signal 9 \(SIGKILL\); the machine may have run out of memory"):
        build_in_child(tmp_path / "a.onnx", tmp_path / "a.plan", SPEC, None)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--target", "sm87"], 2, "sm87; it knows sm75, sm80, sm86, sm89, sm120, sm121"),
        (["--target", "sm86,sm89", "--precision", "fp8"], 2, "sm86 has no fp8; leave it out"),
        (["--target", "sm75,sm86", "--plugins", "on"], 2, "compiled for compute capability 8.0 and newer, sm80"),
        (["--target", "sm86", "--outputs", "mask"], 2, "--outputs logits"),
        (["--target", "sm86", "--version-compatible"], 2, "no version compatible option"),
        (["--target", "sm86", "--hardware-compatible", "ampere_plus"], 2, "no hardware option"),
        (["--target", "sm86", "--backend", "openvino"], 2, "builds no engines"),
        (["--target", "sm86,sm86", "--opt-batch", "9"], 2, "ascending"),
        (["--target", "sm86", "--backend", "tensorrt"], 6, "pip install 'medseg-trt[tensorrt]'"),
        (["--backend", "tensorrt-rtx"], 6, "--target sm86"),
    ],
)
def test_build_refuses_impossible_engine_options(built, arguments, code, words, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr("medseg_trt.gpu.find_gpu", lambda _number: None)
    result = run("build", "--ckpt", built.checkpoint, *arguments)
    error = result.exception
    assert isinstance(error, MedsegError)
    assert error.exit_code == code
    assert words in str(error)


def test_check_engines_refuses_masks_and_fp8_before_sm89_and_nothing_else():
    cases = list(product(("sm86", "sm89"), ("logits", "mask"), ("fp16", "int8", "fp8")))
    refused: list[tuple[str, str, str]] = []
    for target, outputs, precision in cases:
        try:
            check_engines(replace(SPEC, targets=(target,)), outputs, [precision])
        except UsageError:
            refused.append((target, outputs, precision))
    assert refused == [case for case in cases if "mask" in case or case == ("sm86", "logits", "fp8")]


def test_without_any_library_both_extras_are_named(monkeypatch):
    monkeypatch.setattr(engines, "installed_version", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"medseg-trt\[tensorrt-rtx\].*medseg-trt\[tensorrt\]"):
        engines.default_library()


def test_little_memory_is_said_before_the_build(with_engines: WithEngines, monkeypatch, caplog):
    weights = with_engines.bundle.folder / with_engines.bundle.content.variants["fp16"].weights
    monkeypatch.setattr(engines, "_available_bytes", lambda: 200 << 20)
    engines._warn_of_memory(weights, "a.plan")
    assert "a.plan takes about 0.6 GB" in caplog.text
    caplog.clear()
    monkeypatch.setattr(engines, "_available_bytes", lambda: 8 << 30)
    engines._warn_of_memory(weights, "a.plan")
    assert caplog.text == ""


# The classic library, which is not installed here


def test_the_classic_library_builds_for_the_gpu_that_is_here():
    classic, spec = ModuleType("tensorrt"), replace(SPEC, library="tensorrt", targets=("sm86",))
    vars(classic)["__version__"] = "10.15.1"
    check_engine_spec(spec, classic, "sm86")
    with pytest.raises(UsageError, match="knows sm89"):
        check_engine_spec(spec, classic, "sm89")
    with pytest.raises(DeviceError, match="--backend tensorrt-rtx"):
        check_engine_spec(spec, classic, None)


@pytest.mark.parametrize(
    ("library", "version", "dialect"),
    [
        ("tensorrt", "10.3.0", "plain"),
        ("tensorrt", "10.14.1.48", "plain"),
        ("tensorrt", "10.15.1", "canonical"),
        ("tensorrt", "11.4.0", "canonical"),
        ("tensorrt-rtx", "1.7.1.116", "canonical"),
    ],
)
def test_older_parsers_get_the_plain_graph(library, version, dialect):
    assert dialect_for(library, version) == dialect


@pytest.mark.parametrize("library", LIBRARIES)
def test_shell_command_of_an_engine_matches_its_spec(library):
    spec = EngineSpec(
        library=library,
        targets=("sm86",),
        opt_batch=2,
        max_batch=4,
        workspace_gib=1.5,
        optimization_level=5,
        stripped=True,
        version_compatible=True,
        hardware="ampere_plus",
    )
    source = EngineGraph(serialized=b"", inputs={"x": (3, 8, 8)}, functions=frozenset(), repairs=())
    words = shell_command(Path("g/int8.onnx"), Path("e/int8.plan"), spec, source).split()
    assert words[0] == {"tensorrt": "trtexec", "tensorrt-rtx": "tensorrt_rtx"}[library]
    own = {"tensorrt": "--stronglyTyped", "tensorrt-rtx": "--computeCapabilities=86"}[library]
    assert {
        "--onnx=int8.onnx",
        "--saveEngine=int8.plan",
        "--minShapes=x:1x3x8x8",
        "--optShapes=x:2x3x8x8",
        "--maxShapes=x:4x3x8x8",
        "--builderOptimizationLevel=5",
        "--memPoolSize=workspace:1536M",
        "--stripWeights",
        "--versionCompatible",
        "--hardwareCompatibilityLevel=ampere+",
        own,
    } <= set(words)
