"""Run a graph with ONNX Runtime on the CPU."""

from pathlib import Path
from typing import Any

from jaxtyping import Float32
from numpy import ndarray

from medseg_trt.errors import ArtefactError, require
from medseg_trt.session import Session

ERRORS_ONLY = 3  # of ONNX Runtime's log levels


class OnnxRuntimeSession(Session):
    """An open ONNX Runtime session."""

    backend = "onnxruntime"
    device = "CPU"

    def __init__(self, session: Any, description: str) -> None:
        self._session: Any = session
        self._input = session.get_inputs()[0]
        self.description = description

    def run(self, batch: Float32[ndarray, "batch 3 height width"]) -> Float32[ndarray, "batch classes height width"]:
        """Return the logits of a batch of prepared images.

        Raises:
            ValueError: the batch is of another size than the network.
        """
        if list(batch.shape[1:]) != self._input.shape[1:]:
            raise ValueError(f"the batch is {batch.shape}, but the network takes {self._input.shape}")
        (logits,) = self._session.run(None, {self._input.name: batch})
        return logits

    def close(self) -> None:
        """Free the network."""
        self._session = None


def open_graph(path: Path, precision: str, threads: int | None) -> OnnxRuntimeSession:
    """Open an ONNX file.

    Raises:
        MissingExtraError: ONNX Runtime is not installed.
        ArtefactError: it refuses the graph.
    """
    runtime = require("onnxruntime", "cpu")
    options = runtime.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common base but Exception
        raise ArtefactError(
            f"ONNX Runtime {runtime.__version__} refuses {path}: {str(error).splitlines()[0]}"
        ) from error
    return OnnxRuntimeSession(session, f"ONNX Runtime {runtime.__version__} {precision}{_threads(threads)}")


def _threads(threads: int | None) -> str:
    return "" if threads is None else f", {threads} thread{'s' if threads > 1 else ''}"
