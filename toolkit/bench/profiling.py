"""Profile the networks that were timed, and compare them with the machine's peaks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from numpy import ndarray

from medseg_trt.bench.candidates import Candidate
from medseg_trt.bench.layer_times import profile
from medseg_trt.bench.missing import Missing
from medseg_trt.bench.peaks import peaks, roofline
from medseg_trt.bench.profile_schema import Peak, Profile, Roofline
from medseg_trt.bench.timing_schema import Latency
from medseg_trt.bench.timings import Timings
from medseg_trt.devices import ComputeDevice
from medseg_trt.errors import MedsegError, MissingExtraError, require
from medseg_trt.progress import LOG
from medseg_trt.sessions.backends import BACKENDS


@dataclass(kw_only=True, slots=True)
class Profiling:
    """The machine's peaks, and the profiles and rooflines by row, as far as they were measured."""

    peaks: tuple[Peak, ...] | Missing
    profiles: dict[str, Profile | Missing]
    rooflines: dict[str, Roofline | Missing]

    @classmethod
    def missing(cls, candidates: Sequence[Candidate], reason: str) -> "Profiling":
        """Return one without any measurement, with the reason for it."""
        names, missing = [candidate.name for candidate in candidates], Missing(reason=reason)
        return cls(peaks=missing, profiles=dict.fromkeys(names, missing), rooflines=dict.fromkeys(names, missing))


def profile_all(
    candidates: Sequence[Candidate], timings: Mapping[str, Timings], image: ndarray, profiling: Profiling
) -> None:
    """Fill in the peaks, profiles and rooflines of candidates that have a graph."""
    LOG.info("measure the peaks of this machine: matrix products and copies")
    on_cpu = [candidate for candidate in candidates if not BACKENDS[candidate.backend].gpu]
    on_gpu = [candidate for candidate in candidates if BACKENDS[candidate.backend].gpu]
    of_cpu = peaks([(candidate.backend, candidate.arithmetic) for candidate in on_cpu])
    of_gpu = _gpu_peaks(on_gpu[0].device) if on_gpu else ()
    measured = tuple(peak for some in (of_cpu, of_gpu) if not isinstance(some, Missing) for peak in some)
    profiling.peaks = measured or of_cpu
    for candidate in candidates:
        LOG.info("profile the layers of %s", candidate.name)
        device_peaks = of_gpu if BACKENDS[candidate.backend].gpu else of_cpu
        profiling.profiles[candidate.name], profiling.rooflines[candidate.name] = _profile_one(
            candidate, timings[candidate.name], image, device_peaks
        )


def _gpu_peaks(device: ComputeDevice) -> tuple[Peak, ...] | Missing:
    """Return the peaks of the GPU that all rows on a GPU share."""
    try:
        require("torch", "train")
        from medseg_trt.bench.gpu_peaks import gpu_peaks
        from medseg_trt.train.torch_device import torch_device

        on = torch_device(ComputeDevice("cuda", device.number))
        return gpu_peaks(on) or Missing(reason="PyTorch multiplies no matrices on this GPU")
    except (MedsegError, RuntimeError) as error:  # RuntimeError: of PyTorch, also for too little memory
        return Missing(reason=f"the peaks of the GPU were not measured: {str(error).splitlines()[0]}")


def _profile_one(
    candidate: Candidate, timings: Timings, image: ndarray, device_peaks: tuple[Peak, ...] | Missing
) -> tuple[Profile | Missing, Roofline | Missing]:
    try:
        ir = require("onnx_ir", "export")
    except MissingExtraError as error:
        return Missing(reason=str(error)), Missing(reason=str(error))
    from medseg_trt.export.graph.node_costs import node_costs
    from medseg_trt.export.graph.trace import OnnxGraph

    assert candidate.graph is not None
    costs = node_costs(OnnxGraph(model=ir.load(candidate.graph)))
    network = candidate.path, candidate.backend, candidate.precision, candidate.compute
    layers = profile(*network, image, costs, candidate.device.number)
    latency = timings.latency.get("model", Missing(reason="not measured"))
    if isinstance(device_peaks, Missing):
        return layers, device_peaks
    if not isinstance(latency, Latency):
        return layers, latency
    peak = next((peak for peak in device_peaks if peak.arithmetic == candidate.arithmetic), None)
    if peak is None:
        return layers, Missing(reason=f"nothing here runs a plain {candidate.arithmetic} matrix product")
    return layers, roofline(latency, sum(cost.macs for cost in costs), sum(cost.bytes for cost in costs), peak)
