"""Networks with a replacement: what they cost, and that their graphs compute what PyTorch computes."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from tiny import SIZE, make_checkpoint

from medseg_trt.export.compress.affine import fit_affine
from medseg_trt.export.compress.cost import insert_cost
from medseg_trt.export.compress.narrow import NarrowFit
from medseg_trt.export.compress.replace import with_replacement
from medseg_trt.export.compress.rungs import AFFINE, EXACT, Rung
from medseg_trt.export.compress.tokens import tokens_before_block
from medseg_trt.export.fold.fold import fold
from medseg_trt.export.fold.layers import RotaryTable
from medseg_trt.export.graph.dialects import derive
from medseg_trt.export.graph.fusions.fuse import fuse
from medseg_trt.export.graph.gemms import gemms, total_macs
from medseg_trt.export.graph.modules import module_of
from medseg_trt.export.graph.node_costs import node_costs
from medseg_trt.export.graph.onnx_graph import OnnxGraph
from medseg_trt.export.graph.trace import trace
from medseg_trt.export.precision.sensitive_layers import sensitive_layers
from medseg_trt.network_spec import ModelSpec
from medseg_trt.train.checkpoint import load_checkpoint
from medseg_trt.train.models.model import LanguageInsert, build_model
from medseg_trt.train.models.transunet import TransUNet

NARROW = Rung(kind="narrow", width=12, neurons=10, heads=2)
LIMIT = 1e-5  # logits of order 1 in float32, added up in another order


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> TransUNet:
    """A tiny network of random weights; its image has four tokens."""
    model = load_checkpoint(make_checkpoint(tmp_path_factory.mktemp("model"))).model()
    assert isinstance(model, TransUNet)
    return model


@pytest.fixture(scope="module")
def changed(network: TransUNet) -> dict[Rung, TransUNet]:
    """The folded network with each rung."""
    return {rung: replaced(network, rung) for rung in (AFFINE, NARROW, EXACT)}


@pytest.fixture(scope="module")
def traced(changed: dict[Rung, TransUNet]) -> dict[Rung, OnnxGraph]:
    return {rung: trace(model) for rung, model in changed.items()}


def images(count: int) -> np.ndarray:
    return np.random.default_rng(count).random((count, 3, *SIZE), dtype=np.float32)


def folded(network: TransUNet) -> TransUNet:
    copied, _ = fold(network)
    assert isinstance(copied, TransUNet)
    return copied


def replaced(network: TransUNet, rung: Rung) -> TransUNet:
    tokens = tokens_before_block(network, images(60))
    if rung == EXACT:
        return folded(network)
    assert isinstance(network.insert, LanguageInsert)
    replacement = fit_affine(network.insert, tokens) if rung == AFFINE else NarrowFit(network.insert, tokens).fit(rung)
    changed = with_replacement(folded(network), replacement)
    assert isinstance(changed, TransUNet)
    return changed


def logits_of(graph: OnnxGraph, batch: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(
        ir.to_proto(graph.model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return np.asarray(session.run(["logits"], {"pixel_values": batch})[0])


def test_the_collected_tokens_are_those_that_the_block_sees(network: TransUNet) -> None:
    seen: list[torch.Tensor] = []
    assert network.insert is not None
    handle = network.insert.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        network(torch.from_numpy(images(3)))
    handle.remove()
    assert torch.allclose(tokens_before_block(network, images(3)), seen[0], atol=1e-5)


@pytest.mark.parametrize("rung", [AFFINE, NARROW], ids=str)
@pytest.mark.parametrize("dialect", ["canonical", "plain"])
def test_the_graph_computes_the_logits_of_the_network(
    network: TransUNet,
    changed: dict[Rung, TransUNet],
    traced: dict[Rung, OnnxGraph],
    rung: Rung,
    dialect: str,
) -> None:
    batch = images(3)
    graph, _ = fuse(traced[rung])
    with torch.inference_mode():
        expected, original = (model(torch.from_numpy(batch)).numpy() for model in (changed[rung], network))
    logits = logits_of(derive(dialect, graph, SIZE, 3), batch)
    np.testing.assert_allclose(logits, expected, atol=LIMIT, rtol=0)
    assert np.abs(expected - original).max() > 10 * LIMIT  # it is another network


@pytest.mark.parametrize("rung", [AFFINE, NARROW, EXACT], ids=str)
def test_the_counted_macs_are_those_of_the_graph(
    network: TransUNet, changed: dict[Rung, TransUNet], traced: dict[Rung, OnnxGraph], rung: Rung
) -> None:
    insert = changed[rung].insert
    assert insert is not None
    assert isinstance(network.spec, ModelSpec)
    cost = insert_cost(insert, network.spec)
    assert cost.macs == sum(node.macs for node in node_costs(traced[rung]) if node.part == "block")
    assert cost.bytes == 4 * sum(weight.numel() for weight in insert.parameters())


def test_a_cheaper_block_leaves_the_same_other_layers_in_float(traced: dict[Rung, OnnxGraph]) -> None:
    exact, affine = (fuse(traced[rung])[0] for rung in (EXACT, AFFINE))
    macs = {gemm.name: gemm.macs for gemm in gemms(exact)}
    unlimited = sensitive_layers(exact, [*macs], max_share=1.0)
    between = (total_macs(exact) + total_macs(affine)) / 2  # a share of all MACs would keep other layers in each graph
    for count in range(1, len(unlimited) + 1):
        share = sum(macs[name] for name in unlimited[:count]) / between
        modules = [kept_modules(graph, share) for graph in (exact, affine)]
        assert modules[0] == modules[1]


def kept_modules(graph: OnnxGraph, max_share: float) -> list[str]:
    nodes = {node.name: node for node in graph.model.graph}
    names = [gemm.name for gemm in gemms(graph)]
    return [module_of(nodes[name]) for name in sensitive_layers(graph, names, max_share=max_share)]


def test_macs_increase_from_affine_over_narrow_to_exact_block(
    network: TransUNet, changed: dict[Rung, TransUNet]
) -> None:
    inserts = [changed[rung].insert for rung in (AFFINE, NARROW, EXACT)]
    spec = network.spec
    assert isinstance(spec, ModelSpec)
    costs = [insert_cost(insert, spec).macs for insert in inserts if insert is not None]
    assert costs == sorted(set(costs))
    assert len(costs) == 3


@pytest.mark.parametrize(("rotary", "causal"), [(True, False), (False, True)])
def test_a_narrow_layer_keeps_rotary_and_causal_mask(network: TransUNet, rotary: bool, causal: bool) -> None:
    assert network.spec.block is not None
    spec = replace(network.spec, block=replace(network.spec.block, rotary=rotary, causal=causal))
    torch.manual_seed(0)
    other = build_model(spec).eval()
    assert isinstance(other, TransUNet)
    changed = replaced(other, Rung(kind="narrow", width=12, neurons=10, heads=4))
    layers = list(changed.insert.modules()) if changed.insert is not None else []
    assert any(isinstance(layer, RotaryTable) for layer in layers) == rotary
    assert any(getattr(layer, "causal", False) for layer in layers) == causal
    graph, batch = trace(changed), images(2)
    with torch.inference_mode():
        expected = changed(torch.from_numpy(batch)).numpy()
    np.testing.assert_allclose(logits_of(graph, batch), expected, atol=LIMIT, rtol=0)


def test_the_original_network_stays_as_it_is(network: TransUNet) -> None:
    original = folded(network)
    insert = original.insert
    changed = with_replacement(original, torch.nn.Linear(48, 48))
    assert isinstance(changed, TransUNet)
    assert original.insert is insert
    assert changed.head.weight is original.head.weight
