"""The queue: full batches, fairness, back-pressure, dropped requests, errors that reach those who wait."""

import threading
import time

import numpy as np
import pytest

from medseg_trt.serve.batching import BatchQueue, BusyError, CancelledError


class Network:
    """Adds one; records its batches, and waits until it may go on."""

    def __init__(self) -> None:
        self.batches: list[list[float]] = []
        self.gate = threading.Event()
        self.entered = threading.Event()

    def __call__(self, values: np.ndarray) -> np.ndarray:
        self.entered.set()
        assert self.gate.wait(10)
        self.batches.append(values[:, 0].tolist())
        return values + 1


@pytest.fixture
def network():
    return Network()


@pytest.fixture
def queue(network):
    opened = BatchQueue(max_batch=4, delay_s=0.001, max_requests=8)
    yield opened
    network.gate.set()
    opened.close()


def row(value: float) -> np.ndarray:
    return np.array([[value]], np.float32)


def test_a_volume_leaves_room_for_small_images_in_every_batch(queue, network):
    with queue.open() as first, queue.open() as volume, queue.open() as small, queue.open() as other:
        blocker = first.submit("k", network, row(-1))
        assert network.entered.wait(10)  # the network is busy while the others arrive
        slices = [volume.submit("k", network, row(i)) for i in range(10)]
        late = [small.submit("k", network, row(100)), other.submit("k", network, row(200))]
        network.gate.set()
        assert [future.result(10)[0, 0] for future in (blocker, *slices, *late)] == [0, *range(1, 11), 101, 201]
    assert network.batches[0] == [-1]
    assert {100.0, 200.0} <= set(network.batches[1]), "ten slices were waiting before the small images"
    assert [len(batch) for batch in network.batches[1:]] == [4, 4, 4]


def test_different_keys_never_share_a_run(queue, network):
    network.gate.set()
    with queue.open() as one, queue.open() as two:
        futures = [one.submit("a", network, row(1)), two.submit("b", network, row(2))]
        assert [future.result(10)[0, 0] for future in futures] == [2, 3]
    assert sorted(network.batches) == [[1], [2]]


def test_a_volume_whose_runs_nobody_shares_leaves_every_second_run_to_others(queue, network):
    """As on machines where the network's last bits depend on the batch: each slice has a key of its own."""
    with queue.open() as first, queue.open() as volume, queue.open() as small, queue.open() as other:
        blocker = first.submit("k", network, row(-1))
        assert network.entered.wait(10)
        slices = [volume.submit(("volume", i), network, row(i)) for i in range(6)]
        late = [small.submit("small", network, row(100)), other.submit("other", network, row(200))]
        network.gate.set()
        for future in (blocker, *slices, *late):
            future.result(10)
    assert [batch[0] for batch in network.batches] == [-1, 0, 100, 200, 1, 2, 3, 4, 5]


def test_a_volume_of_one_key_does_not_hold_up_those_of_others(queue, network):
    with queue.open() as first, queue.open() as volume, queue.open() as small:
        blocker = first.submit("k", network, row(-1))
        assert network.entered.wait(10)
        slices = [volume.submit("volume", network, row(i)) for i in range(10)]
        late = small.submit("small", network, row(100))
        network.gate.set()
        for future in (blocker, *slices, late):
            future.result(10)
    assert [batch[0] for batch in network.batches] == [-1, 0, 100, 4, 8]


def test_an_incomplete_batch_waits_for_a_request_that_is_open(network):
    network.gate.set()
    queue = BatchQueue(max_batch=2, delay_s=5.0, max_requests=8)
    with queue.open() as one, queue.open() as two:
        first = one.submit("k", network, row(1))
        time.sleep(0.05)
        assert not first.done()
        two.submit("k", network, row(2)).result(2)
    with queue.open() as alone:  # nobody else could come: no wait
        alone.submit("k", network, row(3)).result(2)
    queue.close()
    assert network.batches == [[1, 2], [3]]


def test_a_full_queue_refuses_with_a_time_to_wait(queue):
    requests = [queue.open() for _ in range(8)]
    with pytest.raises(BusyError) as caught:
        queue.open()
    assert caught.value.retry_after_s >= 1
    with queue.open(is_job=True):  # was accepted before
        pass
    with requests[0]:
        pass
    with queue.open():
        assert queue.statistics.refused == 1


def test_a_cancelled_request_is_dropped_and_the_others_are_not(queue, network):
    with queue.open() as first, queue.open() as gone, queue.open() as kept:
        blocker = first.submit("k", network, row(0))
        assert network.entered.wait(10)
        dropped, result = gone.submit("k", network, row(1)), kept.submit("k", network, row(2))
        gone.cancel()
        network.gate.set()
        with pytest.raises(CancelledError):
            dropped.result(10)
        with pytest.raises(CancelledError):
            gone.submit("k", network, row(1))
        assert (blocker.result(10)[0, 0], result.result(10)[0, 0]) == (1, 3)
    assert network.batches == [[0], [2]]


def test_an_error_reaches_its_batch_and_the_queue_goes_on(queue, network):
    def broken(_values: np.ndarray) -> np.ndarray:
        raise RuntimeError("broken")

    network.gate.set()
    with queue.open() as request:
        with pytest.raises(RuntimeError, match="broken"):
            request.submit("a", broken, row(1)).result(10)
        with pytest.raises(ValueError, match="0 outputs"):
            request.submit("b", lambda values: values[:0], row(1)).result(10)
        assert request.submit("k", network, row(1)).result(10)[0, 0] == 2


def test_closing_wakes_everyone(network):
    network.gate.set()
    queue = BatchQueue(max_batch=4, delay_s=10.0, max_requests=8)
    request, _other = queue.open(), queue.open()
    future = request.submit("k", network, row(1))
    queue.close()
    with pytest.raises(CancelledError):
        future.result(10)
    with pytest.raises(CancelledError):
        queue.open()
