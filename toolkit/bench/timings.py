"""Time all rows of a report, one process per row: starts, three scopes, throughput, memory, energy."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from statistics import median

import numpy as np
from numpy import ndarray

from medseg_trt.bench.candidates import Candidate
from medseg_trt.bench.claims import objection, other_device
from medseg_trt.bench.device_rounds import DeviceRounds, binding_warnings
from medseg_trt.bench.energy import Meter, energy, open_meter
from medseg_trt.bench.gpu_clocks import GpuClock, read_clock
from medseg_trt.bench.gpu_memory import used_memory_mb
from medseg_trt.bench.measure import HOST_CLOCK, RoundTimes, interleaved_rounds, latency, timing_warnings
from medseg_trt.bench.missing import Missing
from medseg_trt.bench.timed_session import EndToEndCase, MeasuredSession
from medseg_trt.bench.timing_schema import Energy, Latency, Memory, OnGpu, Scope, Speedup, Start, Throughput, Tier
from medseg_trt.errors import MedsegError
from medseg_trt.machine import cores
from medseg_trt.metrics.intervals import speed_interval
from medseg_trt.progress import LOG
from medseg_trt.sessions.device_times import DeviceTimes

BATCHES = (1, 4, 8)
THROUGHPUT_SHARE, MIN_THROUGHPUT_S = 0.1, 0.3  # of the tier's seconds, for every combination of batch and callers
ENERGY_S = 2.0  # RAPL counts a thousand times a second
ON_CPU = "the processor reads images from its own memory, so nothing is transferred: the same as the model alone"
NO_TIME = "every time was implausible: negative, or a thousand times the median"
NOT_REACHED = "not reached: the measurement was interrupted before"
NO_DEVICE_TIME = "this back-end does not report the time on the GPU without transfers"
CUDA_EVENTS = "CUDA events"
GPU_WARMUP_S = 0.2  # before each turn: a GPU's clock falls within milliseconds of idleness
FILE_CACHE = "warm: the files had been read before, so the disk is not in these times"


@dataclass(kw_only=True)
class Timings:
    """The measurements of one row so far."""

    start: Start | Missing
    latency: dict[Scope, Latency | Missing] = field(default_factory=dict[Scope, Latency | Missing])
    stages_ms: dict[str, float] = field(default_factory=dict[str, float])
    throughput: tuple[Throughput, ...] | None = None
    memory: Memory | Missing | None = None
    energy: Energy | Missing | None = None
    on_gpu: OnGpu | Missing | None = None
    failure: str | None = None
    warnings: list[str] = field(default_factory=list[str])


def open_candidates(
    candidates: Sequence[Candidate], image: ndarray, starts: int, stack: ExitStack
) -> tuple[dict[str, MeasuredSession], dict[str, Timings]]:
    """Start every candidate ``starts`` times, each time in a new process; keep the last session open.

    A candidate that does not start has a failure instead of a session. Peers are opened last: where the memory of a GPU
    does not suffice for all rows, they are the ones that fail.
    """
    sessions: dict[str, MeasuredSession] = {}
    timings: dict[str, Timings] = {}
    peers_last = sorted(candidates, key=lambda candidate: candidate.role == "peer")
    for number, candidate in enumerate(peers_last, 1):
        LOG.info("load network %d of %d: %s", number, len(candidates), candidate.name)
        start_times: list[tuple[float, float, float]] = []
        try:
            for start in range(starts):
                session = MeasuredSession(candidate.request)
                try:
                    (first_ms,) = session.time(image, 0.0, 1)
                except BaseException:
                    session.close()
                    raise
                start_times.append((session.open_ms + first_ms, session.load_ms, first_ms))
                if start < starts - 1:
                    session.close()
                else:
                    sessions[candidate.name] = stack.enter_context(session)
        except MedsegError as error:
            timings[candidate.name] = Timings(start=Missing(reason=str(error)), failure=str(error))
            continue
        total, load, first = min(start_times)
        timings[candidate.name] = Timings(
            start=Start(
                starts=starts,
                import_ms=total - load - first,
                load_ms=load,
                first_ms=first,
                to_first_mask_ms=total,
                file_cache=FILE_CACHE,
            )
        )
    return sessions, timings


def time_all(
    sessions: Mapping[str, MeasuredSession],
    timings: Mapping[str, Timings],
    batch: ndarray,
    case: EndToEndCase | Missing,
    tier: Tier,
    throughput_batches: Sequence[int] = BATCHES,
    gpu_number: int = 0,
) -> None:
    """Fill in the timings of all open sessions, and close each after its last measurement or its first error.

    Rounds are interleaved, so all rows are open meanwhile, each in a process with a CUDA context of its own.

    Args:
        sessions: by row.
        timings: by row; rows without a session stay unchanged.
        batch: (batch, 3, H, W) float32, for the network alone.
        case: for the end-to-end scope, or the reason why it cannot be measured.
        tier: duration and number of runs.
        throughput_batches: batch sizes.
        gpu_number: of the GPU that sessions run on, for its clock and its meter.
    """
    LOG.info("time %d networks alone, %g s each", len(sessions), tier.duration_s)
    loaded = {name: _memory(session) for name, session in sessions.items()}
    scopes: dict[str, Scope] = {
        name: "model" if _on_cpu(session) else "model+transfers" for name, session in sessions.items()
    }
    _time_interleaved(
        sessions, timings, scopes, lambda name, seconds, runs: sessions[name].time(batch, seconds, runs), tier
    )
    for name in sessions:
        timings[name].latency.setdefault("model+transfers", Missing(reason=ON_CPU))
    _time_on_devices(sessions, timings, batch, tier, gpu_number)
    _time_end_to_end(sessions, timings, case, tier)
    for name, session in sessions.items():
        row = timings[name]
        if row.failure is not None:
            continue
        try:
            row.memory = _memory_of(session, loaded[name])
            row.energy = _energy(session, batch, gpu_number)
            row.throughput = _throughput(session, batch, tier, throughput_batches)
        except MedsegError as error:
            row.failure = str(error)
        finally:
            session.close()


def speedups(reference: Timings, row: Timings, reference_device: str, device: str) -> dict[Scope, Speedup | Missing]:
    """Return the ratio of the reference's median to the row's, in every scope; none between two devices."""
    refused = other_device(reference_device, device)
    if refused is not None:
        return dict.fromkeys(row.latency, Missing(reason=refused))
    factors: dict[Scope, Speedup | Missing] = {}
    for scope, slow in reference.latency.items():
        fast = row.latency.get(scope, Missing(reason="not measured"))
        if isinstance(fast, Missing):
            factors[scope] = fast
        elif isinstance(slow, Missing):
            factors[scope] = slow
        else:
            factors[scope] = _speedup(slow, fast)
    return factors


def _speedup(reference: Latency, row: Latency) -> Speedup | Missing:
    interleaved = len(reference.rounds_ms) == len(row.rounds_ms)  # a clock jump can remove a whole round
    speed = speed_interval(reference.rounds_ms, row.rounds_ms, interleaved=interleaved)
    refused = objection(reference, row, speed)
    if refused is not None or speed.confidence is None:
        return Missing(reason=f"no ratio is claimed: {refused}")
    return Speedup(
        ratio=speed.estimate, low=speed.low, high=speed.high, confidence=speed.confidence, rounds=speed.units
    )


def _time_end_to_end(
    sessions: Mapping[str, MeasuredSession], timings: Mapping[str, Timings], case: EndToEndCase | Missing, tier: Tier
) -> None:
    alive = {name: session for name, session in sessions.items() if timings[name].failure is None}
    if isinstance(case, Missing):
        for name in alive:
            timings[name].latency["end-to-end"] = case
        return
    LOG.info("time %d networks from the image file to the mask file, %g s each", len(alive), tier.duration_s)
    stages: dict[str, dict[str, list[float]]] = {name: {} for name in alive}

    def timed_round(name: str, seconds: float, runs: int) -> list[float]:
        samples, parts = alive[name].time_end_to_end(case, seconds, runs)
        for stage, stage_samples in parts.items():
            stages[name].setdefault(stage, []).extend(stage_samples)
        return samples

    _time_interleaved(alive, timings, dict.fromkeys(alive, "end-to-end"), timed_round, tier)
    for name in alive:
        timings[name].stages_ms = {stage: median(samples) for stage, samples in stages[name].items() if samples}


def _time_on_devices(
    sessions: Mapping[str, MeasuredSession],
    timings: Mapping[str, Timings],
    batch: ndarray,
    tier: Tier,
    gpu_number: int,
) -> None:
    """Time the networks on GPUs without transfers, by the devices' own clocks."""
    alive = {
        name: session for name, session in sessions.items() if timings[name].failure is None and not _on_cpu(session)
    }
    without_clock: set[str] = set()
    rounds_of = {name: DeviceRounds() for name in alive}
    latest: dict[str, DeviceTimes] = {}
    clocks: dict[str, GpuClock | None] = {}

    def timed_round(name: str, seconds: float, runs: int) -> list[float]:
        with ThreadPoolExecutor(1) as pool:  # beside the work: with its end, the clock falls and nothing holds it back
            looking = pool.submit(read_clock, gpu_number)
            times = alive[name].time_on_device(batch, seconds, runs)
            clocks[name] = looking.result()
        if times is None:
            without_clock.add(name)
            return []
        latest[name] = times
        return times.compute_ms

    def keep(name: str) -> None:
        rounds_of[name].add(latest[name])
        rounds_of[name].look(clocks[name])

    scopes: dict[str, Scope] = dict.fromkeys(alive, "model")
    _time_interleaved(alive, timings, scopes, timed_round, tier, CUDA_EVENTS, keep)
    for name, rounds in rounds_of.items():
        row = timings[name]
        row.on_gpu, alone = rounds.summary(), row.latency["model"]
        if isinstance(row.on_gpu, OnGpu) and isinstance(alone, Latency):
            row.warnings += binding_warnings(alone, row.on_gpu)
    for name in without_clock:
        timings[name].latency["model"] = timings[name].on_gpu = Missing(reason=NO_DEVICE_TIME)


