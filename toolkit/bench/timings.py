"""Time all rows of a report, each in a process of its own: starts, three scopes, throughput, memory, energy."""

import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from statistics import median

import numpy as np
from numpy import ndarray

from medseg_trt.bench.candidates import Candidate
from medseg_trt.bench.claims import objection
from medseg_trt.bench.energy import Meter, energy, open_meter
from medseg_trt.bench.measure import HOST_CLOCK, RoundTimes, interleaved_rounds, latency, timing_warnings
from medseg_trt.bench.missing import Missing
from medseg_trt.bench.timed_session import MeasuredSession, WholeWay
from medseg_trt.bench.timing_schema import Energy, Latency, Memory, Scope, Speedup, Start, Throughput, Tier
from medseg_trt.errors import MedsegError
from medseg_trt.machine import cores
from medseg_trt.metrics.intervals import speed_interval
from medseg_trt.progress import LOG

BATCHES = (1, 4, 8)
THROUGHPUT_SHARE, MIN_THROUGHPUT_S = 0.1, 0.3  # of the tier's seconds, for every combination of batch and callers
ENERGY_S = 2.0  # RAPL counts a thousand times a second
ON_CPU = "the processor reads images where they are, so nothing is transferred: the same as the model alone"
NO_TIME = "every time was one that no run can take"
NOT_REACHED = "not reached: the measurement was ended before"
NO_DEVICE_TIME = "this back-end does not tell how long it takes on the GPU without the copies there and back"
CUDA_EVENTS = "CUDA events"
FILE_CACHE = "warm: the files had been read before, so the disk is not in these times"


@dataclass(kw_only=True)
class Timings:
    """What was measured of one row so far."""

    start: Start | Missing
    latency: dict[Scope, Latency | Missing] = field(default_factory=dict[Scope, Latency | Missing])
    stages_ms: dict[str, float] = field(default_factory=dict[str, float])
    throughput: tuple[Throughput, ...] | None = None
    memory: Memory | Missing | None = None
    energy: Energy | Missing | None = None
    failure: str | None = None
    warnings: list[str] = field(default_factory=list[str])


def open_candidates(
    candidates: Sequence[Candidate], image: ndarray, starts: int, stack: ExitStack
) -> tuple[dict[str, MeasuredSession], dict[str, Timings]]:
    """Start every candidate, several times if wanted, each time in a new process; keep the last one open.

    One that does not start has a failure instead of a session.
    """
    sessions: dict[str, MeasuredSession] = {}
    timings: dict[str, Timings] = {}
    for number, candidate in enumerate(candidates, 1):
        LOG.info("load network %d of %d: %s", number, len(candidates), candidate.name)
        opened: list[tuple[float, float, float]] = []
        try:
            for start in range(starts):
                session = MeasuredSession(
                    candidate.path, candidate.precision, candidate.backend, None, candidate.compute
                )
                try:
                    (first_ms,) = session.time(image, 0.0, 1)
                except BaseException:
                    session.close()
                    raise
                opened.append((session.open_ms + first_ms, session.load_ms, first_ms))
                if start < starts - 1:
                    session.close()
                else:
                    sessions[candidate.name] = stack.enter_context(session)
        except MedsegError as error:
            timings[candidate.name] = Timings(start=Missing(reason=str(error)), failure=str(error))
            continue
        total, load, first = min(opened)
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
    way: WholeWay | Missing,
    tier: Tier,
    throughput_batches: Sequence[int] = BATCHES,
) -> None:
    """Fill in the timings of all open sessions.

    Args:
        sessions: by row.
        timings: by row; rows without a session stay as they are.
        batch: (batch, 3, H, W) float32, for the network alone.
        way: from file to file, or why that cannot be gone.
        tier: how long.
        throughput_batches: images at once.
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
    _time_on_devices(sessions, timings, batch, tier)
    _time_end_to_end(sessions, timings, way, tier)
    for name, session in sessions.items():
        row = timings[name]
        if row.failure is not None:
            continue
        try:
            row.memory = _memory_of(session, loaded[name])
            row.energy = _energy(session, batch)
            row.throughput = _throughput(session, batch, tier, throughput_batches)
        except MedsegError as error:
            row.failure = str(error)


def speedups(reference: Timings, row: Timings) -> dict[Scope, Speedup | Missing]:
    """Return how many times as fast as the reference a row is, in every scope."""
    found: dict[Scope, Speedup | Missing] = {}
    for scope, found_there in reference.latency.items():
        same = isinstance(found_there, Missing) and found_there.reason == ON_CPU  # then it is the model's time
        theirs = reference.latency.get("model", found_there) if same else found_there
        ours = row.latency.get(scope, Missing(reason="not measured"))
        if isinstance(ours, Missing) or isinstance(theirs, Missing):
            found[scope] = ours if isinstance(ours, Missing) else theirs  # pyright: ignore[reportArgumentType]
            continue
        found[scope] = _speedup(theirs, ours)
    return found


def _speedup(theirs: Latency, ours: Latency) -> Speedup | Missing:
    interleaved = len(theirs.rounds_ms) == len(ours.rounds_ms)  # a clock jump can remove a whole round
    speed = speed_interval(theirs.rounds_ms, ours.rounds_ms, interleaved=interleaved)
    refused = objection(theirs, ours, speed)
    if refused is not None or speed.confidence is None:
        return Missing(reason=f"no factor is claimed: {refused}")
    return Speedup(
        ratio=speed.estimate, low=speed.low, high=speed.high, confidence=speed.confidence, rounds=speed.units
    )


def _time_end_to_end(
    sessions: Mapping[str, MeasuredSession], timings: Mapping[str, Timings], way: WholeWay | Missing, tier: Tier
) -> None:
    alive = {name: session for name, session in sessions.items() if timings[name].failure is None}
    if isinstance(way, Missing):
        for name in alive:
            timings[name].latency["end-to-end"] = way
        return
    LOG.info("time %d networks from the image file to the mask file, %g s each", len(alive), tier.duration_s)
    stages: dict[str, dict[str, list[float]]] = {name: {} for name in alive}

    def turn(name: str, seconds: float, runs: int) -> list[float]:
        samples, parts = alive[name].whole_way(way, seconds, runs)
        for stage, taken in parts.items():
            stages[name].setdefault(stage, []).extend(taken)
        return samples

    _time_interleaved(alive, timings, dict.fromkeys(alive, "end-to-end"), turn, tier)
    for name in alive:
        timings[name].stages_ms = {stage: median(samples) for stage, samples in stages[name].items() if samples}


def _time_on_devices(
    sessions: Mapping[str, MeasuredSession], timings: Mapping[str, Timings], batch: ndarray, tier: Tier
) -> None:
    """Time the networks on GPUs without what is copied there and back, by the devices' own clocks."""
    alive = {name: each for name, each in sessions.items() if timings[name].failure is None and not _on_cpu(each)}
    untold: set[str] = set()

    def turn(name: str, seconds: float, runs: int) -> list[float]:
        samples = alive[name].time_on_device(batch, seconds, runs)
        if samples is None:
            untold.add(name)
        return samples or []

    _time_interleaved(alive, timings, dict.fromkeys(alive, "model"), turn, tier, CUDA_EVENTS)
    for name in untold:
        timings[name].latency["model"] = Missing(reason=NO_DEVICE_TIME)


