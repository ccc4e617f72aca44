"""Find out where a network's time goes: what the back-end itself says of every step, in a process of its own.

A step is what the back-end made of the graph's nodes; by its name, or by its neighbours where it has lost that, it is
led back to the part of the network. Looking costs time, so the steps' sum is more than the latency.
``python -P -m medseg_trt.bench.layer_times`` is the child.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import fsum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from medseg_trt.bench.missing import Missing
from medseg_trt.bench.profile_schema import LayerTime, PartTime, Profile
from medseg_trt.errors import MedsegError, require
from medseg_trt.export.graph.interface import INPUT, OUTPUT, size_inputs
from medseg_trt.processes import ChildProcess, parent
from medseg_trt.spec import LIBRARY_NAMES

if TYPE_CHECKING:
    from medseg_trt.export.engine_layers import EngineLayer
    from medseg_trt.export.graph.node_costs import NodeCost

RUNS = 20  # counted, after as many uncounted ones as WARM_UP
WARM_UP = 3
TIMEOUT_S = 300.0
PRODUCTS = (
    "Conv",
    "MatMul",
    "Gemm",
    "FullyConnected",
    "Attention",
    "ScaledDotProductAttention",
)  # within a kind's name
OTHER = "other"


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What a back-end executes."""

    name: str
    kind: str
    kernel: str
    ms: float  # of one run
    bytes: int | None


def profile(
    graph: Path, backend: str, precision: str, compute: str, image: np.ndarray, costs: Sequence["NodeCost"]
) -> Profile | Missing:
    """Profile a graph.

    Args:
        graph: the ONNX file, or for an engine the folder of its bundle.
        backend: a key of ``sessions.backends.BACKENDS``.
        precision: of the graph.
        compute: what float parts are computed in.
        image: (1, 3, height, width) float32.
        costs: of the graph's nodes.
    """
    if backend not in PROFILERS:
        return Missing(reason=f"{backend} says nothing of single steps here")
    request = {"backend": backend, "path": str(graph.resolve()), "precision": precision, "compute": compute}
    try:
        with (
            TemporaryDirectory() as folder,  # a back-end that leaves files leaves them there
            ChildProcess(
                "medseg_trt.bench.layer_times",
                request,
                backend,
                consequence="it has no profile",
                cwd=Path(folder),
                timeout_s=TIMEOUT_S,
            ) as child,
        ):
            reply = child.call({}, image)
    except MedsegError as error:
        return Missing(reason=f"{backend} could not be profiled: {error}")
    return summed_up(reply["tool"], [Step(**step) for step in reply["steps"]], costs)


def summed_up(tool: str, steps: Sequence[Step], costs: Sequence["NodeCost"]) -> Profile | Missing:
    """Lead the steps back to the network's parts, and sum up."""
    total = fsum(step.ms for step in steps)
    if not total:
        return Missing(reason=f"{tool} names no step that took time")
    known = {name: cost for cost in costs for name in cost.names}
    found = [_cost_of(step.name, known) for step in steps]
    layers: list[LayerTime] = []
    for step, cost, part in zip(steps, found, _parts(found), strict=True):
        is_product = cost is not None and any(word in step.kind for word in PRODUCTS)
        layers.append(
            LayerTime(
                name=step.name, kind=step.kind, kernel=step.kernel, part=part, runs=RUNS,
                ms=step.ms, share=step.ms / total, macs=cost.macs or None if cost and is_product else None,
                bytes=step.bytes,
            )
        )  # fmt: skip
    macs: dict[str, int] = defaultdict(int)
    for cost in costs:
        macs[cost.part] += cost.macs
    parts = [
        PartTime(
            part=part, ms=fsum(each.ms for each in layers if each.part == part),
            share=fsum(each.share for each in layers if each.part == part), macs=macs.get(part, 0),
            steps=sum(each.part == part for each in layers),
        )
        for part in dict.fromkeys([*macs, *(each.part for each in layers)])
    ]  # fmt: skip
    return Profile(
        tool=tool, runs=RUNS, total_ms=total, parts=tuple(sorted(parts, key=lambda each: -each.ms)),
        layers=tuple(sorted(layers, key=lambda each: -each.ms)),
    )  # fmt: skip


def _parts(found: Sequence["NodeCost | None"]) -> list[str]:
    """Return the part of every step; one that has lost its name lies in a part if the steps before and after it do."""

    def filled(costs: Iterable["NodeCost | None"]) -> list[str]:
        last, parts = OTHER, list[str]()
        for cost in costs:
            last = cost.part if cost else last
            parts.append(last)
        return parts

    before, after = filled(found), filled(reversed(found))[::-1]
    return [first if first == second else OTHER for first, second in zip(before, after, strict=True)]


