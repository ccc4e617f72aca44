"""Engines that TensorRT-RTX builds without a GPU have the layers that the graph asks for."""

import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from engines_here import COPIES, FP8, FUSED, GATE_UP, INT8, PLUGINS, QKV, SPEC, STORED, WithEngines, run

from medseg_trt.bundles.bundle import load_bundle
from medseg_trt.engines.child import build_in_child
from medseg_trt.engines.fingerprint import read_fingerprint
from medseg_trt.export.graph.gemms import gemms, total_macs
from medseg_trt.export.graph.onnx_graph import OnnxGraph
from medseg_trt.export.tensorrt.build import require_library
from medseg_trt.export.tensorrt.expectations import layer_report
from medseg_trt.export.tensorrt.graph import JOINED, engine_graph
from medseg_trt.export.tensorrt.qkv_order import order_before_split
from medseg_trt.files import sha256
from medseg_trt.inspection.engine import read_layer_report, shares

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'medseg-trt[tensorrt-rtx]'")


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
def test_quantised_fp16_engines_fuse_qkv_gate_up_and_attention(with_engines: WithEngines, precision, expected, asked):
    outcome = with_engines.outcomes(precision)[expected]
    assert (outcome.asked, outcome.failed) == (asked, ())
    assert len(with_engines.outcomes("int8")[FUSED].failed) == 3  # where all else is float32


def test_quantised_fp16_engines_store_nothing_in_float32(with_engines: WithEngines):
    share_of = shares(read_layer_report(with_engines.plan("int8+fp16")).layers)
    assert share_of["Int8"] > 0.9
    assert set(share_of) == {"Int8", "Half"}
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
    command = [
        "build",
        "--ckpt",
        built.checkpoint,
        "--data",
        built.data,
        "--precision",
        "fp8+fp16",
        "--target",
        "sm89",
        "--max-dice-drop",
        "0.05",
        "-o",
        tmp_path / "model.medseg",
    ]
    ran = run(*command)
    assert ran.exit_code == 0, ran.output
    bundle = load_bundle(tmp_path / "model.medseg")
    (engine,) = bundle.content.engines
    outcomes = {outcome.name: outcome for outcome in read_layer_report(bundle.folder / engine.plan).outcomes}
    for name in (FP8, STORED):
        assert outcomes[name].asked > 10
        assert outcomes[name].failed == ()
    assert outcomes[FUSED].failed == outcomes[QKV].failed == outcomes[GATE_UP].failed == ()
    assert set(bundle.content.variants) == {"fp8-fp16"}  # ONNX before opset 19 has no such numbers


def test_fp16_engine_has_no_unexpected_copies(with_engines: WithEngines):
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
def test_changed_builder_log_fails_the_layer_expectation(with_engines: WithEngines, precision, expected, fault):
    graph, text = OnnxGraph(model=ir.load(with_engines.graph(precision))), with_engines.texts[precision]

    def failed(said: str) -> int:
        return len(next(outcome for outcome in layer_report(said, graph).outcomes if outcome.name == expected).failed)

    assert fault(text) != text
    assert failed(fault(text)) > failed(text)


def test_a_builder_that_says_nothing_leaves_an_empty_report(with_engines: WithEngines):
    report = layer_report("", OnnxGraph(model=ir.load(with_engines.graph("fp32"))))
    assert (report.layers, report.outcomes, report.unread) == ((), (), 0)


# Repairs of the graph


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


def test_reordering_before_the_qkv_split_preserves_the_logits(built):
    import onnx
    import onnxruntime

    path = built.bundle / "fp32.onnx"
    model = onnx.load(path)
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.value_info)
    }
    batch = np.random.default_rng(0).standard_normal((3, 3, 32, 32), np.float32)
    outputs = []
    for changes in (0, 2):  # the two ViT layers; q, k and v of the block differ in width and stay
        assert changes == 0 or order_before_split(model.graph, shapes) == changes
        onnx.checker.check_model(model, full_check=True)
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        outputs.append(session.run(None, {"pixel_values": batch})[0])
    np.testing.assert_array_equal(*outputs)
    assert order_before_split(model.graph, shapes) == 0  # nothing is left to change


def test_without_that_order_the_builder_decodes_the_weights(with_engines: WithEngines, tmp_path: Path):
    folder = shutil.copytree(with_engines.bundle.folder, tmp_path / "b", ignore=shutil.ignore_patterns("*.plan"))
    graph = OnnxGraph(model=ir.load(folder / "int8.onnx"))
    for split in [node for node in graph.model.graph if node.op_type == "Split" and len(node.outputs) == 3]:
        identity = ir.node("Identity", [split.outputs[0]], name=f"{split.name}_kept")  # a second reader: no rule fits
        graph.model.graph.insert_after(split, identity)
        identity.outputs[0].name = f"{split.name}_kept_value"
    ir.save(graph.model, folder / "int8.onnx")
    build = build_in_child(folder / "int8.onnx", tmp_path / "a.plan", SPEC, None)
    outcomes = {outcome.name: outcome for outcome in layer_report(build.output.layers, graph).outcomes}
    assert outcomes[INT8].failed_in("vit") == outcomes[INT8].failed != ()
    assert len(outcomes[STORED].failed) == len(outcomes[INT8].failed)


def test_engine_graph_repairs_do_not_modify_the_bundle(with_engines: WithEngines):
    graph = with_engines.graph("fp16")
    before = sha256(graph)
    assert b"softmax_precision" in graph.read_bytes()
    assert b"softmax_precision" not in engine_graph(graph).serialized
    assert sha256(graph) == before