def _time_interleaved(
    sessions: Mapping[str, MeasuredSession],
    timings: Mapping[str, Timings],
    scopes: Mapping[str, Scope],
    timed_round: Callable[[str, float, int], list[float]],
    tier: Tier,
    timer: str = HOST_CLOCK,
    after_turn: Callable[[str], None] = lambda _name: None,
) -> None:
    """Time all rows in interleaved rounds and summarise them, also after an interrupt."""
    times_of: dict[str, RoundTimes] = {}

    def closed_on_failure(name: str, seconds: float, runs: int) -> list[float]:
        try:
            return timed_round(name, seconds, runs)
        except MedsegError:  # of too little memory, perhaps: the other rows have its own from now on
            sessions[name].close()
            raise

    rounds = {name: partial(closed_on_failure, name) for name in sessions}
    warmups_s = {name: GPU_WARMUP_S for name, session in sessions.items() if not _on_cpu(session) and tier.duration_s}
    try:
        interleaved_rounds(rounds, tier, times=times_of, turn_warmup_s=warmups_s, after_turn=after_turn)
    finally:
        _keep_whole_rounds(times_of)
        for name, times in times_of.items():
            row, device, scope = timings[name], sessions[name].device, scopes[name]
            summary = latency(times, device, timer)
            row.failure = row.failure or times.failure
            row.latency[scope] = summary or Missing(
                reason=times.failure or (NO_TIME if times.rounds_ms else NOT_REACHED)
            )
            row.warnings += timing_warnings(summary, device, scope) if summary is not None else []


