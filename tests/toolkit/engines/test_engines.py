"""Engines of a bundle, built for real: TensorRT-RTX needs no GPU for that. None of them is ever run here."""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner, Result

from medseg_trt import processes
from medseg_trt.bundles.bundle import MANIFEST, Bundle, load_bundle
from medseg_trt.bundles.manifest import BuiltEngine, FileEntry
from medseg_trt.bundles.signature import signature_of
from medseg_trt.cli import cli
from medseg_trt.engines import build as engines
from medseg_trt.engines import child as engine_child
from medseg_trt.engines.build import build_engines, check_engines, rebuild_engines
from medseg_trt.engines.child import build_in_child
from medseg_trt.engines.fingerprint import metadata_path, read_fingerprint, write_fingerprint
from medseg_trt.errors import ArtefactError, DeviceError, MedsegError, MissingExtraError, UsageError
from medseg_trt.export.engine_layers import LayerReport, Outcome
from medseg_trt.export.graph.gemms import gemms, total_macs
from medseg_trt.export.graph.onnx_graph import OnnxGraph
from medseg_trt.export.tensorrt.build import LIBRARIES, check_engine_spec, dialect_for, require_library, shell_command
from medseg_trt.export.tensorrt.expectations import layer_report
from medseg_trt.export.tensorrt.graph import JOINED, EngineGraph, engine_graph
from medseg_trt.export.tensorrt.qkv_order import order_before_split
from medseg_trt.files import sha256, write_json
from medseg_trt.inspection.engine import inspect_engine, read_layer_report, shares
from medseg_trt.spec import EngineSpec, from_dict, to_dict

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'medseg-trt[tensorrt-rtx]'")

SPEC = EngineSpec(library="tensorrt-rtx", targets=("sm86", "sm89"), max_batch=4)
QKV, GATE_UP, FUSED, INT8, FP8, STORED, COPIES, PLUGINS = (
    "q, k and v are one GEMM", "gate and up are one GEMM", "attention is one kernel", "INT8 GEMMs multiply Int8",
    "FP8 GEMMs multiply FP8",
    "stored weights are decoded inside the GEMM", "no copy or scaling that no node asks for",
    "plugins stand for nodes of domain medseg",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class WithEngines:
    """A bundle with an engine of every precision; do not write to it."""

    bundle: Bundle
    texts: Mapping[str, str]  # of the builder's lists of layers, by precision

    def engine(self, precision: str, *, plugins: bool = False) -> BuiltEngine:
        variants = self.bundle.content.variants
        return next(
            each
            for each in self.bundle.content.engines
            if variants[each.variant].precision == precision and each.spec.plugins == plugins
        )

    def plan(self, precision: str, *, plugins: bool = False) -> Path:
        return self.bundle.folder / self.engine(precision, plugins=plugins).plan

    def graph(self, precision: str) -> Path:
        return self.bundle.folder / self.bundle.content.variants[self.engine(precision).variant].graph

    def outcomes(self, precision: str, *, plugins: bool = False) -> dict[str, Outcome]:
        return {each.name: each for each in read_layer_report(self.plan(precision, plugins=plugins)).outcomes}


@pytest.fixture(scope="session")
def with_engines(built, tmp_path_factory: pytest.TempPathFactory) -> WithEngines:
    """The bundle ``built`` with engines, as a build writes it, and two engines more whose plugins are on."""
    folder = tmp_path_factory.mktemp("engines") / "model.medseg"
    shutil.copytree(built.bundle, folder)
    content, texts = load_bundle(folder).content, dict[str, str]()

    def recorded(graph: Path, plan: Path, spec: EngineSpec, cache: Path | None) -> engine_child.Answer:
        answer = build_in_child(graph, plan, spec, cache)
        texts.setdefault(graph.stem, answer.built.layers)
        return answer

    verified = {execution.variant for execution in content.executions}
    chosen = {name: each for name, each in content.variants.items() if each.precision in ("fp16", "int8", "int8+fp16")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "build_in_child", recorded)
        plain = build_engines(folder, content.variants, verified, SPEC, content.build.precisions)
        custom = build_engines(folder, chosen, verified, replace(SPEC, plugins=True), ["fp16", "int8"])
    assert [line for line in plain.dropped if not line.startswith("bf16")] == []
    seal_again(folder, (*plain.built, *custom.built))
    bundle = load_bundle(folder)
    return WithEngines(bundle=bundle, texts={content.variants[stem].precision: text for stem, text in texts.items()})


def seal_again(folder: Path, built: Sequence[BuiltEngine]) -> None:
    """Let the manifest name the engines, and give digests of all that is in the folder."""
    data = json.loads((folder / MANIFEST).read_text())
    data["engines"] = [to_dict(each) for each in built]
    data["files"] = {
        path.relative_to(folder).as_posix(): to_dict(FileEntry(sha256=sha256(path), bytes=path.stat().st_size))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (MANIFEST, signature_of(folder / MANIFEST).name)
    }
    write_json(folder / MANIFEST, data)


@pytest.fixture
def copied(with_engines: WithEngines, tmp_path: Path) -> Bundle:
    """A copy that may be changed."""
    return load_bundle(shutil.copytree(with_engines.bundle.folder, tmp_path / "model.medseg"))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(each) for each in arguments])


