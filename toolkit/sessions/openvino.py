"""Run a graph with OpenVINO on the CPU.

The graph is compiled for one image at a time: with the batch left open OpenVINO cannot choose its kernels ahead, and on
a CPU a batch gains nothing. OpenVINO would take bfloat16 wherever the processor has it, so the type is always named.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8
from numpy import ndarray

from medseg_trt.errors import ArtefactError, DeviceError, require
from medseg_trt.export.graph.interface import INPUT, MASK, OUTPUT, size_inputs
from medseg_trt.imaging.preprocess import Size
from medseg_trt.machine import cores
from medseg_trt.sessions.backends import NO_BF16
from medseg_trt.sessions.base import Session

TYPES = {"fp32": "f32", "bf16": "bf16"}  # OpenVINO's names


class OpenVinoSession(Session):
    """A compiled OpenVINO model, with a request for each of its streams."""

    backend = "openvino"
    device = "CPU"

    def __init__(self, compiled: Any, description: str, streams: int = 1) -> None:
        self._shape: list[int] = list(compiled.input(0).shape)  # (1, 3, H, W)
        self.streams = streams
        self._requests = SimpleQueue[Any]()
        for _ in range(streams):
            self._requests.put(compiled.create_infer_request())
        self._sizes = [value.any_name for value in compiled.inputs[1:]]
        self.gives_masks = bool(self._sizes)
        self.description = description

    def run(self, batch: Float32[ndarray, "batch 3 height width"]) -> Float32[ndarray, "batch classes height width"]:
        """Return the logits of a batch of prepared images.

        Raises:
            ValueError: the batch is of another size than the network.
        """
        if list(batch.shape[1:]) != self._shape[1:]:
            raise ValueError(f"the batch is {batch.shape}, but the network takes {self._shape}")
        own = batch.shape[2:]
        return self._run(OUTPUT, batch, own, own)

    def masks(
        self, batch: Float32[ndarray, "batch 3 _ _"], size: Size, resampled: Size
    ) -> UInt8[ndarray, "batch height width"]:
        """Return the labels of a batch of prepared images at the size of their sources, see ``Session``."""
        return self._run(MASK, batch, size, resampled)

    def close(self) -> None:
        """Free the network."""
        self._requests = SimpleQueue[Any]()

    def _run(self, output: str, batch: ndarray, size: Sequence[int], resampled: Sequence[int]) -> ndarray:
        sizes = size_inputs(self._sizes, size, resampled)
        results: list[ndarray] = []
        request = self._requests.get()
        try:
            for image in batch:
                request.infer({INPUT: image[np.newaxis], **sizes}, share_inputs=True)
                results.append(request.get_tensor(output).data.copy())
        finally:
            self._requests.put(request)
        return np.concatenate(results)


def open_graph(
    path: Path, precision: str, threads: int | None, compute_dtype: str, streams: int = 1
) -> OpenVinoSession:
    """Compile an ONNX file.

    Args:
        path: the graph, of plain operators: OpenVINO refuses other domains even where a function says what they mean.
        precision: of the graph, for the description.
        threads: CPU threads; None leaves it to OpenVINO.
        compute_dtype: what its float parts are computed in: fp32, or bf16 where the processor has it.
        streams: runs that may overlap, each on its share of the threads; a further one waits.

    Raises:
        MissingExtraError: OpenVINO is not installed.
        DeviceError: the processor has no bfloat16.
        ArtefactError: OpenVINO refuses the graph.
    """
    further = {"NUM_STREAMS": streams, "INFERENCE_NUM_THREADS": threads or cores()} if streams > 1 else None
    model = compiled(path, threads, compute_dtype, further)
    rest = "" if compute_dtype == precision else f", float parts in {compute_dtype}"
    shown = "" if threads is None else f", {threads} thread{'s' if threads > 1 else ''}"
    return OpenVinoSession(model, f"OpenVINO {_release()} {precision}{rest}{shown}", streams)


def compiled(path: Path, threads: int | None, compute_dtype: str, further: Mapping[str, Any] | None = None) -> Any:
    """Return OpenVINO's own object for an ONNX file, compiled for one image.

    Args:
        path: the graph.
        threads: CPU threads; None leaves it to OpenVINO.
        compute_dtype: what its float parts are computed in: fp32, or bf16 where the processor has it.
        further: more of OpenVINO's properties.

    Raises:
        MissingExtraError: OpenVINO is not installed.
        DeviceError: the processor has no bfloat16.
        ArtefactError: OpenVINO refuses the graph.
    """
    require("openvino", "openvino")
    core = _core()
    if compute_dtype == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise DeviceError(NO_BF16)
    options: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": TYPES[compute_dtype],
        "PERFORMANCE_HINT": "LATENCY",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # else it rounds activations before 4- and 8-bit weights on its own
        **(further or {}),
    }
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = threads
    try:
        model = core.read_model(str(path))
        model.reshape({INPUT: [1, *(axis.get_length() for axis in list(model.input(0).partial_shape)[1:])]})
        return core.compile_model(model, "CPU", options)
    except Exception as error:  # its errors have no common base but Exception
        first = next((line for line in str(error).splitlines() if line.strip()), "no reason given")
        raise ArtefactError(f"OpenVINO {_release()} refuses {path}: {first}") from error


@cache
def _core() -> Any:
    """Return the one core of this process, which stays until it ends.

    On processors with large registers (AVX-512) a core gives its thread a stack for signals, and gives back the former
    one when it is freed. Of two cores that are freed in the order in which they were made, the second one gives back
    the first one's, which is gone, and the next signal with a handler ends the process.
    """
    return require("openvino", "openvino").Core()


def _release() -> str:
    return require("openvino", "openvino").__version__.partition("-")[0]
