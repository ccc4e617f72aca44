import copy
import importlib
from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from processor import NO_EXACT_BYTE_PRODUCTS, saturates_byte_products
from tiny import make_checkpoint, picture
from torch.utils.flop_counter import FlopCounterMode

from medseg_trt.errors import UsageError
from medseg_trt.export.fold.fold import fold
from medseg_trt.export.graph.dialects import DIALECTS, plain
from medseg_trt.export.graph.fusions.fuse import fuse
from medseg_trt.export.graph.gemms import PART_NAMES, gemms, total_macs
from medseg_trt.export.graph.save import save_graphs
from medseg_trt.export.graph.trace import INPUT, OnnxGraph, check, trace
from medseg_trt.export.precision.calibrate import Calibration, calibrate, observed_graph
from medseg_trt.export.precision.quantize import (
    QUANT_FORMATS,
    SCHEMES,
    gemm_precisions,
    int8_share,
    needs_calibration,
    parse_precision,
    quantisation_parameters,
    quantise,
    to_int8,
    values_to_calibrate,
)
from medseg_trt.export.precision.weight_only import FP8_MAX, per_channel_fp8
from medseg_trt.train.checkpoint import load_checkpoint

SIZE = (32, 48)
IMAGES = np.stack([np.repeat(picture(seed, SIZE)[0][None] / 255, 3, axis=0) for seed in range(8)]).astype(np.float32)
INT8, FP8 = parse_precision("int8"), parse_precision("fp8")
# Random weights: 40.8 dB seen. Activations or weights that are scaled four or two and a half times too large leave 26.
MIN_SQNR_DB_FP8 = 36.0
# Random weights: 25.0, 28.4 and 26.1 dB seen. Every fault below, of one GEMM in uint8, leaves 24 dB or less.
MIN_SQNR_DB = {"int8": 24.0, "uint8": 27.0, "uint8_outputs": 25.0}


@pytest.fixture(scope="module")
def folded(tmp_path_factory):
    return fold(load_checkpoint(make_checkpoint(tmp_path_factory.mktemp("model"), size=SIZE)).model())[0]


@pytest.fixture(scope="module")
def graph(folded) -> OnnxGraph:
    return fuse(trace(folded))[0]


@pytest.fixture(scope="module")
def calibration(graph, tmp_path_factory) -> Calibration:
    names = values_to_calibrate(graph, INT8)
    observed = opened(observed_graph(graph, names), tmp_path_factory.mktemp("observed"))
    return calibrate(lambda batch: outputs(observed, batch), IMAGES, names)


@pytest.fixture(scope="module")
def exact(graph, tmp_path_factory) -> np.ndarray:
    return logits(graph, tmp_path_factory.mktemp("float"))


def opened(graph: OnnxGraph, folder, optimised=None) -> onnxruntime.InferenceSession:
    """Open a graph as it is written, or optimised by ONNX Runtime and then written to ``optimised``."""
    save_graphs({"graph.onnx": graph}, folder, "weights.bin")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if optimised is None:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    else:
        options.optimized_model_filepath = str(optimised)
    return onnxruntime.InferenceSession(folder / "graph.onnx", options, providers=["CPUExecutionProvider"])


def outputs(session: onnxruntime.InferenceSession, batch: np.ndarray) -> dict[str, np.ndarray]:
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, map(np.asarray, session.run(names, {INPUT: batch})), strict=True))


def logits(graph: OnnxGraph, folder) -> np.ndarray:
    return outputs(opened(graph, folder), IMAGES)["logits"]


def sqnr_db(exact: np.ndarray, answer: np.ndarray) -> float:
    """Return the signal's power over that of the error, in decibels."""
    reference = exact.astype(np.float64)
    return float(10 * np.log10(np.square(reference).sum() / np.square(answer - reference).sum()))


def names(graph: OnnxGraph) -> set[str]:
    return {gemm.name for gemm in gemms(graph)}


