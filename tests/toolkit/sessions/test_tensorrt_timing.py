"""The network's own time between two events of the device, with launches in flight, and that of its layers."""

import pytest
from fakes.gpu import FakeGpu, illegal_address
from fakes.tensorrt_session import Opened, images_of

from medseg_trt.errors import DeviceError
from medseg_trt.sessions import device_times
from medseg_trt.sessions.device_times import IN_FLIGHT
from medseg_trt.sessions.tensorrt_stream import COPIES

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
        assert names[first:] == [*events, *launches, *copies[0], *copies[1], *(len(events) + 4) * ["free_event"]]
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


def test_it_goes_on_until_the_time_is_over(monkeypatch):
    clock = iter(range(1000))  # seconds
    monkeypatch.setattr(device_times.time, "perf_counter", lambda: float(next(clock)))
    with Opened() as opened:
        taken = opened.session.time_on_device(images_of(1), 30.0, 1)
        assert len(taken.compute_ms) == 10  # three looks at the clock for each
        assert taken.enqueue_ms == [1000.0] * 10


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


# --- faults on purpose ---------------------------------------------------------------------------------------------


def reads_before_the_event(monkeypatch):
    monkeypatch.setattr(FakeGpu, "wait_event", lambda gpu, event: None)


def waits_for_every_launch(monkeypatch):
    monkeypatch.setattr(device_times, "IN_FLIGHT", 0)


@pytest.mark.parametrize("fault", [reads_before_the_event, waits_for_every_launch], ids=lambda fault: fault.__name__)
def test_a_planted_fault_of_the_timing_is_noticed(fault, monkeypatch):
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        test_launches_are_kept_in_flight_between_events_and_copies_are_apart()
