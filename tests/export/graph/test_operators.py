"""The operators that bundles may use are those that the exporter writes: no graph of ours is refused."""

import onnx
import pytest
from tiny import tiny_spec

from medseg_trt.export.fold.fold import fold
from medseg_trt.export.graph.dialects import derive
from medseg_trt.export.graph.functions import BODIES, DOMAIN, function
from medseg_trt.export.graph.fusions.fuse import fuse
from medseg_trt.export.graph.masks import with_masks
from medseg_trt.export.graph.onnx_graph import OnnxGraph
from medseg_trt.export.graph.operators import ALLOWED, FUNCTIONS, MAX_NODES, STANDARD
from medseg_trt.export.graph.trace import trace
from medseg_trt.spec import Preprocessing
from medseg_trt.train.block.blocks import random_block
from medseg_trt.train.models.model import MODELS, TINY_LLAMA, build_model

TINY = tuple(name for name in MODELS if name.endswith("-tiny"))
SLOW = ("ds-transunet", "swin", "llm-unet")  # they trace for a minute or more
SIZE = (64, 64)
PREPROCESSING = (Preprocessing(image_size=SIZE), Preprocessing(image_size=SIZE, spacing_mm=1.5))


def operators(graph: OnnxGraph) -> set[tuple[str, str]]:
    """Return the domain and the type of every node, those of functions included."""
    functions = [node for body in graph.model.functions.values() for node in body]
    return {(node.domain, node.op_type) for node in (*graph.model.graph, *functions)}


def refused(graph: OnnxGraph) -> set[tuple[str, str]]:
    return {(domain, name) for domain, name in operators(graph) if name not in ALLOWED.get(domain, frozenset())}


CASES = [pytest.param(name, 3, marks=[pytest.mark.slow] if any(part in name for part in SLOW) else []) for name in TINY]


@pytest.mark.parametrize(("architecture", "num_classes"), [*CASES, ("llm-transunet-tiny", 1)])
def test_exported_graphs_use_only_allowed_operators(architecture, num_classes):
    spec = tiny_spec(architecture, SIZE, num_classes)
    block = random_block(TINY_LLAMA, seed=0) if spec.block is not None else None
    folded, _ = fold(build_model(spec, block))
    fused, _ = fuse(trace(folded))
    for graph in (fused, derive("plain", fused, SIZE, num_classes)):
        for preprocessing in PREPROCESSING:
            for variant in (graph, with_masks(graph, preprocessing)):
                assert refused(variant) == set()
                assert len(list(variant.model.graph)) < MAX_NODES // 8


def test_the_functions_are_those_that_have_bodies_and_call_standard_operators():
    assert BODIES.keys() == FUNCTIONS
    assert ALLOWED[DOMAIN] == FUNCTIONS
    for name in BODIES:
        assert {(node.domain, node.op_type in STANDARD) for node in function(name)} == {("", True)}


def test_no_allowed_operator_has_a_subgraph_attribute():
    """Loop, If, Scan and SequenceMap would run what nobody counted."""
    graph = onnx.defs.OpSchema.AttrType.GRAPH
    for name in STANDARD:
        assert all(attribute.type != graph for attribute in onnx.defs.get_schema(name, 23).attributes.values())
