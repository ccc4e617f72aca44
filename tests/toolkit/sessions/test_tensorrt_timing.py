"""The network's own time between two events of the device, with launches in flight, and that of its layers."""

from contextlib import contextmanager

import numpy as np
import pytest
from fakes.gpu import FakeGpu, illegal_address
from fakes.tensorrt_session import Opened, images_of, network

from medseg_trt.errors import DeviceError
from medseg_trt.sessions import device_times
from medseg_trt.sessions.device_times import IN_FLIGHT, OverlappedStream
from medseg_trt.sessions.tensorrt import MAX_STREAMS
from medseg_trt.sessions.tensorrt_stream import COPIES, InferenceStream
from medseg_trt.sessions.tensorrt_stream_pool import StreamPool

GRAPH_PASS = ["upload", "launch_graph", "download"]
LAUNCH = ["record_event", "launch_graph", "record_event"]
FINISH = ["wait_event", "elapsed_ms"]


def test_launches_are_kept_in_flight_between_events_and_copies_are_apart():
    with Opened() as opened:
        taken = opened.session.time_on_device(images_of(2), 0.0, 7)
        names = opened.gpu.names()
        first = names.index("new_event")
        events = 2 * (IN_FLIGHT + 1) * ["new_event"]
        launches = IN_FLIGHT * LAUNCH + (7 - IN_FLIGHT) * [*LAUNCH, *FINISH] + IN_FLIGHT * FINISH
        copies = [
            [*2 * ["new_event"], *COPIES * ["record_event", name, "record_event", *FINISH]]
            for name in ("upload", "download")
        ]
        timed = [*events, *launches, *copies[0], *copies[1], *(len(events) + 4) * ["free_event"]]
        assert names[first : first + len(timed)] == timed
        assert taken.compute_ms == [1.0] * 7  # one piece of work each time, on a clock that counts them
        assert (taken.upload_ms, taken.download_ms) == ([1.0] * COPIES, [1.0] * COPIES)
        assert len(taken.enqueue_ms) == 7
        opened.calls_of(2, 2)  # and images still go through


def test_a_network_that_cannot_be_recorded_is_timed_call_by_call():
    with Opened(graphs=False) as opened:
        assert opened.session.time_on_device(images_of(2), 0.0, 3).compute_ms == [1.0] * 3
        assert "launch_graph" not in opened.gpu.names()


def test_a_batch_that_the_engine_does_not_take_at_once_takes_the_sum_of_its_pieces():
    with Opened(batches=(1, 2, 4)) as opened:
        assert opened.session.time_on_device(images_of(9), 0.0, 3).compute_ms == [3.0] * 3


def test_time_on_device_runs_until_the_duration_is_over(monkeypatch):
    clock = iter(range(1000))  # seconds
    monkeypatch.setattr(device_times.time, "perf_counter", lambda: float(next(clock)))
    with Opened() as opened:
        taken = opened.session.time_on_device(images_of(1), 30.0, 1)
        assert len(taken.compute_ms) == 10  # three looks at the clock for each
        assert taken.enqueue_ms == [1000.0] * 10
        # The first batch is enqueued without a look at the clock, 29 before its 30 s are over, and then it looks twice.
        assert taken.images_per_s == [30 / 31]


def test_an_error_while_it_is_timed_gives_the_events_back():
    opened = Opened()
    opened.gpu.fail["elapsed_ms"] = illegal_address()
    with pytest.raises(DeviceError, match="ILLEGAL_ADDRESS"):
        opened.session.time_on_device(images_of(1), 0.0, 3)
    opened.session.close()
    assert opened.gpu.is_clean()


def test_layers_are_watched_in_a_context_of_their_own():
    with Opened() as opened:
        opened.trt.layer_ms = {"first": 0.5, "second": 0.25}
        assert opened.session.layer_times(images_of(2), 3) == {"first": [0.5] * 3, "second": [0.25] * 3}
        assert [context.profiler is None for context in opened.trt.contexts] == [True, False]
        opened.calls_of(2, 2)  # what runs images is as it was