# What a build writes


def test_every_precision_has_an_engine_with_a_fingerprint(with_engines: WithEngines):
    content = with_engines.bundle.content
    precisions = [content.variants[each.variant].precision for each in content.engines if not each.spec.plugins]
    assert sorted(precisions) == sorted({variant.precision for variant in content.variants.values()})
    assert any("w8a16" in each for each in precisions)
    assert "w4a16" in precisions
    for engine in content.engines:
        plan = with_engines.bundle.folder / engine.plan
        found, variant = read_fingerprint(plan), content.variants[engine.variant]
        assert (found.sha256, found.bytes) == (sha256(plan), plan.stat().st_size)
        assert (found.library, found.version, found.cuda) == ("tensorrt-rtx", "1.7.1.116", "13")
        assert (found.targets, found.batch, found.gpu) == (("sm86", "sm89"), (1, 1, 4), None)
        assert (found.graph, found.graph_sha256) == (variant.graph, content.files[variant.graph].sha256)
        assert found.weights_sha256 == content.files[variant.weights].sha256
        assert not engine.executed
        assert engine.peak_resident_mb > 50


def test_the_table_says_that_no_engine_has_run(with_engines: WithEngines):
    header, rows = with_engines.bundle.engine_table()
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
        build_in_child(with_engines.graph("int8"), plan, replace(SPEC, max_batch=1), None)
    assert plans[0].read_bytes() == plans[1].read_bytes()
    assert plans[0].read_bytes() != with_engines.plan("int8").read_bytes()


# What the layers are


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "w4a16"])
def test_the_layers_do_all_multiply_accumulates_of_the_graph(with_engines: WithEngines, precision):
    report = read_layer_report(with_engines.plan(precision))
    total = total_macs(OnnxGraph(model=ir.load(with_engines.graph(precision))))
    assert sum(layer.macs for layer in report.layers) == pytest.approx(total, rel=1e-4)  # shares are rounded down
    assert report.unread == 0


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "w4a16"])
@pytest.mark.parametrize(("expected", "asked"), [(QKV, 3), (GATE_UP, 1)])  # two ViT layers and the LLaMA block
def test_the_block_and_the_vit_multiply_once_for_q_k_v_and_once_for_gate_and_up(
    with_engines: WithEngines, precision, expected, asked
):
    outcome = with_engines.outcomes(precision)[expected]
    assert (outcome.asked, outcome.failed) == (asked, ())


def test_attention_in_16_bits_is_one_kernel_in_the_block_and_the_vit(with_engines: WithEngines):
    outcome = with_engines.outcomes("fp16")[FUSED]
    assert (outcome.asked, outcome.failed) == (3, ())
    assert len(with_engines.outcomes("fp32")[FUSED].failed) == 3  # there is no such kernel for float32


