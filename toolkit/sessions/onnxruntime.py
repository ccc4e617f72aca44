"""Run a graph with ONNX Runtime on the CPU."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float32, UInt8
from numpy import ndarray

from medseg_trt.errors import ArtefactError, DeviceError, require
from medseg_trt.export.graph.interface import MASK, OUTPUT, size_inputs
from medseg_trt.imaging.preprocess import Size
from medseg_trt.sessions.base import Session

ERRORS_ONLY = 3  # of ONNX Runtime's log levels
# ONNX Runtime 1.30 replaces products between coders whose scales are in 16 bits by its integer kernels, and gets them
# wrong: on the demo's network the logits then have 9 dB left of 37.
KEEP_CODERS, KEPT_CODERS = "session.disable_quant_qdq", ("+fp16", "fp8")  # and it knows no product of fp8


class OnnxRuntimeSession(Session):
    """An open ONNX Runtime session."""

    backend = "onnxruntime"
    device = "CPU"

    def __init__(self, session: Any, description: str) -> None:
        self._session: Any = session
        self._input, *further = session.get_inputs()
        self._sizes = [value.name for value in further]
        self.gives_masks = bool(further)
        self.description = description

    def run(self, batch: Float32[ndarray, "batch 3 height width"]) -> Float32[ndarray, "batch classes height width"]:
        """Return the logits of a batch of prepared images.

        Raises:
            ValueError: the batch is of another size than the network.
        """
        if list(batch.shape[1:]) != self._input.shape[1:]:
            raise ValueError(f"the batch is {batch.shape}, but the network takes {self._input.shape}")
        own = batch.shape[2:]
        return self._run(OUTPUT, batch, own, own)

    def masks(
        self, batch: Float32[ndarray, "batch 3 _ _"], size: Size, resampled: Size
    ) -> UInt8[ndarray, "batch height width"]:
        """Return the labels of a batch of prepared images at the size of their sources, see ``Session``."""
        return self._run(MASK, batch, size, resampled)

    def _run(self, output: str, batch: ndarray, size: Sequence[int], resampled: Sequence[int]) -> ndarray:
        sizes = size_inputs(self._sizes, size, resampled)
        return self._session.run([output], {self._input.name: batch, **sizes})[0]

    def close(self) -> None:
        """Free the network."""
        self._session = None


def open_graph(path: Path, precision: str, threads: int | None, compute_dtype: str) -> OnnxRuntimeSession:
    """Open an ONNX file.

    Args:
        path: the graph.
        precision: of the graph, for the description.
        threads: CPU threads; None leaves it to ONNX Runtime, which takes one per physical core.
        compute_dtype: what its float parts are computed in; only fp32 here.

    Raises:
        MissingExtraError: ONNX Runtime is not installed.
        DeviceError: ``compute_dtype`` is another type.
        ArtefactError: ONNX Runtime refuses the graph.
    """
    if compute_dtype != "fp32":
        raise DeviceError(f"ONNX Runtime's CPU kernels do not compute in {compute_dtype}; choose --backend openvino")
    runtime = require("onnxruntime", "cpu")
    options = runtime.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    if threads is not None:
        options.intra_op_num_threads = threads
    if needs_options(precision):
        options.add_session_config_entry(KEEP_CODERS, "1")
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common base but Exception
        raise ArtefactError(
            f"ONNX Runtime {runtime.__version__} refuses {path}: {str(error).splitlines()[0]}"
        ) from error
    return OnnxRuntimeSession(session, f"ONNX Runtime {runtime.__version__} {precision}{_threads(threads)}")


def needs_options(precision: str) -> bool:
    """Say whether ONNX Runtime computes a precision wrongly unless it is opened with options of ours."""
    return any(word in precision for word in KEPT_CODERS)


def _threads(threads: int | None) -> str:
    return "" if threads is None else f", {threads} thread{'s' if threads > 1 else ''}"
