"""Time a network by the device's own clock, with launches kept in flight, as trtexec does.

The next launches are enqueued while the device works on the ones before, so that it never waits for the host unless the
host is slower. A pair of events encloses each launch; they are read when the launch is long complete.

Throughput is measured apart, by the host's clock: several streams with buffers of their own take turns, so that the
copies of one run while another computes. The input stays in pinned memory and the logits arrive there, as in trtexec.
Source: NVIDIA TensorRT, ``samples/common/sampleInference.cpp``.
"""

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

IN_FLIGHT = 2  # launches that the device has besides the one that is waited for
UNTIMED = 2  # launches: the first settles a shape and compiles, the second is recorded where graphs are


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceTimes:
    """Milliseconds of every run; of copies, of as many as were timed."""

    compute_ms: list[float]  # the network alone, by events of the device
    enqueue_ms: list[float] = field(default_factory=list[float])  # that the host took to enqueue it, by its own clock
    upload_ms: list[float] = field(default_factory=list[float])  # of the input, by events of the device
    download_ms: list[float] = field(default_factory=list[float])  # of the logits
    images_per_s: list[float] = field(default_factory=list[float])  # see ``time_overlapped``; empty: not measured


@dataclass(frozen=True, kw_only=True, slots=True)
class OverlappedStream:
    """A stream with an input and an output of its own, in which one batch runs again and again."""

    enqueue: Callable[[], None]  # the copy to the device, the network, and the copy back
    wait: Callable[[], None]  # until all of it is done


class EventClock(ABC):
    """Events in one stream of a device."""

    @abstractmethod
    def new_event(self) -> Any:
        """Return a new event."""

    @abstractmethod
    def record(self, event: Any) -> None:
        """Enqueue an event."""

    @abstractmethod
    def wait(self, event: Any) -> None:
        """Wait until the device has reached an event."""

    @abstractmethod
    def elapsed_ms(self, start: Any, stop: Any) -> float:
        """Return the milliseconds between two events that the device has reached."""


def time_in_flight(launch: Callable[[], None], clock: EventClock, duration_s: float, min_runs: int) -> DeviceTimes:
    """Launch a network again and again, for ``duration_s`` and at least ``min_runs`` times.

    Args:
        launch: enqueues the network in the clock's stream, and has been run before.
        clock: events in that stream; whoever gives it frees them.
        duration_s: seconds by the host's clock.
        min_runs: at least so many launches.
    """
    free = [(clock.new_event(), clock.new_event()) for _ in range(IN_FLIGHT + 1)]
    underway: deque[tuple[Any, Any]] = deque()
    times, end = DeviceTimes(compute_ms=[]), time.perf_counter() + duration_s

    def finish_first() -> None:
        start, stop = underway.popleft()
        clock.wait(stop)
        times.compute_ms.append(clock.elapsed_ms(start, stop))
        free.append((start, stop))

    while len(times.compute_ms) + len(underway) < min_runs or time.perf_counter() < end:
        start, stop = free.pop()
        clock.record(start)
        began = time.perf_counter()
        launch()
        times.enqueue_ms.append(1000 * (time.perf_counter() - began))
        clock.record(stop)
        underway.append((start, stop))
        if not free:
            finish_first()
    while underway:
        finish_first()
    return times


def time_copies(copy: Callable[[], None], clock: EventClock, runs: int) -> list[float]:
    """Return the milliseconds of a copy by the device's clock, one at a time."""
    start, stop = clock.new_event(), clock.new_event()
    taken = list[float]()
    for _ in range(runs):
        clock.record(start)
        copy()
        clock.record(stop)
        clock.wait(stop)
        taken.append(clock.elapsed_ms(start, stop))
    return taken


def time_overlapped(streams: Sequence[OverlappedStream], images: int, duration_s: float, min_runs: int) -> list[float]:
    """Return the images per second of streams that take turns; nothing with fewer than two, which cannot overlap.

    Each batch is enqueued in the stream whose result has been waited for longest ago, while the others are underway.

    Args:
        streams: each has run before.
        images: of one batch.
        duration_s: seconds by the host's clock.
        min_runs: at least so many batches.
    """
    if len(streams) < 2:
        return []
    free, underway, runs = deque(streams), deque[OverlappedStream](), 0
    began = time.perf_counter()
    while runs < min_runs or time.perf_counter() < began + duration_s:
        if not free:
            underway[0].wait()
            free.append(underway.popleft())
        free[0].enqueue()
        underway.append(free.popleft())
        runs += 1
    for stream in underway:
        stream.wait()
    return [images * runs / (time.perf_counter() - began)]