def _time_interleaved(
    sessions: Mapping[str, MeasuredSession],
    timings: Mapping[str, Timings],
    scopes: Mapping[str, Scope],
    turn: Callable[[str, float, int], list[float]],
    tier: Tier,
    timer: str = HOST_CLOCK,
) -> None:
    """Give every row its turns and sum up what they took, even where an interrupt ends them."""
    taken: dict[str, RoundTimes] = {}
    try:
        interleaved_rounds({name: partial(turn, name) for name in sessions}, tier, found=taken)
    finally:
        _keep_whole_rounds(taken)
        for name, each in taken.items():
            row, device, scope = timings[name], sessions[name].device, scopes[name]
            found = latency(each, device, timer)
            row.failure = row.failure or each.failure
            row.latency[scope] = found or Missing(reason=each.failure or (NO_TIME if each.rounds_ms else NOT_REACHED))
            row.warnings += timing_warnings(found, device, scope) if found is not None else []


def _keep_whole_rounds(taken: Mapping[str, RoundTimes]) -> None:
    """Drop the round that an interrupt cut short, where others are complete, so that rounds stay pairs."""
    alive = [each for each in taken.values() if each.failure is None]
    whole = min((len(each.rounds_ms) for each in alive), default=0)
    for each in alive if whole else ():
        each.rounds_ms = each.rounds_ms[:whole]


def _throughput(session: MeasuredSession, batch: ndarray, tier: Tier, batches: Sequence[int]) -> tuple[Throughput, ...]:
    seconds = max(MIN_THROUGHPUT_S, THROUGHPUT_SHARE * tier.duration_s)
    callers = cores()
    ways: list[tuple[int, int, int | None]] = [(size, 1, None) for size in batches]
    if callers > 1:
        ways.append((1, callers, 1 if _on_cpu(session) else None))  # on a GPU they share what is there
    found: list[Throughput] = []
    for size, streams, threads in ways:
        count, spent = session.throughput(np.resize(batch, (size, *batch.shape[1:])), streams, threads, seconds)
        found.append(
            Throughput(
                batch=size,
                streams=streams,
                threads=threads,
                images_per_s=size * count / spent,
                images=size * count,
                seconds=spent,
            )
        )
    return tuple(found)


def _energy(session: MeasuredSession, batch: ndarray) -> Energy | Missing:
    meter = open_meter(session.device)
    if not isinstance(meter, Meter):
        return meter
    try:
        return energy(lambda: len(batch) * len(session.time(batch, ENERGY_S, 1)), meter)
    finally:
        meter.close()


def _memory(session: MeasuredSession) -> Mapping[str, float]:
    try:
        return session.memory()
    except MedsegError:  # it died; whoever asks it next says so
        return {}


def _memory_of(session: MeasuredSession, loaded: Mapping[str, float]) -> Memory | Missing:
    now = session.memory()
    if not loaded or not now:
        return Missing(reason="this system does not say what a process takes: there is no /proc")
    return Memory(
        loaded_mb=loaded["resident_mb"],
        peak_mb=now["peak_resident_mb"],
        anonymous_mb=now["anonymous_mb"],
        device_mb=_device_memory(session),
    )


def _device_memory(session: MeasuredSession) -> float | Missing:
    """Ask NVIDIA's own tool what a process takes of its card."""
    if _on_cpu(session):
        return Missing(reason="it runs on the processor, in the host's memory")
    question = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(question, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        return Missing(reason=f"nvidia-smi does not answer: {error}")
    return used_mb(done.stdout, session.process_id)


def used_mb(answer: str, process_id: int) -> float | Missing:
    """Read nvidia-smi's table of processes: their numbers, and MiB."""
    for line in answer.splitlines():
        number, _, mebibytes = line.partition(",")
        if number.strip() == str(process_id) and mebibytes.strip().isdigit():
            return int(mebibytes) * 1.048576
    return Missing(reason="nvidia-smi does not list the process; within a container it often cannot")


def _on_cpu(session: MeasuredSession) -> bool:
    return session.device.upper().startswith("CPU")
