"""Layers stay in float in the order of ``MODULES``, within a share of the MACs."""

import pytest
from tiny import tiny_spec

from medseg_trt.export.fold.fold import fold
from medseg_trt.export.graph.fusions.fuse import fuse
from medseg_trt.export.graph.gemms import gemms
from medseg_trt.export.graph.modules import module_of
from medseg_trt.export.graph.trace import OnnxGraph, trace
from medseg_trt.export.precision.sensitive_layers import (
    MAX_SHARE,
    TRANSUNET_MODULES,
    macs_outside_block,
    sensitive_layers,
)
from medseg_trt.train.block.blocks import random_block
from medseg_trt.train.models.model import TINY_LLAMA, build_model


@pytest.fixture(scope="module")
def graph() -> OnnxGraph:
    network = build_model(tiny_spec(), random_block(TINY_LLAMA, seed=0)).eval()
    return fuse(trace(fold(network)[0]))[0]


def kept_modules(graph: OnnxGraph, rounded=None) -> list[str]:
    """Return the modules of the GEMMs that stay in float, without a limit."""
    nodes = {node.name: node for node in graph.model.graph}
    names = [gemm.name for gemm in gemms(graph)] if rounded is None else rounded
    return [module_of(nodes[name]) for name in sensitive_layers(graph, names, max_share=1.0)]


def test_all_listed_modules_and_no_others_stay_without_a_limit(graph):
    modules = kept_modules(graph)
    for name in TRANSUNET_MODULES:
        assert any(f"{module}.".startswith(f"{name}.") for module in modules), name
    assert not any(
        module.startswith(("layers", "insert", "bridge", "decoder.0.conv1", "resnet.block2")) for module in modules
    )


def test_modules_are_kept_in_order_until_the_limit(graph):
    macs = {gemm.name: gemm.macs for gemm in gemms(graph)}
    default_macs = sum(macs[name] for name in sensitive_layers(graph, [*macs]))
    assert default_macs <= MAX_SHARE * macs_outside_block(graph)
    unlimited = sensitive_layers(graph, [*macs], max_share=1.0)
    for count in range(len(unlimited) + 1):
        share = sum(macs[name] for name in unlimited[:count]) / macs_outside_block(graph)
        kept = sensitive_layers(graph, [*macs], max_share=share * (1 + 1e-9))
        assert kept == unlimited[: len(kept)]  # a module is kept whole or not at all
        assert sum(macs[name] for name in kept) <= (1 + 1e-9) * share * macs_outside_block(graph)


def test_only_gemms_to_be_quantised_are_returned(graph):
    encoder = [gemm.name for gemm in gemms(graph) if gemm.part in ("resnet", "vit")]
    assert kept_modules(graph, encoder)
    assert all(module.startswith("resnet") for module in kept_modules(graph, encoder))
    assert kept_modules(graph, []) == []
