import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from tiny import make_checkpoint

from medseg_trt.export.fold.fold import fold
from medseg_trt.export.graph.dialects import derive
from medseg_trt.export.graph.fusions.fuse import fuse
from medseg_trt.export.graph.gemms import gemms
from medseg_trt.export.graph.save import save_graphs
from medseg_trt.export.graph.trace import OnnxGraph, trace
from medseg_trt.export.precision.half import FLOAT, TYPES, to_half
from medseg_trt.export.precision.overflow import HEADROOM, LARGEST, observed_values, rounded_graph, too_large
from medseg_trt.export.precision.weight_only import to_w8a16
from medseg_trt.train.checkpoint import load_checkpoint
from medseg_trt.train.models.model import runner

IMAGES = np.random.default_rng(0).random((3, 3, 32, 32), dtype=np.float32)
IN_FLOAT32 = {"GroupNormalization", "LayerNormalization", "RMSNorm", "AddRMSNorm", "RMSNormalization", "Softmax"}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return load_checkpoint(make_checkpoint(tmp_path_factory.mktemp("model"))).model()


@pytest.fixture(scope="module")
def graph(reference) -> OnnxGraph:
    return fuse(trace(fold(reference)[0]))[0]


@pytest.fixture(scope="module")
def everything(graph) -> OnnxGraph:
    return to_half(graph, [gemm.name for gemm in gemms(graph)])


def run(graph: OnnxGraph, folder, images=IMAGES, optimise=True) -> np.ndarray:
    save_graphs({"graph.onnx": graph}, folder, "weights.bin")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(folder / "graph.onnx"), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"pixel_values": images})[0])


def half_types(node: ir.Node) -> bool:
    return any(v is not None and v.dtype in TYPES.values() for v in (*node.inputs, *node.outputs))


def test_products_are_in_16_bits_and_norms_and_sums_are_not(everything):
    kinds: dict[str, set[bool]] = {}
    for node in everything.model.graph:
        kinds.setdefault(node.op_type, set()).add(half_types(node))
    assert kinds["MatMul"] == kinds["Conv"] == kinds["Attention"] == kinds["Resize"] == {True}
    assert all(kinds[name] == {False} for name in IN_FLOAT32 & kinds.keys())
    assert IN_FLOAT32 & kinds.keys() >= {"GroupNormalization", "LayerNormalization"}
    for node in everything.model.graph:
        if node.op_type == "Add" and not any(v is not None and v.is_initializer() for v in node.inputs):
            assert not half_types(node), f"{node.name} adds two activations"
        if node.op_type == "Attention":
            assert node.attributes.get_int("softmax_precision") == int(FLOAT)
    weights = [gemm.weight for gemm in gemms(everything)]
    assert {everything.model.graph.initializers[name].dtype for name in weights} == {TYPES["fp16"]}
    assert {v.dtype for v in (*everything.model.graph.inputs, *everything.model.graph.outputs)} == {FLOAT}


def test_no_value_has_redundant_casts(everything):
    for node in everything.model.graph:
        producer = node.inputs[0].producer() if node.op_type == "Cast" else None
        assert producer is None or producer.op_type != "Cast", f"{node.name} follows {producer.name}"


@pytest.mark.parametrize("dialect", ["canonical", "plain"])
def test_every_dialect_computes_the_logits_of_pytorch_up_to_rounding(everything, reference, tmp_path, dialect):
    logits = run(derive(dialect, everything, (32, 32), 3), tmp_path)
    expected = runner(reference)(IMAGES)
    # Half a unit in the 11th bit is 4.9e-4; through some 30 products in a row it may grow, as a random walk, to 3e-3
    # of the largest logit. The faults below are ten times as large.
    assert np.abs(logits - expected).max() < 3e-3 * np.abs(expected).max()


@pytest.mark.parametrize("part", ["resnet", "vit", "block", "decoder"])
def test_converting_one_part_does_not_change_the_others(graph, part, tmp_path):
    names = [gemm.name for gemm in gemms(graph) if gemm.part == part]
    mixed = to_half(graph, names)
    for before, after in zip(gemms(graph), gemms(mixed), strict=True):
        dtype = mixed.model.graph.initializers[after.weight].dtype
        assert dtype == (TYPES["fp16"] if before.name in names else FLOAT)
    assert np.isfinite(run(mixed, tmp_path)).all()