def _keep_whole_rounds(times_of: Mapping[str, RoundTimes]) -> None:
    """Drop the round that an interrupt cut short, where others are complete, so that rounds stay pairs."""
    alive = [times for times in times_of.values() if times.failure is None]
    complete = min((len(times.rounds_ms) for times in alive), default=0)
    for times in alive if complete else ():
        times.rounds_ms = times.rounds_ms[:complete]


def _throughput(session: MeasuredSession, batch: ndarray, tier: Tier, batches: Sequence[int]) -> tuple[Throughput, ...]:
    seconds = max(MIN_THROUGHPUT_S, THROUGHPUT_SHARE * tier.duration_s)
    callers = cores()
    settings: list[tuple[int, int, int | None]] = [(size, 1, None) for size in batches]
    if callers > 1 and session.takes_callers:
        settings.append((1, callers, 1 if _on_cpu(session) else None))  # on a GPU they share one session
    throughputs: list[Throughput] = []
    for size, streams, threads in settings:
        count, elapsed_s = session.throughput(np.resize(batch, (size, *batch.shape[1:])), streams, threads, seconds)
        throughputs.append(
            Throughput(
                batch=size,
                streams=streams,
                threads=threads,
                images_per_s=size * count / elapsed_s,
                images=size * count,
                seconds=elapsed_s,
            )
        )
    return tuple(throughputs)


def _energy(session: MeasuredSession, batch: ndarray, gpu_number: int) -> Energy | Missing:
    meter = open_meter(session.device, gpu_number)
    if not isinstance(meter, Meter):
        return meter
    try:
        return energy(lambda: len(batch) * len(session.time(batch, ENERGY_S, 1)), meter)
    finally:
        meter.close()


def _memory(session: MeasuredSession) -> Mapping[str, float]:
    try:
        return session.memory()
    except MedsegError:  # it died; the next call reports it
        return {}


def _memory_of(session: MeasuredSession, loaded: Mapping[str, float]) -> Memory | Missing:
    now = session.memory()
    if not loaded or not now:
        return Missing(reason="this system does not report the memory of a process: there is no /proc")
    return Memory(
        loaded_mb=loaded["resident_mb"],
        peak_mb=now["peak_resident_mb"],
        anonymous_mb=now["anonymous_mb"],
        device_mb=_device_memory(session),
    )


def _device_memory(session: MeasuredSession) -> float | Missing:
    if _on_cpu(session):
        return Missing(reason="it runs on the processor, in the host's memory")
    return used_memory_mb(session.process_id)


def _on_cpu(session: MeasuredSession) -> bool:
    return session.device.upper().startswith("CPU")