@pytest.mark.parametrize("precision", ["int8+fp16", "w8a16+fp16"])
@pytest.mark.parametrize(("expected", "asked"), [(QKV, 3), (GATE_UP, 1), (FUSED, 3)])
def test_codes_and_16_bits_fuse_the_block_and_the_vit(with_engines: WithEngines, precision, expected, asked):
    outcome = with_engines.outcomes(precision)[expected]
    assert (outcome.asked, outcome.failed) == (asked, ())
    assert len(with_engines.outcomes("int8")[FUSED].failed) == 3  # where all else is float32


def test_codes_and_16_bits_leave_nothing_in_float32(with_engines: WithEngines):
    found = shares(read_layer_report(with_engines.plan("int8+fp16")).layers)
    assert found["Int8"] > 0.9
    assert set(found) == {"Int8", "Half"}
    assert with_engines.outcomes("int8+fp16")[INT8].failed == with_engines.outcomes("int8+fp16")[STORED].failed == ()
    assert with_engines.outcomes("w8a16+fp16")[STORED].asked > 4
    assert with_engines.outcomes("w8a16+fp16")[STORED].failed == ()


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", "Half"), ("int8", "Int8"), ("int8+fp16", "Int8")])
def test_the_decoder_multiplies_in_the_type_that_was_asked_for(with_engines: WithEngines, precision, dtype):
    graph = OnnxGraph(model=ir.load(with_engines.graph(precision)))
    asked = [gemm.name for gemm in gemms(graph) if gemm.part == "decoder"]
    layers = [layer for layer in read_layer_report(with_engines.plan(precision)).layers if layer.part == "decoder"]
    products = [layer for layer in layers if layer.is_product]
    assert len(asked) == len([name for layer in products for name in layer.nodes if name in asked]) > 4
    assert {layer.dtype for layer in products} == {dtype}


def test_fp8_reaches_the_products_of_the_transformers(built, in_process, tmp_path: Path):
    command = ["build", "--ckpt", built.checkpoint, "--data", built.data, "--precision", "fp8+fp16", "--target", "sm89",
               "--max-dice-drop", "0.05", "-o", tmp_path / "model.medseg"]  # fmt: skip
    ran = run(*command)
    assert ran.exit_code == 0, ran.output
    bundle = load_bundle(tmp_path / "model.medseg")
    (engine,) = bundle.content.engines
    outcomes = {each.name: each for each in read_layer_report(bundle.folder / engine.plan).outcomes}
    for name in (FP8, STORED):
        assert outcomes[name].asked > 10
        assert outcomes[name].failed == ()
    assert outcomes[FUSED].failed == outcomes[QKV].failed == outcomes[GATE_UP].failed == ()
    assert set(bundle.content.variants) == {"fp8-fp16"}  # ONNX before opset 19 has no such numbers


def test_in_16_bits_no_kernel_moves_anything_unasked(with_engines: WithEngines):
    assert with_engines.outcomes("fp16")[COPIES].failed == ()


def test_int8_reaches_every_product(with_engines: WithEngines):
    outcome = with_engines.outcomes("int8")[INT8]
    assert outcome.asked > 30
    assert outcome.failed == with_engines.outcomes("int8")[STORED].failed == ()
    assert shares(read_layer_report(with_engines.plan("int8")).layers)["Int8"] > 0.9


def test_eight_bit_weights_are_decoded_inside_the_product(with_engines: WithEngines):
    mix = next(name for name in with_engines.texts if "w8a16" in name)
    assert with_engines.outcomes(mix)[STORED].failed_in("block") == ()
    assert with_engines.outcomes(mix)[STORED].asked > 4