def test_total_macs_of_the_graph_equals_the_flop_counter_of_pytorch(graph, folded):
    shapes = copy.deepcopy(folded).to("meta")  # on the CPU, attention is one operator that PyTorch does not count
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        shapes(torch.zeros(1, 3, *SIZE, device="meta"))
    assert total_macs(graph) == counter.get_total_flops() // 2  # a multiplication and an addition are two to PyTorch
    gemm_by_name = gemms(graph)
    assert {gemm.part for gemm in gemm_by_name} == set(PART_NAMES)
    assert len({gemm.name for gemm in gemm_by_name}) == len(gemm_by_name)
    products = [node for node in graph.model.graph if node.op_type in ("MatMul", "Conv")]
    assert len(gemm_by_name) == len(products)
    assert 0 < sum(gemm.macs for gemm in gemm_by_name) < total_macs(graph)  # the rest is attention's


@pytest.mark.parametrize("form", QUANT_FORMATS)
def test_int8_quantisation_reaches_the_minimum_sqnr_and_int8_share(graph, calibration, exact, form, tmp_path):
    quantised = quantise(graph, INT8, calibration, quant_format=form)
    assert sqnr_db(exact, logits(quantised, tmp_path)) > MIN_SQNR_DB[form]
    assert set(gemm_precisions(quantised).values()) == {"int8"}
    assert int8_share(quantised) > 0.8
    assert int8_share(quantised) == pytest.approx(
        sum(gemm.macs for gemm in gemms(graph)) / total_macs(graph)
    )  # no product was lost on the way
    check(quantised, SIZE, 3, opsets=DIALECTS["canonical"].opsets)


def test_fp8_reaches_the_minimum_sqnr_and_applies_to_vit_and_block_only(graph, calibration, exact, tmp_path):
    quantised = quantise(graph, FP8, calibration)
    precisions = gemm_precisions(quantised)
    by_part = {gemm.part: precisions[gemm.name] for gemm in gemms(quantised)}
    assert by_part == {"resnet": "fp32", "vit": "fp8", "block": "fp8", "decoder": "fp32"}
    assert sqnr_db(exact, logits(quantised, tmp_path)) > MIN_SQNR_DB_FP8
    check(quantised, SIZE, 3, opsets=DIALECTS["canonical"].opsets)


def test_weights_in_fp8_are_off_by_half_a_step_of_three_bits_at_most(graph):
    gemm = next(gemm for gemm in gemms(graph) if gemm.part == "vit" and gemm.output_axis == 1)
    weight = np.random.default_rng(0).standard_normal(gemm.weight_shape).astype(np.float32)
    weight[:, 0] = 0
    quantised_weight = per_channel_fp8(weight, gemm)
    codes, smallest = (
        quantised_weight.values.astype(np.float32),
        quantised_weight.scales * 2.0**-10,
    )  # half of e4m3's smallest step, 2^-9
    error = np.abs(quantised_weight.dequantised() - weight)
    assert (error <= np.maximum(np.abs(weight) * 2.0**-4, smallest) * (1 + 1e-6)).all()
    assert (np.abs(codes).max(axis=0)[1:] == FP8_MAX).all()  # a channel uses the whole range, and nothing overflows
    assert (codes[:, 0] == 0).all()


@pytest.mark.parametrize("text", ["resnet=fp8", "vit=fp8,decoder=fp8+fp16"])
def test_convolutions_in_fp8_are_refused(text):
    with pytest.raises(UsageError, match="is for the vit and the block; choose another precision for"):
        parse_precision(text)


@pytest.mark.parametrize("form", QUANT_FORMATS)
def test_a_value_is_rounded_once_and_biases_are_not(graph, calibration, form):
    quantised = quantise(graph, INT8, calibration, quant_format=form).model.graph
    rounded = [node.inputs[0] for node in quantised if node.op_type == "QuantizeLinear"]
    assert len({value.name for value in rounded if value is not None}) == len(rounded)
    activations = {gemm.activation for gemm in gemms(graph)}
    if form == "uint8_outputs":
        assert len(rounded) > len(activations)
    else:
        assert {value.name for value in rounded if value is not None} == activations
    decoded = [node.inputs[0] for node in quantised if node.op_type == "DequantizeLinear"]
    types = Counter(value.dtype for value in decoded if value is not None)
    codes = ir.DataType.INT8 if form == "int8" else ir.DataType.UINT8
    assert types.keys() == {ir.DataType.INT8, codes}
    for node in quantised:
        if node.op_type == "Conv" and len(node.inputs) > 2:
            bias = node.inputs[2]
            assert bias is not None
            assert bias.is_initializer()
            assert bias.dtype == ir.DataType.FLOAT


