"""Which layers stay in float because rounding hurts them most: in their order, and within a share of the work."""

import pytest
from tiny import tiny_spec

from medseg_trt.export.fold.fold import fold
from medseg_trt.export.graph.fusions.fuse import fuse
from medseg_trt.export.graph.gemms import gemms, total_macs
from medseg_trt.export.graph.modules import module_of
from medseg_trt.export.graph.trace import OnnxGraph, trace
from medseg_trt.export.precision import sensitive_layers as module
from medseg_trt.export.precision.sensitive_layers import MODULES, sensitive_layers
from medseg_trt.train.block.blocks import random_block
from medseg_trt.train.models.model import TINY_LLAMA, build_model


@pytest.fixture(scope="module")
def graph() -> OnnxGraph:
    network = build_model(tiny_spec(), random_block(TINY_LLAMA, seed=0)).eval()
    return fuse(trace(fold(network)[0]))[0]


def found(graph: OnnxGraph, rounded=None) -> list[str]:
    """Return the modules of what stays in float."""
    nodes = {node.name: node for node in graph.model.graph}
    names = [gemm.name for gemm in gemms(graph)] if rounded is None else rounded
    return [module_of(nodes[name]) for name in sensitive_layers(graph, names)]


def test_every_named_module_is_in_the_network_and_stays_where_there_is_room(graph, monkeypatch):
    monkeypatch.setattr(module, "MAX_SHARE", 1.0)
    modules = found(graph)
    for name in MODULES:
        assert any(f"{each}.".startswith(f"{name}.") for each in modules), name
    assert not any(
        each.startswith(("layers", "insert", "bridge", "decoder.0.conv1", "resnet.block2")) for each in modules
    )


def test_they_come_in_their_order_until_the_share_is_used_up(graph, monkeypatch):
    macs = {gemm.name: gemm.macs for gemm in gemms(graph)}
    usual = sum(macs[name] for name in sensitive_layers(graph, [*macs]))
    assert usual <= module.MAX_SHARE * total_macs(graph)
    monkeypatch.setattr(module, "MAX_SHARE", 1.0)
    every = sensitive_layers(graph, [*macs])
    for count in range(len(every) + 1):
        share = sum(macs[name] for name in every[:count]) / total_macs(graph)
        monkeypatch.setattr(module, "MAX_SHARE", share * (1 + 1e-9))
        kept = sensitive_layers(graph, [*macs])
        assert kept == every[: len(kept)]  # a module is kept whole or not at all
        assert sum(macs[name] for name in kept) <= (1 + 1e-9) * share * total_macs(graph)


def test_what_is_not_rounded_is_not_named(graph, monkeypatch):
    monkeypatch.setattr(module, "MAX_SHARE", 1.0)
    encoder = [gemm.name for gemm in gemms(graph) if gemm.part in ("resnet", "vit")]
    assert found(graph, encoder)
    assert all(each.startswith("resnet") for each in found(graph, encoder))
    assert found(graph, []) == []
