import numpy as np
import onnx_ir as ir
import pytest
from tiny import tiny_spec

from medseg_trt.export.fold.fold import fold
from medseg_trt.export.graph.fusions.fuse import fuse
from medseg_trt.export.graph.gemms import gemms
from medseg_trt.export.graph.modules import groups_of
from medseg_trt.export.graph.trace import INPUT, OPSET, OUTPUT, OnnxGraph, trace
from medseg_trt.train.block.blocks import random_block
from medseg_trt.train.models.model import TINY_LLAMA, build_model

ROOT = ": medseg_trt.train.models.transunet.TransUNet"


def chain(namespaces: list[str]) -> OnnxGraph:
    """Return a graph of one matrix product after the other, which came from these modules."""
    shape = ir.Shape([ir.SymbolicDim("batch"), 4])
    value = ir.Value(name=INPUT, shape=shape, type=ir.TensorType(ir.DataType.FLOAT))
    inputs, nodes, weights = [value], [], []
    for index, namespace in enumerate(namespaces):
        weights.append(ir.val(f"w{index}", const_value=ir.tensor(np.eye(4, dtype=np.float32), name=f"w{index}")))
        name = OUTPUT if index == len(namespaces) - 1 else f"v{index}"
        output = ir.Value(name=name, shape=shape, type=ir.TensorType(ir.DataType.FLOAT))
        metadata = {"namespace": namespace}
        nodes.append(
            ir.node("MatMul", [value, weights[-1]], outputs=[output], name=f"n{index}", metadata_props=metadata)
        )
        value = output
    graph = ir.Graph(inputs, [value], nodes=nodes, initializers=weights, opset_imports={"": OPSET}, name="chain")
    return OnnxGraph(model=ir.Model(graph, ir_version=10))


@pytest.mark.parametrize(
    ("modules", "group"),
    [
        (["layers.3.mlp.fc1: torch.nn.modules.linear.Linear"], "layers.3"),
        (["layers.3: a.Layer", "layers.3.mlp.fc2: torch.nn.modules.linear.Linear"], "layers.3"),
        (["layers.11.attention.out: torch.nn.modules.linear.Linear"], "layers.11"),  # not the first layer
        (["resnet: a.ResNet", "resnet.block2.0.conv1: a.StdConv2d"], "resnet.block2.0"),
        (["insert.mapper2: torch.nn.modules.linear.Linear"], "insert.mapper2"),  # no number: the whole path
    ],
)
def test_a_layer_is_the_module_up_to_its_first_number(modules, group):
    namespace = "/".join([ROOT, *modules, "linear_7: aten.linear.default"])
    assert groups_of(chain([namespace])) == {group: ["n0"]}


def test_the_gemms_of_a_layer_are_together_in_the_order_of_the_graph():
    of = [f"{ROOT}/layers.{number}.{name}: a.B/c: aten.linear.default" for number in (1, 0) for name in ("fc1", "fc2")]
    groups = groups_of(chain(of))
    assert list(groups.items()) == [("layers.1", ["n0", "n1"]), ("layers.0", ["n2", "n3"])]


@pytest.fixture(scope="module")
def graph() -> OnnxGraph:
    network = build_model(tiny_spec(), random_block(TINY_LLAMA, seed=0)).eval()
    return fuse(trace(fold(network)[0]))[0]


def test_every_gemm_of_a_network_is_in_one_group_of_its_own_part(graph):
    groups = groups_of(graph)
    assert sorted(name for names in groups.values() for name in names) == sorted(gemm.name for gemm in gemms(graph))
    parts = {gemm.name: gemm.part for gemm in gemms(graph)}
    assert all(len({parts[name] for name in names}) == 1 for names in groups.values())


def test_every_group_has_fewer_than_a_third_of_the_gemms(graph):
    groups = groups_of(graph)
    parts = {gemm.name: gemm.part for gemm in gemms(graph)}
    assert {"layers.0", "layers.1", "resnet.root.0", "resnet.block2.0", "decoder.3", "head"} <= set(groups)
    assert {parts[names[0]] for names in groups.values()} == {"resnet", "vit", "block", "decoder"}
    assert max(len(names) for names in groups.values()) < len(parts) / 3
