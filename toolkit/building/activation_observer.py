"""Let a graph tell the values inside it, for calibration and for a look at their range."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from numpy import ndarray

from medseg_trt.errors import require
from medseg_trt.export.graph.save import save_graphs
from medseg_trt.export.graph.trace import INPUT, OnnxGraph
from medseg_trt.export.precision.calibrate import Observe, observed_graph


@contextmanager
def observer(graph: OnnxGraph, names: Sequence[str]) -> Iterator[Observe]:
    """Give a function from a batch to the named values of a float graph, computed by ONNX Runtime."""
    runtime = require("onnxruntime", "cpu")
    inside = [name for name in names if name != INPUT]
    with TemporaryDirectory() as folder:
        save_graphs({"observed.onnx": observed_graph(graph, inside)}, Path(folder), "weights.bin")
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        session = runtime.InferenceSession(
            str(Path(folder, "observed.onnx")), options, providers=["CPUExecutionProvider"]
        )

        def observe(batch: ndarray) -> Mapping[str, ndarray]:
            values = dict(zip(inside, session.run(inside, {INPUT: batch}), strict=True)) if inside else {}
            return values | {INPUT: batch} if INPUT in names else values

        yield observe