def test_all_formats_hold_the_same_weight_bytes(graph, calibration, tmp_path):
    forms = {f"{form}.onnx": quantise(graph, INT8, calibration, quant_format=form) for form in QUANT_FORMATS}
    save_graphs({"int8.onnx": forms["int8.onnx"]}, tmp_path, "one.bin")
    save_graphs({f"all-{name}": graph for name, graph in forms.items()}, tmp_path, "all.bin")
    assert (tmp_path / "all.bin").read_bytes() == (tmp_path / "one.bin").read_bytes()
    floats = sum(value.const_value.nbytes for value in graph.model.graph.initializers.values() if value.const_value)
    assert (tmp_path / "all.bin").stat().st_size < 0.5 * floats


@pytest.mark.parametrize("form", ["int8", "uint8"])
def test_the_arithmetic_is_that_of_a_float64_oracle(graph, calibration, form, tmp_path):
    chosen = [next(gemm for gemm in gemms(graph) if gemm.op_type == kind) for kind in ("MatMul", "Conv")]
    for gemm in chosen:
        quantised = to_int8(graph, [gemm.name], calibration, form)
        watched = [gemm.activation, f"{gemm.activation}_rounded", gemm.output]
        folder = tmp_path / gemm.op_type
        folder.mkdir()
        seen = {INPUT: IMAGES} | outputs(opened(observed_graph(quantised, watched), folder), IMAGES)
        codes = QUANT_FORMATS[form].activation_type
        scale, zero = quantisation_parameters(calibration.ranges[gemm.activation], codes)
        info = np.iinfo(codes)
        # ONNX divides in float32; a quotient within 1e-4 of a tie may go either way.
        quotient = seen[gemm.activation].astype(np.float64) / float(scale)
        expected = ((np.rint(quotient) + zero).clip(info.min, info.max) - float(zero)) * float(scale)
        clear = np.abs(np.abs(quotient - np.floor(quotient)) - 0.5) > 1e-4
        rounded = seen[f"{gemm.activation}_rounded"]
        np.testing.assert_allclose(rounded[clear], expected[clear], rtol=1e-6, atol=1e-12)
        assert clear.mean() > 0.99
        if gemm.op_type == "MatMul":
            value = graph.model.graph.initializers[gemm.weight].const_value
            assert value is not None
            weight = value.numpy().astype(np.float64)
            steps = np.abs(weight).max(axis=0) / 127
            product = rounded.astype(np.float64) @ (np.rint(weight / steps) * steps)
            np.testing.assert_allclose(seen[gemm.output], product, atol=1e-5 * np.abs(product).max())


def test_onnx_runtime_computes_every_gemm_but_the_last_in_integers(graph, calibration, exact, tmp_path):
    quantised = quantise(graph, INT8, calibration, quant_format="uint8_outputs")
    session = opened(quantised, tmp_path, tmp_path / "optimised.onnx")
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
    wanted = Counter(gemm.op_type for gemm in gemms(graph))
    assert kinds["MatMulIntegerToFloat"] == wanted["MatMul"]
    assert kinds["QLinearConv"] == wanted["Conv"] - 1  # the head makes the logits, which are not rounded
    if saturates_byte_products():
        pytest.skip(NO_EXACT_BYTE_PRODUCTS)
    assert sqnr_db(exact, outputs(session, IMAGES)["logits"]) > MIN_SQNR_DB["uint8_outputs"]


def test_openvino_computes_every_gemm_in_integers(graph, calibration, exact, tmp_path):
    openvino = pytest.importorskip("openvino")
    save_graphs(
        {"plain.onnx": plain(quantise(graph, INT8, calibration, quant_format="uint8"))}, tmp_path, "weights.bin"
    )
    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = core.compile_model(core.read_model(tmp_path / "plain.onnx"), "CPU", settings)
    counts = Counter[str]()
    for operation in compiled.get_runtime_model().get_ops():
        said = operation.get_rt_info()
        kind, precision = (str(said[key].value) if key in said else "" for key in ("layerType", "runtimePrecision"))
        if kind in ("Convolution", "FullyConnected"):
            counts[f"{kind} {precision}"] += 1
    wanted = Counter(gemm.op_type for gemm in gemms(graph))
    assert counts == {"Convolution u8": wanted["Conv"], "FullyConnected u8": wanted["MatMul"]}
    if saturates_byte_products():
        pytest.skip(NO_EXACT_BYTE_PRODUCTS)
    assert sqnr_db(exact, compiled(IMAGES)[0]) > MIN_SQNR_DB["uint8"]