def passes_of(opened: Opened, images: int, runs: int) -> list[tuple[str, int]]:
    """Time a batch and return what its throughput consists of: passes and waits, each with its stream."""
    batch = images_of(images)
    taken = opened.session.time_on_device(batch, 0.0, runs)
    assert len(taken.images_per_s) == 1
    assert taken.images_per_s[0] > 0
    calls = [(call[0], call[-1]) for call in opened.gpu.calls if call[0] in (*GRAPH_PASS, "synchronize")]
    passes, at = list[tuple[str, int]](), len(calls)
    while sum(name == "pass" for name, _ in passes) < runs:  # they come last
        at -= 1
        name, stream = calls[at]
        if name == "synchronize":
            passes.insert(0, ("wait", stream))
            continue
        at -= len(GRAPH_PASS) - 1
        assert calls[at : at + len(GRAPH_PASS)] == [(part, stream) for part in GRAPH_PASS]
        passes.insert(0, ("pass", stream))
    logits = [block for block in opened.gpu.pinned.values() if block.nbytes == network(batch).nbytes]
    arrived = [block.view(np.float32).reshape(network(batch).shape) for block in logits]
    assert len(arrived) == MAX_STREAMS
    for one in arrived:
        np.testing.assert_allclose(one, network(batch), atol=1e-6)
    return passes


def overlap_of_seven(opened: Opened) -> None:
    """See that one stream copies while the other computes, and that no buffer is used before it was waited for."""
    passes = passes_of(opened, 2, 7)
    one, other = (stream for _, stream in passes[:2])
    assert one != other
    turns = [one, other] * 4
    between = [step for number in range(5) for step in (("wait", turns[number]), ("pass", turns[number]))]
    assert passes == [("pass", one), ("pass", other), *between, ("wait", turns[5]), ("wait", turns[6])]


def test_throughput_is_taken_of_two_streams_in_turn_whose_copies_overlap_the_network():
    with Opened() as opened:
        overlap_of_seven(opened)
        opened.calls_of(2, 2)  # and images still go through


def test_without_memory_for_a_second_stream_there_is_no_throughput_and_threads_go_on():
    with Opened() as opened:
        opened.session.run(images_of(1))
        opened.gpu.limit = sum(map(len, opened.gpu.memory.values()))
        taken = opened.session.time_on_device(images_of(1), 0.0, 3)
        assert (len(taken.compute_ms), taken.images_per_s) == (3, [])
        opened.calls_of(2, 2)


def test_an_error_while_copies_overlap_closes_both_streams():
    opened = Opened()
    opened.session.time_on_device(images_of(2), 0.0, 3)
    before = len(opened.gpu.streams)
    real, left = FakeGpu.upload, iter(range(COPIES + 1))

    def broken(gpu, *arguments):
        if next(left, None) is None:
            raise illegal_address()
        real(gpu, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeGpu, "upload", broken)
        with pytest.raises(DeviceError, match="ILLEGAL_ADDRESS"):
            opened.session.time_on_device(images_of(2), 0.0, 3)
    assert (before, len(opened.gpu.streams)) == (MAX_STREAMS, 0)
    opened.calls_of(2)  # in a new one
    opened.session.close()
    assert opened.gpu.is_clean()


# --- faults on purpose ---------------------------------------------------------------------------------------------


def reads_before_the_event(monkeypatch):
    monkeypatch.setattr(FakeGpu, "wait_event", lambda gpu, event: None)


def waits_for_every_launch(monkeypatch):
    monkeypatch.setattr(device_times, "IN_FLIGHT", 0)


@pytest.mark.parametrize("fault", [reads_before_the_event, waits_for_every_launch], ids=lambda fault: fault.__name__)
def test_timing_fault_fails_the_launch_timing_test(fault, monkeypatch):
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        test_launches_are_kept_in_flight_between_events_and_copies_are_apart()


def waits_after_each(monkeypatch):
    real = InferenceStream.overlapped

    def overlapped(stream: InferenceStream, source: np.ndarray) -> OverlappedStream:
        pair = real(stream, source)

        def enqueue() -> None:
            pair.enqueue()
            pair.wait()

        return OverlappedStream(enqueue=enqueue, wait=pair.wait)

    monkeypatch.setattr(InferenceStream, "overlapped", overlapped)


def waits_for_nothing(monkeypatch):
    real = InferenceStream.overlapped

    def overlapped(stream: InferenceStream, source: np.ndarray) -> OverlappedStream:
        return OverlappedStream(enqueue=real(stream, source).enqueue, wait=lambda: None)

    monkeypatch.setattr(InferenceStream, "overlapped", overlapped)


def one_stream_twice(monkeypatch):
    real = StreamPool.all

    @contextmanager
    def all_of_one(pool: StreamPool):
        with real(pool) as streams:
            yield [streams[0]] * 2

    monkeypatch.setattr(StreamPool, "all", all_of_one)


@pytest.mark.parametrize(
    "fault", [waits_after_each, waits_for_nothing, one_stream_twice], ids=lambda fault: fault.__name__
)
def test_overlap_fault_fails_the_overlap_check(fault, monkeypatch):
    fault(monkeypatch)
    opened = Opened()
    with pytest.raises(AssertionError):
        overlap_of_seven(opened)