def test_emulated_rounding_agrees_with_the_back_end(everything, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    widened, rounded = run(everything, tmp_path / "a"), run(rounded_graph(everything), tmp_path / "b")
    assert np.abs(widened - rounded).max() < 3e-3 * np.abs(rounded).max()
    assert np.abs(widened - rounded).max() > 0  # else nothing was rounded


def loud(graph: OnnxGraph, factor: float) -> tuple[OnnxGraph, str]:
    """Return a graph whose first GEMM of the block makes numbers that are ``factor`` times as large."""
    gemm = next(gemm for gemm in gemms(graph) if gemm.part == "block")
    model = graph.model.clone()
    weight = model.graph.initializers[gemm.weight]
    assert weight.const_value is not None
    weight.const_value = ir.tensor(weight.const_value.numpy() * np.float32(factor), name=weight.name)
    return OnnxGraph(model=model), gemm.name


def test_an_overflow_that_a_cpu_hides_is_detected(graph, tmp_path):
    noisy, name = loud(graph, 1e5)
    assert np.isfinite(run(noisy, tmp_path)).all()
    (tmp_path / "b").mkdir()
    halved = rounded_graph(to_half(noisy, [name]))
    assert not np.isfinite(run(halved, tmp_path / "b")).all()


def test_the_products_that_are_too_large_for_16_bits_are_named(graph):
    names = [gemm.name for gemm in gemms(graph)]
    largest = dict.fromkeys(observed_values(graph, names), 1.0)
    worst = gemms(graph)[3]
    beyond = LARGEST["fp16"] / HEADROOM * 1.01

    def observe(image: np.ndarray) -> dict[str, np.ndarray]:
        limits = dict.fromkeys(largest, np.zeros(4, np.float32))
        return limits | {worst.output: np.array([0.0, -beyond], np.float32)}

    overflows = too_large(graph, names, observe, IMAGES)
    readers = {gemm.name for gemm in gemms(graph) if worst.output in (gemm.activation, gemm.output)}
    assert {overflow.gemm for overflow in overflows} == readers
    assert overflows[0].largest == pytest.approx(beyond)
    assert too_large(graph, names, observe, IMAGES, dtype="bf16") == ()
    without = [name for name in names if name not in readers]
    assert too_large(graph, without, observe, IMAGES) == ()


def test_to_half_with_bf16_stores_bfloat16_weights(graph):
    halved = to_half(graph, [gemm.name for gemm in gemms(graph)], dtype="bf16")
    assert {halved.model.graph.initializers[g.weight].dtype for g in gemms(halved)} == {ir.DataType.BFLOAT16}
    assert torch.bfloat16.itemsize == 2


def test_the_limit_catches_coarser_weights(everything, reference, tmp_path):
    model = everything.model.clone()
    for gemm in gemms(everything):
        weight = model.graph.initializers[gemm.weight]
        assert weight.const_value is not None
        coarse = weight.const_value.numpy().astype(np.float32).view(np.int32) & np.int32(-(2**17))  # 6 bits are left
        weight.const_value = ir.tensor(coarse.view(np.float32).astype(np.float16), name=weight.name)
    logits, expected = run(OnnxGraph(model=model), tmp_path), runner(reference)(IMAGES)
    assert np.abs(logits - expected).max() > 3e-3 * np.abs(expected).max()


# Codes


@pytest.fixture(scope="module")
def coded(graph) -> OnnxGraph:
    return to_w8a16(graph, [gemm.name for gemm in gemms(graph)])


def test_quantised_values_are_dequantised_to_16_bits_with_scales_of_16_bits(graph, coded, tmp_path):
    half = to_half(coded, [gemm.name for gemm in gemms(coded)])
    decoders = [node for node in half.model.graph if node.op_type == "DequantizeLinear"]
    assert len(decoders) == len(gemms(graph))
    for node in decoders:
        assert {value.dtype for value in (node.inputs[1], node.outputs[0]) if value} == {TYPES["fp16"]}
    (tmp_path / "wide").mkdir()
    (tmp_path / "half").mkdir()
    outputs, expected = run(half, tmp_path / "half"), run(coded, tmp_path / "wide")
    assert 0 < np.abs(outputs - expected).max() < 0.01 * np.abs(expected).max()


def test_a_product_stays_float32_where_16_bits_are_too_imprecise_for_its_scale(coded):
    model = coded.model.clone()
    decoder = next(node for node in model.graph if node.op_type == "DequantizeLinear")
    scale, (reader, _) = decoder.inputs[1], next(iter(decoder.outputs[0].uses()))
    assert scale is not None
    assert scale.const_value is not None
    small = np.full(scale.const_value.shape, 2.0**-20 * (1 + 2.0**-6), np.float32)  # 16 bits have steps of 2^-24 there
    scale.const_value = ir.tensor(small, name=scale.name)
    half = to_half(OnnxGraph(model=model), [gemm.name for gemm in gemms(coded)])
    nodes = {node.name: node for node in half.model.graph}
    assert not half_types(nodes[reader.name])
    assert sum(half_types(nodes[gemm.name]) for gemm in gemms(half)) == len(gemms(half)) - 1


def test_qdq_nodes_of_float32_products_do_not_change(coded):
    first, *others = [gemm.name for gemm in gemms(coded)]
    half = to_half(coded, [first])
    nodes = {node.name: node for node in half.model.graph}
    for name in (first, *others):
        weight = nodes[name].inputs[1]
        decoder = weight.producer() if weight is not None else None
        assert decoder is not None
        assert half_types(decoder) == (name == first)


def test_a_value_is_quantised_and_dequantised_with_the_same_scale():
    """The QuantizeLinear reads float32, since a norm made its input; its scale is what the 16 bits hold."""
    graph = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 21]>
        network (float[2, 4] x) => (float[2, 2] y)
            <float[4, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}, float s = {0.0123456}, int8 z = {0}, float[2, 4] n,
             int8[2, 4] q, float[2, 4] d> {
            n = Sqrt (x)
            q = QuantizeLinear (n, s, z)
            d = DequantizeLinear (q, s, z)
            y = MatMul (d, w)
        }"""
    )
    for node in graph.graph:
        node.name = f"{node.op_type}_node"
        node.metadata_props["namespace"] = (
            ": medseg_trt.train.models.transunet.TransUNet/head: torch.nn.Conv2d/x: aten.x"
        )
    half = to_half(OnnxGraph(model=graph), ["MatMul_node"])
    coder, decoder = (
        next(node for node in half.model.graph if node.op_type == name)
        for name in ("QuantizeLinear", "DequantizeLinear")
    )
    wide, narrow = (node.inputs[1] for node in (coder, decoder))
    assert wide is not None
    assert wide.const_value is not None
    assert narrow is not None
    assert narrow.const_value is not None
    assert (wide.dtype, narrow.dtype) == (FLOAT, TYPES["fp16"])
    assert float(wide.const_value.numpy()) == float(narrow.const_value.numpy()) != pytest.approx(0.0123456, rel=1e-7)