def test_plugins_show_as_custom_layers_and_in_the_fingerprint(with_engines: WithEngines):
    on = read_layer_report(with_engines.plan("fp16", plugins=True))
    custom = [layer for layer in on.layers if layer.kind == "custom_layer"]
    assert {layer.nodes[0].partition("_")[0] for layer in custom} == {"AddRMSNorm", "SwiGLU"}
    assert with_engines.outcomes("fp16", plugins=True)[PLUGINS].asked == len(custom)
    assert set(read_fingerprint(with_engines.plan("fp16", plugins=True)).plugins) == {"AddRMSNorm", "SwiGLU"}
    assert not any(layer.kind == "custom_layer" for layer in read_layer_report(with_engines.plan("fp16")).layers)
    assert read_fingerprint(with_engines.plan("fp16")).plugins == {}


def test_plugins_before_int8_products_write_the_int8_themselves(with_engines: WithEngines):
    on = read_layer_report(with_engines.plan("int8", plugins=True))
    custom = [layer for layer in on.layers if layer.kind == "custom_layer"]
    assert custom
    assert all(layer.outputs[0].dtype == "Int8" for layer in custom)
    assert with_engines.outcomes("int8", plugins=True)[PLUGINS].asked == len(custom)
    assert with_engines.outcomes("int8", plugins=True)[PLUGINS].failed == ()
    assert any(
        repair.endswith(JOINED)
        for repair in read_fingerprint(with_engines.plan("int8", plugins=True)).options["repairs"]
    )
    assert not any(layer.kind == "custom_layer" for layer in read_layer_report(with_engines.plan("int8")).layers)


def _twice(text: str, name: str) -> str:
    """Say that a product became two kernels."""
    line = next(line for line in text.splitlines() if f"[ONNX Layer: {name}]" in line and "LayerType: gemm" in line)
    return text.replace(line, f"{line}\n{line.replace('Name: ', 'Name: other_', 1)}")


@pytest.mark.parametrize(
    ("precision", "expected", "fault"),
    [
        ("fp16", QKV, lambda text: _twice(text, "node_linear_8")),
        ("fp16", GATE_UP, lambda text: _twice(text, "node_linear_11")),
        ("fp16", FUSED, lambda text: text.replace("_gemm_mha", "_gemm")),
        ("int8", INT8, lambda text: text.replace("Datatype: Int8", "Datatype: Float")),
        ("fp16", COPIES, lambda text: text.replace("[ONNX Layer: Cast_logits]", "")),
        ("fp16", QKV, lambda text: text.replace("[ONNX Layer: node_linear_8]", "")),
    ],
)
def test_an_engine_of_another_kind_is_noticed(with_engines: WithEngines, precision, expected, fault):
    graph, text = OnnxGraph(model=ir.load(with_engines.graph(precision))), with_engines.texts[precision]

    def failed(said: str) -> int:
        return len(next(each for each in layer_report(said, graph).outcomes if each.name == expected).failed)

    assert fault(text) != text
    assert failed(fault(text)) > failed(text)


def test_a_builder_that_says_nothing_leaves_an_empty_report(with_engines: WithEngines):
    report = layer_report("", OnnxGraph(model=ir.load(with_engines.graph("fp32"))))
    assert (report.layers, report.outcomes, report.unread) == ((), (), 0)


# What is refused, and what is repaired


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_graph_that_is_not_repaired_is_refused_by_the_library(with_engines: WithEngines, precision):
    trt = require_library("tensorrt-rtx")
    graph = with_engines.graph(precision)
    assert len(engine_graph(graph).repairs) == 2
    builder = trt.Builder(trt.Logger(trt.Logger.INTERNAL_ERROR))
    network = builder.create_network(0)
    parsed = trt.OnnxParser(network, builder.logger).parse(graph.read_bytes(), str(graph))
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    profile = builder.create_optimization_profile()
    profile.set_shape("pixel_values", (1, 3, 32, 32), (1, 3, 32, 32), (4, 3, 32, 32))
    config.add_optimization_profile(profile)
    assert not parsed or builder.build_serialized_network(network, config) is None


