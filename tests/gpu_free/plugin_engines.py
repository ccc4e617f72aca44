"""Graphs of the nodes that have plugins, and engines of them, built by TensorRT-RTX without a GPU."""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from medseg_trt.export.graph import functions
from medseg_trt.export.graph.functions import DOMAIN, PLUGIN

trt: Any = importlib.import_module("tensorrt_rtx")  # its types are not known to a type checker

CARDS = ("SM86", "SM89")
WIDTH, TOKENS = 64, 5


class Log(trt.ILogger):
    """Keeps what TensorRT says."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        self.lines.append(message)

    def layers(self) -> dict[str, str]:
        """Return the line of every layer of the last engine, by name."""
        block = next(line for line in reversed(self.lines) if line.startswith("Layers:"))
        lines = [line for line in block.splitlines() if line.startswith("Name: ")]
        return {line.split(",")[0].removeprefix("Name: "): line for line in lines}


def node(name: str, inputs: list[str], outputs: list[str], **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(name, inputs, outputs, name=f"my_{name}", domain=DOMAIN, **{**PLUGIN, **attributes})


def model(
    nodes: list[onnx.NodeProto],
    inputs: Mapping[str, tuple[int, list[Any]]],
    outputs: Mapping[str, int],
    constants: Mapping[str, tuple[int, np.ndarray]],
) -> bytes:
    called = sorted({node.op_type for node in nodes if node.domain == DOMAIN})
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()],
        [helper.make_tensor(name, kind, value.shape, value.ravel()) for name, (kind, value) in constants.items()],
    )
    onnx_model = helper.make_model(
        graph,
        functions=[functions.ir.to_proto(functions.function(name)) for name in called],
        ir_version=11,
        opset_imports=[helper.make_opsetid("", functions.OPSET), helper.make_opsetid(DOMAIN, 1)],
    )
    return onnx_model.SerializeToString()


def block(dtype: int, *, weight: int = WIDTH, table: int = TensorProto.FLOAT, **changed: Any) -> bytes:
    """Return a graph with every float node: a norm of a sum, then rotary, and SwiGLU with another norm."""
    nodes = [
        node("AddRMSNorm", ["x", "r", "w"], ["n", "s"], **{"epsilon": 1e-6, **changed}),
        node("Rotary", ["n", "cos", "sin"], ["q", "k", "v"], num_heads=2, num_kv_heads=1, interleaved=0),
        node("SwiGLU", ["s"], ["g"]),
        node("RMSNorm", ["g", "half_w"], ["z"], epsilon=1e-6),
    ]
    constants = {
        "w": (dtype, np.ones(weight)),
        "half_w": (dtype, np.ones(WIDTH // 2)),
        "cos": (table, np.ones((TOKENS, 8))),
        "sin": (table, np.zeros((TOKENS, 8))),
    }
    inputs = {name: (dtype, ["batch", TOKENS, WIDTH]) for name in "xr"}
    return model(nodes, inputs, dict.fromkeys("qkvz", dtype), constants)


def int8_block(dtype: int) -> bytes:
    """Return a graph in which every quantised node feeds an INT8 matrix product."""
    nodes: list[onnx.NodeProto] = []
    constants: dict[str, tuple[int, np.ndarray]] = {
        "w": (dtype, np.ones(WIDTH)),
        "b": (dtype, np.zeros(WIDTH)),
        "step": (dtype, np.array(0.03)),
        "steps": (dtype, np.full(WIDTH, 0.01)),
    }
    calls = {
        "QuantizedAddRMSNorm": (["x", "r", "w"], {"epsilon": 1e-6, "scale": 0.03}, WIDTH),
        "QuantizedRMSNorm": (["x", "w"], {"epsilon": 1e-6, "scale": 0.03}, WIDTH),
        "QuantizedLayerNorm": (["x", "w", "b"], {"epsilon": 1e-6, "scale": 0.03}, WIDTH),
        "QuantizedSwiGLU": (["x"], {"scale": 0.03}, WIDTH // 2),
    }
    rng = np.random.default_rng(0)
    for name, (inputs, attributes, width) in calls.items():
        outputs = [f"{name}_y", "sum"] if name == "QuantizedAddRMSNorm" else [f"{name}_y"]
        nodes += [
            node(name, inputs, outputs, **attributes),
            helper.make_node("DequantizeLinear", [outputs[0], "step"], [f"{name}_f"]),
            helper.make_node("DequantizeLinear", [f"{name}_m", "steps"], [f"{name}_mf"], axis=1),
            helper.make_node("MatMul", [f"{name}_f", f"{name}_mf"], [f"{name}_z"], name=f"product_{name}"),
        ]
        constants[f"{name}_m"] = (TensorProto.INT8, rng.integers(-127, 128, (width, WIDTH), np.int8))
    inputs = {name: (dtype, ["batch", TOKENS, WIDTH]) for name in "xr"}
    return model(nodes, inputs, {**{f"{name}_z": dtype for name in calls}, "sum": dtype}, constants)


def parse(graph: bytes, log: Log) -> tuple[Any, Any, bool]:
    """Return builder, network and whether the graph was taken."""
    builder = trt.Builder(log)
    network = builder.create_network(0)
    return builder, network, trt.OnnxParser(network, log).parse(graph)


def build(graph: bytes, cards: Sequence[str] = CARDS) -> tuple[bytes, Log]:
    log = Log()
    builder, network, parsed = parse(graph, log)
    assert parsed
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = len(cards)
    for index, card in enumerate(cards):
        config.set_compute_capability(getattr(trt.ComputeCapability, card), index)
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        profile.set_shape(network.get_input(index).name, *[(batch, TOKENS, WIDTH) for batch in (1, 2, 4)])
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    assert plan is not None
    return bytes(plan), log