def test_tensorrt_rtx_builds_the_symmetric_format(graph, calibration, tmp_path):
    trt = pytest.importorskip("tensorrt_rtx")
    save_graphs({"int8.onnx": plain(quantise(graph, INT8, calibration, quant_format="int8"))}, tmp_path, "weights.bin")
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR))
    assert parser.parse_from_file(str(tmp_path / "int8.onnx")), parser.get_error(0).desc()
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    profile.set_shape(INPUT, *((batch, 3, *SIZE) for batch in (1, 1, 4)))
    config.add_optimization_profile(profile)
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    assert builder.build_serialized_network(network, config) is not None


def scaled(calibration: Calibration, name: str, factor: float) -> Calibration:
    """Return a calibration with one stale range."""
    old = calibration.ranges[name]
    new = replace(old, low=old.low * factor, high=old.high * factor, bound=old.bound * factor)
    return replace(calibration, ranges={**calibration.ranges, name: new})


def stale_scale(graph: OnnxGraph, calibration: Calibration) -> OnnxGraph:
    last = gemms(graph)[-1].activation
    return quantise(graph, INT8, scaled(calibration, last, 0.2), quant_format="uint8")


def dropped_zero_point(graph: OnnxGraph, calibration: Calibration) -> OnnxGraph:
    broken = quantise(graph, INT8, calibration, quant_format="uint8")
    first = next(gemm.activation for gemm in gemms(graph) if gemm.part == "block")
    value = broken.model.graph.initializers[f"{first}_zero_point"]
    value.const_value = ir.tensor(np.zeros((), np.uint8), name=value.name)
    return broken


def transposed_weight(graph: OnnxGraph, calibration: Calibration) -> OnnxGraph:
    broken = quantise(graph, INT8, calibration, quant_format="uint8")
    square = next(g for g in reversed(gemms(broken)) if g.op_type == "MatMul" and len({*g.weight_shape}) == 1)
    value = broken.model.graph.initializers[square.weight]
    assert value.const_value is not None
    value.const_value = ir.tensor(np.ascontiguousarray(value.const_value.numpy().T), name=value.name)
    return broken


def wrong_channel_axis(graph: OnnxGraph, calibration: Calibration) -> OnnxGraph:
    broken = quantise(graph, INT8, calibration, quant_format="uint8")
    square = next(g for g in reversed(gemms(broken)) if g.op_type == "Conv" and g.weight_shape[0] == g.weight_shape[1])
    (node,) = (use.node for use in broken.model.graph.initializers[square.weight].uses())
    node.attributes["axis"] = ir.AttrInt64("axis", 1)
    return broken


@pytest.mark.parametrize("fault", [stale_scale, dropped_zero_point, transposed_weight, wrong_channel_axis])
def test_quantisation_fault_falls_below_the_minimum_sqnr(graph, calibration, exact, fault, tmp_path):
    assert sqnr_db(exact, logits(fault(graph, calibration), tmp_path)) < MIN_SQNR_DB["uint8"] - 2


def test_kept_gemms_stay_float_and_lower_the_int8_share(graph, calibration, exact, tmp_path):
    largest = max(gemms(graph), key=lambda gemm: gemm.macs)
    mixed = quantise(graph, INT8, calibration, keep_float=[largest.name])
    precisions = gemm_precisions(mixed)
    assert {name for name, precision in precisions.items() if precision != "int8"} == {largest.name}
    lost = int8_share(quantise(graph, INT8, calibration)) - int8_share(mixed)
    assert lost == pytest.approx(largest.macs / total_macs(graph))
    assert quantise(graph, INT8, calibration, keep_float=names(graph)).num_nodes == graph.num_nodes