def test_q_k_and_v_in_another_order_are_the_same_numbers(built):
    import onnx
    import onnxruntime

    path = built.bundle / "fp32.onnx"
    model = onnx.load(path)
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.value_info)
    }
    batch = np.random.default_rng(0).standard_normal((3, 3, 32, 32), np.float32)
    answers = []
    for changes in (0, 2):  # the two ViT layers; q, k and v of the block differ in width and stay
        assert changes == 0 or order_before_split(model.graph, shapes) == changes
        onnx.checker.check_model(model, full_check=True)
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        answers.append(session.run(None, {"pixel_values": batch})[0])
    np.testing.assert_array_equal(*answers)
    assert order_before_split(model.graph, shapes) == 0  # nothing is left to change


def test_without_that_order_the_builder_decodes_the_weights(with_engines: WithEngines, tmp_path: Path):
    folder = shutil.copytree(with_engines.bundle.folder, tmp_path / "b", ignore=shutil.ignore_patterns("*.plan"))
    graph = OnnxGraph(model=ir.load(folder / "int8.onnx"))
    for split in [node for node in graph.model.graph if node.op_type == "Split" and len(node.outputs) == 3]:
        identity = ir.node("Identity", [split.outputs[0]], name=f"{split.name}_kept")  # a second reader: no rule fits
        graph.model.graph.insert_after(split, identity)
        identity.outputs[0].name = f"{split.name}_kept_value"
    ir.save(graph.model, folder / "int8.onnx")
    built = build_in_child(folder / "int8.onnx", tmp_path / "a.plan", SPEC, None).built
    outcomes = {each.name: each for each in layer_report(built.layers, graph).outcomes}
    assert outcomes[INT8].failed_in("vit") == outcomes[INT8].failed != ()
    assert len(outcomes[STORED].failed) == len(outcomes[INT8].failed)


def test_the_repairs_leave_the_bundle_as_it_is(with_engines: WithEngines):
    graph = with_engines.graph("fp16")
    before = sha256(graph)
    assert b"softmax_precision" in graph.read_bytes()
    assert b"softmax_precision" not in engine_graph(graph).serialized
    assert sha256(graph) == before


def test_float32_products_on_sm75_are_explained(with_engines: WithEngines, tmp_path: Path):
    with pytest.raises(MedsegError, match=r"sm75 multiplies no float32.*--precision fp16"):
        build_in_child(with_engines.graph("fp32"), tmp_path / "a.plan", replace(SPEC, targets=("sm75",)), None)
    assert list(tmp_path.iterdir()) == []