def _cost_of(step: str, known: Mapping[str, "NodeCost"]) -> "NodeCost | None":
    """Find the node that a step was made from: its name begins with the node's, or with that of a value it makes."""
    words = step.partition("/")[0]
    candidates = [name for name in known if words == name or words.startswith(f"{name}_")]
    return known[max(candidates, key=len)] if candidates else None


def _feeds(image: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the inputs of a graph for a prepared image; one that makes masks makes one of the network's own size."""
    own = image.shape[2:]
    return {INPUT: image, **size_inputs([name for name in names if name != INPUT], own, own)}


def _onnxruntime(path: Path, precision: str, compute: str, image: np.ndarray, folder: Path) -> tuple[str, list[Step]]:
    runtime = require("onnxruntime", "cpu")
    options = runtime.SessionOptions()
    options.log_severity_level, options.enable_profiling = 3, True
    options.profile_file_prefix = str(folder / "profile")
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feeds = _feeds(image, [value.name for value in session.get_inputs()])
    for _ in range(WARM_UP + RUNS):
        session.run([OUTPUT], feeds)
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return f"ONNX Runtime {runtime.__version__} profiling", steps_of_trace(events)


def steps_of_trace(events: Sequence[Mapping[str, Any]]) -> list[Step]:
    """Read ONNX Runtime's trace: one event a node and run, in microseconds; the runs of the warm-up are left out."""
    found: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            found[event["args"]["node_index"]].append(event)
    return [
        Step(
            name=taken[0]["name"].removesuffix("_kernel_time"), kind=taken[0]["args"]["op_name"],
            kernel=taken[0]["args"]["provider"],
            ms=float(np.median([event["dur"] for event in taken[WARM_UP:]])) / 1000,
            bytes=sum(int(taken[0]["args"][key]) for key in ("parameter_size", "activation_size", "output_size")),
        )
        for taken in found.values()
        if len(taken) > WARM_UP
    ]  # fmt: skip


def _openvino(path: Path, precision: str, compute: str, image: np.ndarray, folder: Path) -> tuple[str, list[Step]]:
    openvino = require("openvino", "openvino")
    from medseg_trt.sessions.openvino import compiled

    request = compiled(path, None, compute, {"PERF_COUNT": True}).create_infer_request()
    feeds = _feeds(image, [value.any_name for value in request.model_inputs])
    for _ in range(WARM_UP + RUNS):
        request.infer(feeds)
    steps = [  # times are averages over the runs of this request, the first ones included
        Step(name=node.node_name, kind=node.node_type, kernel=node.exec_type,
             ms=1000 * node.real_time.total_seconds(), bytes=None)
        for node in request.profiling_info
        if node.status == openvino.ProfilingInfo.Status.EXECUTED
    ]  # fmt: skip
    return f"OpenVINO {openvino.__version__.partition('-')[0]} PERF_COUNT", steps


def _engine(
    library: str, path: Path, precision: str, compute: str, image: np.ndarray, folder: Path
) -> tuple[str, list[Step]]:
    """Time the layers of the engine of a bundle; the names are the builder's, and its report knows their nodes."""
    from medseg_trt.inspection.engine import read_layer_report
    from medseg_trt.sessions.subprocess_session import open_network
    from medseg_trt.sessions.tensorrt import TensorRtSession

    with open_network(library, path, precision, None, compute) as session:
        assert isinstance(session, TensorRtSession)
        assert session.plan is not None
        taken = session.layer_times(image, RUNS)
        known = {layer.name: layer for layer in read_layer_report(session.plan).layers}
    steps = [_step(name, float(np.median(found)), known.get(name)) for name, found in taken.items()]
    return f"{LIBRARY_NAMES[library]} IProfiler", steps


def _step(name: str, ms: float, layer: "EngineLayer | None") -> Step:
    if layer is None:
        return Step(name=name, kind="unknown", kernel="unknown", ms=ms, bytes=None)
    kind = "MatMul" if layer.is_product else layer.kind
    return Step(name="/".join([*layer.nodes[:1], name]), kind=kind, kernel=layer.kernel, ms=ms, bytes=layer.bytes)


Profiler = Callable[[Path, str, str, np.ndarray, Path], tuple[str, list[Step]]]
PROFILERS: Mapping[str, Profiler] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    **{library: partial(_engine, library) for library in LIBRARY_NAMES},
}


def main() -> None:
    """Profile the graph that the parent names with the image that it sends, and reply with the steps."""
    with parent() as (request, connection):
        announced = connection.receive()
        assert announced is not None
        image = connection.receive_array(**announced)
        profiler = PROFILERS[request["backend"]]
        tool, steps = profiler(Path(request["path"]), request["precision"], request["compute"], image, Path.cwd())
        connection.send({"tool": tool, "steps": [asdict(step) for step in steps]})


if __name__ == "__main__":
    main()
