"""Profile the layers of a network with the back-end's own profiler, in a child process.

A step is what the back-end compiled from one or more nodes of the graph. It is assigned to a part of the network by its
name, or by its neighbours where it has lost its name. Profiling costs time, so their sum exceeds the latency. The
child is ``python -P -m medseg_trt.bench.layer_times``.
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
from medseg_trt.devices import ComputeDevice
from medseg_trt.errors import MedsegError, require
from medseg_trt.export.graph.interface import INPUT, OUTPUT, size_inputs
from medseg_trt.processes import ChildProcess, parent
from medseg_trt.spec import LIBRARY_NAMES

if TYPE_CHECKING:
    from medseg_trt.export.engine_layers import EngineLayer
    from medseg_trt.export.graph.node_costs import NodeCost

RUNS = 20  # that are counted, after WARM_UP uncounted runs
WARM_UP = 3
TIMEOUT_S = 300.0
PRODUCTS = (
    "Conv",
    "MatMul",
    "Gemm",
    "FullyConnected",
    "Attention",
    "ScaledDotProductAttention",
)  # substrings of the kind of a step that multiplies matrices
OTHER = "other"


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One entry of a back-end's profile."""

    name: str
    kind: str
    kernel: str
    ms: float  # of one run
    bytes: int | None