def test_one_engine_that_fails_leaves_the_others(with_engines: WithEngines, tmp_path: Path, caplog):
    folder = shutil.copytree(with_engines.bundle.folder, tmp_path / "b", ignore=shutil.ignore_patterns("engines"))
    variants = {name: with_engines.bundle.content.variants[name] for name in ("fp32", "fp16")}
    found = build_engines(folder, variants, set(variants), replace(SPEC, targets=("sm75",)), variants)
    assert [each.variant for each in found.built] == ["fp16"]
    (line,) = found.dropped
    assert line.startswith("fp32 engine: ")
    assert "sm75 multiplies no float32" in line
    unverified = build_engines(folder, variants, set(), SPEC, variants)
    assert unverified.built == ()
    assert all("no back-end has verified its graph" in line for line in unverified.dropped)


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
        (["--target", "sm86", "--outputs", "mask"], 2, "--outputs logits"),
        (["--target", "sm86", "--version-compatible"], 2, "no version compatible option"),
        (["--target", "sm86", "--hardware-compatible", "ampere_plus"], 2, "no hardware option"),
        (["--target", "sm86", "--backend", "openvino"], 2, "builds no engines"),
        (["--target", "sm86,sm86", "--opt-batch", "9"], 2, "ascending"),
        (["--target", "sm86", "--backend", "tensorrt"], 6, "pip install 'medseg-trt[tensorrt]'"),
        (["--backend", "tensorrt-rtx"], 6, "--target sm86"),
    ],
)
def test_what_cannot_be_built_is_refused_at_once(built, arguments, code, words, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr("medseg_trt.engines.gpu.find_gpu", lambda: None)
    result = run("build", "--ckpt", built.checkpoint, *arguments)
    error = result.exception
    assert isinstance(error, MedsegError)
    assert error.exit_code == code
    assert words in str(error)


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
    ("library", "version", "flavour"),
    [
        ("tensorrt", "10.3.0", "plain"), ("tensorrt", "10.14.1.48", "plain"), ("tensorrt", "10.15.1", "canonical"),
        ("tensorrt", "11.4.0", "canonical"), ("tensorrt-rtx", "1.7.1.116", "canonical"),
    ],
)  # fmt: skip
def test_older_parsers_get_the_plain_graph(library, version, flavour):
    assert dialect_for(library, version) == flavour


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_command_line_says_the_same(library):
    spec = EngineSpec(
        library=library, targets=("sm86",), opt_batch=2, max_batch=4, workspace_gib=1.5, optimization_level=5,
        stripped=True, version_compatible=True, hardware="ampere_plus",
    )  # fmt: skip
    source = EngineGraph(serialized=b"", inputs={"x": (3, 8, 8)}, functions=frozenset(), repairs=())
    words = shell_command(Path("g/int8.onnx"), Path("e/int8.plan"), spec, source).split()
    assert words[0] == {"tensorrt": "trtexec", "tensorrt-rtx": "tensorrt_rtx"}[library]
    own = {"tensorrt": "--stronglyTyped", "tensorrt-rtx": "--computeCapabilities=86"}[library]
    assert {"--onnx=int8.onnx", "--saveEngine=int8.plan", "--minShapes=x:1x3x8x8", "--optShapes=x:2x3x8x8",
            "--maxShapes=x:4x3x8x8", "--builderOptimizationLevel=5", "--memPoolSize=workspace:1536M", "--stripWeights",
            "--versionCompatible", "--hardwareCompatibilityLevel=ampere+", own} <= set(words)  # fmt: skip


# inspect and rebuild


def test_inspect_shows_layers_expectations_and_fingerprint(with_engines: WithEngines, tmp_path: Path):
    plan, picture = with_engines.plan("int8"), tmp_path / "layers.svg"
    result = run("inspect", plan, "--picture", picture)
    assert result.exit_code == 0, result.output
    assert all(word in result.output for word in ("Int8", "attention is one", "state: intact", "multiply-accumulates:"))
    boxes = [
        each
        for each in ElementTree.parse(picture).iter("{http://www.w3.org/2000/svg}rect")
        if each.find("*") is not None
    ]
    report = read_layer_report(plan)
    assert len(boxes) == len(report.layers)
    assert {box.get("fill") for box in boxes} >= {"#E69F00", "#999999"}  # Int8, Float
    found = json.loads(run("inspect", plan, "--json").output)
    assert from_dict(LayerReport, found["report"], "json") == report
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
    stale = next(each for each in copied.content.engines if each.variant == "fp16" and not each.spec.plugins)
    plan = copied.folder / stale.plan
    write_fingerprint(replace(read_fingerprint(plan), version="1.6.0"), plan.parent)
    seal_again(copied.folder, copied.content.engines)
    result = run("infer", images / "case0.png", "--bundle", copied.folder, "-o", tmp_path / "masks", "--rebuild")
    assert result.exit_code == 0, result.output
    after = load_bundle(copied.folder)
    (fresh,) = [each for each in after.content.engines if each not in copied.content.engines]
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

    def interrupted(graph: Path, plan: Path, spec: EngineSpec, cache: Path | None) -> engine_child.Answer:
        plan.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(engines, "build_in_child", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rebuild_engines(before)
    assert load_bundle(copied.folder).content == before.content


def test_a_bundle_without_engines_has_none_to_build_again(built):
    with pytest.raises(UsageError, match="--target"):
        rebuild_engines(load_bundle(built.bundle))


def test_check_engines_takes_what_can_be_built():
    check_engines(SPEC, "logits", ["fp16", "int8"])
