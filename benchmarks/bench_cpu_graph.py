"""Analyse the graphs of the CPU benchmark: cost, stored sizes, and the profile of the fastest one."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

PROFILED_RUNS = 20


def graph_figures(float_graph: Path, four_bit_graph: Path) -> dict[str, float]:
    """Return ``gmac`` and ``parameters_m`` of the folded network, and ``w4a16_block_mb``, what its LLM part stores."""
    import onnx_ir as ir

    from medseg_trt.export.graph.gemms import total_macs
    from medseg_trt.export.graph.parts import part_of
    from medseg_trt.export.graph.trace import KEPT_METADATA, OnnxGraph

    graph, coded = OnnxGraph(model=ir.load(float_graph)), OnnxGraph(model=ir.load(four_bit_graph))
    stored: dict[str, int] = {}
    for node in coded.model.graph:
        if part_of(node.metadata_props.get(KEPT_METADATA, "")) == "block":
            stored |= {
                str(value.name): value.const_value.nbytes
                for value in node.inputs
                if value is not None and value.const_value is not None
            }
    weights = [value.const_value for value in graph.model.graph.initializers.values() if value.const_value is not None]
    return {
        "gmac": total_macs(graph) / 1e9,
        "parameters_m": sum(tensor.size for tensor in weights) / 1e6,
        "w4a16_block_mb": sum(stored.values()) / 1e6,
    }


def folding_error(made: Any) -> float:
    """Return the largest difference of the folded network's logits from the unfolded one's, on the judged images."""
    from medseg_trt.export.fold.fold import fold
    from medseg_trt.train.checkpoint import load_checkpoint
    from medseg_trt.train.models.model import runner

    images = made.images()
    folded, _ = fold(load_checkpoint(made.checkpoint("llm-transunet")).model())
    run = runner(folded)
    logits = np.concatenate([run(image[np.newaxis]) for image in images["judged"]])
    return float(np.abs(logits - images["llm-transunet"]).max())


def profile(path: Path, float_graph: Path, compute: str, image: np.ndarray) -> list[dict[str, Any]]:
    """Return OpenVINO's time by part of the network, kind and kernel, the largest first, in milliseconds a run.

    Args:
        path: the graph that is profiled.
        float_graph: the same network; its node's metadata says to which part a node belongs.
        compute: what float parts are computed in.
        image: (1, 3, height, width).
    """
    import onnx
    import openvino

    from medseg_trt.sessions.openvino import TYPES

    parts = _parts(onnx.load(path, load_external_data=False), onnx.load(float_graph, load_external_data=False))
    core = openvino.Core()
    model = core.read_model(str(path))
    model.reshape({"pixel_values": list(image.shape)})
    compiled = core.compile_model(
        model,
        "CPU",
        {"INFERENCE_PRECISION_HINT": TYPES[compute], "PERFORMANCE_HINT": "LATENCY", "PERF_COUNT": True},
    )
    request = compiled.create_infer_request()
    for _ in range(PROFILED_RUNS):
        request.infer([image])
    times: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for node in request.profiling_info:  # averages over the runs of this request
        if node.status == openvino.ProfilingInfo.Status.EXECUTED:
            key = (_part(node.node_name, parts), node.node_type, node.exec_type)
            times[key].append(node.real_time.total_seconds() * 1000)
    total = sum(map(sum, times.values()))
    rows = [
        {
            "part": part,
            "kind": kind,
            "kernel": kernel,
            "nodes": len(milliseconds),
            "ms": sum(milliseconds),
            "share": sum(milliseconds) / total,
        }
        for (part, kind, kernel), milliseconds in times.items()
    ]
    return sorted(rows, key=lambda milliseconds: -milliseconds["ms"])


def _parts(*models: Any) -> dict[str, str]:
    from medseg_trt.export.graph.parts import part_of

    part_of_node: dict[str, str] = {}
    for node in (node for model in models for node in model.graph.node):
        namespace = next((entry.value for entry in node.metadata_props if entry.key == "namespace"), "")
        if namespace:
            part_of_node |= dict.fromkeys((node.name, *node.output), part_of(namespace))
    return part_of_node


def _part(name: str, parts: dict[str, str]) -> str:
    """Find the part of an executed node, whose name begins with that of the node it was made from, or ends so."""
    words = name.partition("/")[0]
    candidates = [known for known in parts if words == known or words.startswith(f"{known}_")]
    return parts[max(candidates, key=len)] if candidates else "other"