def profile(
    graph: Path,
    backend: str,
    precision: str,
    compute: str,
    image: np.ndarray,
    costs: Sequence["NodeCost"],
    cuda: int = 0,
) -> Profile | Missing:
    """Profile a graph.

    Args:
        graph: the ONNX file, or for an engine the folder of its bundle.
        backend: a key of ``sessions.backends.BACKENDS``.
        precision: of the graph.
        compute: what float parts are computed in.
        image: (1, 3, height, width) float32.
        costs: of the graph's nodes.
        cuda: the number of the GPU, for a back-end that takes one.
    """
    if backend not in PROFILERS:
        return Missing(reason=f"{backend} has no profiler of layers here")
    request = {
        "backend": backend,
        "path": str(graph.resolve()),
        "precision": precision,
        "compute": compute,
        "cuda": cuda,
    }
    try:
        with (
            TemporaryDirectory() as folder,  # for files that a back-end leaves behind
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
    """Assign the steps to the network's parts, and sum up their times."""
    total = fsum(step.ms for step in steps)
    if not total:
        return Missing(reason=f"{tool} lists no step that took time")
    known = {name: cost for cost in costs for name in cost.names}
    step_costs = [_cost_of(step.name, known) for step in steps]
    layers = [
        _layer_time(step, cost, part, total)
        for step, cost, part in zip(steps, step_costs, _parts(step_costs), strict=True)
    ]
    macs: dict[str, int] = defaultdict(int)
    for cost in costs:
        macs[cost.part] += cost.macs
    names = dict.fromkeys([*macs, *(layer.part for layer in layers)])
    parts = [_part_time(name, [layer for layer in layers if layer.part == name], macs.get(name, 0)) for name in names]
    return Profile(
        tool=tool,
        runs=RUNS,
        total_ms=total,
        parts=tuple(sorted(parts, key=lambda part: -part.ms)),
        layers=tuple(sorted(layers, key=lambda layer: -layer.ms)),
    )


def _layer_time(step: Step, cost: "NodeCost | None", part: str, total_ms: float) -> LayerTime:
    is_product = any(kind in step.kind for kind in PRODUCTS)
    return LayerTime(
        name=step.name,
        kind=step.kind,
        kernel=step.kernel,
        part=part,
        runs=RUNS,
        ms=step.ms,
        share=step.ms / total_ms,
        macs=cost.macs or None if cost is not None and is_product else None,
        bytes=step.bytes,
    )


def _part_time(name: str, layers: Sequence[LayerTime], macs: int) -> PartTime:
    return PartTime(
        part=name,
        ms=fsum(layer.ms for layer in layers),
        share=fsum(layer.share for layer in layers),
        macs=macs,
        steps=len(layers),
    )


def _parts(step_costs: Sequence["NodeCost | None"]) -> list[str]:
    """Return the part of every step; a step without a known name is in a part if both its neighbours are."""

    def filled(costs: Iterable["NodeCost | None"]) -> list[str]:
        last, parts = OTHER, list[str]()
        for cost in costs:
            last = cost.part if cost else last
            parts.append(last)
        return parts

    before, after = filled(step_costs), filled(reversed(step_costs))[::-1]
    return [first if first == second else OTHER for first, second in zip(before, after, strict=True)]


def _cost_of(step: str, known: Mapping[str, "NodeCost"]) -> "NodeCost | None":
    """Return the node that a step was compiled from: its name begins with that of the node or of one of its outputs."""
    words = step.partition("/")[0]
    candidates = [name for name in known if words == name or words.startswith(f"{name}_")]
    return known[max(candidates, key=len)] if candidates else None


def _feeds(image: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the inputs of a graph for a prepared image; masks are computed at the network's size."""
    own = image.shape[2:]
    return {INPUT: image, **size_inputs([name for name in names if name != INPUT], own, own)}


def _onnxruntime(
    path: Path, precision: str, compute: str, image: np.ndarray, folder: Path, cuda: int
) -> tuple[str, list[Step]]:
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
    """Read ONNX Runtime's trace: one event per node and run, in microseconds; warm-up runs are left out."""
    events_of_node: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            events_of_node[event["args"]["node_index"]].append(event)
    return [_step_of_events(node_events) for node_events in events_of_node.values() if len(node_events) > WARM_UP]


def _step_of_events(events: Sequence[Mapping[str, Any]]) -> Step:
    name, arguments = events[0]["name"], events[0]["args"]
    return Step(
        name=name.removesuffix("_kernel_time"),
        kind=arguments["op_name"],
        kernel=arguments["provider"],
        ms=float(np.median([event["dur"] for event in events[WARM_UP:]])) / 1000,
        bytes=sum(int(arguments[key]) for key in ("parameter_size", "activation_size", "output_size")),
    )


def _openvino(
    path: Path, precision: str, compute: str, image: np.ndarray, folder: Path, cuda: int
) -> tuple[str, list[Step]]:
    openvino = require("openvino", "openvino")
    from medseg_trt.sessions.openvino import compiled

    request = compiled(path, None, compute, {"PERF_COUNT": True}).create_infer_request()
    feeds = _feeds(image, [value.any_name for value in request.model_inputs])
    for _ in range(WARM_UP + RUNS):
        request.infer(feeds)
    steps = [  # times are averages over all runs of this request, warm-up included
        Step(
            name=node.node_name,
            kind=node.node_type,
            kernel=node.exec_type,
            ms=1000 * node.real_time.total_seconds(),
            bytes=None,
        )
        for node in request.profiling_info
        if node.status == openvino.ProfilingInfo.Status.EXECUTED
    ]
    return f"OpenVINO {openvino.__version__.partition('-')[0]} PERF_COUNT", steps


def _engine(
    library: str, path: Path, precision: str, compute: str, image: np.ndarray, folder: Path, cuda: int
) -> tuple[str, list[Step]]:
    """Time the layers of a bundle's engine; the layer report beside the plan maps their names to nodes."""
    from medseg_trt.inspection.engine import read_layer_report
    from medseg_trt.sessions.session_request import SessionRequest
    from medseg_trt.sessions.subprocess_session import open_network
    from medseg_trt.sessions.tensorrt import TensorRtSession

    request = SessionRequest(
        backend=library,
        path=path,
        precision=precision,
        compute_dtype=compute,
        device=ComputeDevice("cuda", cuda),
    )
    with open_network(request) as session:
        assert isinstance(session, TensorRtSession)
        assert session.plan is not None
        times = session.layer_times(image, RUNS)
        known = {layer.name: layer for layer in read_layer_report(session.plan).layers}
    steps = [_step(name, float(np.median(samples)), known.get(name)) for name, samples in times.items()]
    return f"{LIBRARY_NAMES[library]} IProfiler", steps


def _step(name: str, ms: float, layer: "EngineLayer | None") -> Step:
    if layer is None:
        return Step(name=name, kind="unknown", kernel="unknown", ms=ms, bytes=None)
    kind = "MatMul" if layer.is_product else layer.kind
    return Step(name="/".join([*layer.nodes[:1], name]), kind=kind, kernel=layer.kernel, ms=ms, bytes=layer.bytes)


Profiler = Callable[[Path, str, str, np.ndarray, Path, int], tuple[str, list[Step]]]
PROFILERS: Mapping[str, Profiler] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    **{library: partial(_engine, library) for library in LIBRARY_NAMES},
}


def main() -> None:
    """Profile the requested graph with the image that the parent sends, and reply with the steps."""
    with parent() as (request, connection):
        announced = connection.receive()
        assert announced is not None
        image = connection.receive_array(**announced)
        profiler, folder = PROFILERS[request["backend"]], Path.cwd()
        tool, steps = profiler(
            Path(request["path"]), request["precision"], request["compute"], image, folder, request["cuda"]
        )
        connection.send({"tool": tool, "steps": [asdict(step) for step in steps]})


if __name__ == "__main__":
    main()