def test_parts_can_have_precisions_of_their_own(graph, calibration, exact, tmp_path):
    wanted = parse_precision("vit=int8, block=w8a16,decoder=fp16")
    assert wanted == {"resnet": "fp32", "vit": "int8", "block": "w8a16", "decoder": "fp16"}
    mixed = quantise(graph, wanted, calibration, quant_format="uint8")
    precisions = gemm_precisions(mixed)
    assert {(gemm.part, precisions[gemm.name]) for gemm in gemms(mixed)} == set(wanted.items())
    assert sqnr_db(exact, logits(mixed, tmp_path)) > MIN_SQNR_DB["uint8"]


def test_a_precision_without_parts_applies_to_the_network_and_weight_only_schemes_to_the_block():
    assert set(parse_precision("int8").values()) == {"int8"}
    assert set(parse_precision("fp32").values()) == {"fp32"}
    assert parse_precision("w4a16") == {"resnet": "fp32", "vit": "fp32", "block": "w4a16", "decoder": "fp32"}
    assert [name for name in SCHEMES if needs_calibration(parse_precision(name))] == ["int8", "fp8"]
    assert needs_calibration(parse_precision("decoder=int8"))


def test_the_scheme_after_a_plus_applies_to_everything_else():
    assert set(parse_precision("int8+fp16").values()) == {"int8+fp16"}
    rest = {"resnet": "fp16", "vit": "fp16", "decoder": "fp16"}
    assert parse_precision("w8a16+fp16") == {**rest, "block": "w8a16+fp16"}
    assert parse_precision("vit=w4a16+fp16") == {**dict.fromkeys(PART_NAMES, "fp32"), "vit": "w4a16+fp16"}
    assert needs_calibration(parse_precision("decoder=int8+fp16"))
    assert not needs_calibration(parse_precision("w8a16+fp16"))


def test_of_int8_and_fp16_a_gemm_kept_float_is_in_fp16_and_one_kept_wide_is_in_int8(graph, calibration):
    """Of ``int8+fp16``, a layer that must not be coded is in fp16, and one that fp16 does not hold still has codes."""
    first, second, *_ = [gemm.name for gemm in gemms(graph) if gemm.part == "vit"]
    mixed = quantise(graph, parse_precision("int8+fp16"), calibration, keep_float=[first], keep_wide=[second])
    precisions = gemm_precisions(mixed)
    assert (precisions[first], precisions[second]) == ("fp16", "int8")
    nodes = {node.name: node for node in mixed.model.graph}
    assert nodes[first].outputs[0].dtype == ir.DataType.FLOAT16
    assert nodes[second].outputs[0].dtype == ir.DataType.FLOAT
    assert set(precisions.values()) == {"int8", "fp16"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int8+int8", r"precision is called 'int8\+int8'"),
        ("fp16+fp16", r"precision is called 'fp16\+fp16'"),
        ("int4", "precision is called 'int4'; choose one of: fp32, int8, fp8, w8a16, w4a16, fp16, bf16"),
        ("vit=int7", "precision is called 'int7'"),
        ("tail=int8", "part of the network is called 'tail'; choose one of: resnet, vit, block, decoder"),
        ("vit=int8,vit=fp16", "names vit twice"),
        ("vit=int8,", "part of the network is called ''"),
        ("", "precision is called ''"),
    ],
)
def test_invalid_precision_specification_is_refused(text, message):
    with pytest.raises(UsageError, match=message):
        parse_precision(text)


def test_every_scheme_names_a_function_that_exists():
    for scheme in filter(None, SCHEMES.values()):
        module, _, function = scheme.function.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_int8_without_calibration_or_with_a_missing_range_is_refused(graph, calibration):
    with pytest.raises(UsageError, match="int8 needs images to calibrate on; give some: --data DIR"):
        quantise(graph, INT8)
    ranges = dict(calibration.ranges)
    del ranges[gemms(graph)[3].activation]
    with pytest.raises(UsageError, match="no range for"):
        quantise(graph, INT8, replace(calibration, ranges=ranges))


def test_a_precision_for_a_part_that_is_not_there_is_refused(graph):
    without = OnnxGraph(model=graph.model.clone())
    for node in without.model.graph:
        node.metadata_props["namespace"] = ": TransUNet/head: Conv2d/conv: aten.conv2d.default"
    with pytest.raises(UsageError, match="no GEMM in: block"):
        quantise(without, parse_precision("w8a16"))
    assert quantise(without, parse_precision("fp32")) is without
