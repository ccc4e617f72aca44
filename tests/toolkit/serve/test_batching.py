"""The queue: full batches, fairness, back-pressure, dropped requests, errors that reach those who wait."""

import threading
import time

import numpy as np
import pytest

from medseg_trt.serve.batching import JOB_SHARE, BatchQueue, BusyError, CancelledError


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
    with queue.open() as first, queue.open(is_job=True) as volume, queue.open() as small, queue.open() as other:
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


@pytest.mark.parametrize("shared", [True, False], ids=["one key", "a key for each run"])
def test_a_volume_gets_its_share_and_no_more_beside_small_images_and_all_runs_without(queue, network, shared):
    """Where no run is shared, a volume's four slices are one item, as long as four small images."""
    keys = iter(range(10**6))
    per_item, num_small = 1 if shared else 4, 360

    def submitted(request, value: float, slices: int):
        return request.submit("k" if shared else next(keys), network, np.full((slices, 1), value, np.float32))

    with queue.open() as first, queue.open(is_job=True) as volume, queue.open() as small:
        submitted(first, -1, 1)
        assert network.entered.wait(10)
        of_volume = [submitted(volume, 0, per_item) for _ in range(240 // per_item)]
        of_small = [submitted(small, 1, 1) for _ in range(num_small)]
        network.gate.set()
        for future in (*of_volume, *of_small):
            future.result(10)
    values = [value for batch in network.batches[1:] for value in batch]
    beside = values[: len(values) - values[::-1].index(1)]
    assert num_small * JOB_SHARE / (1 - JOB_SHARE) - 4 <= beside.count(0) <= num_small * JOB_SHARE / (1 - JOB_SHARE) + 4
    assert set(values[len(beside) :]) == {0}, "alone, the volume gets every run"
    gaps = "".join(str(int(value)) for value in beside).split("0")
    assert max(map(len, gaps)) <= 4 * (1 - JOB_SHARE) / JOB_SHARE + 4, "the volume stands still"


def test_what_a_volume_ran_in_gaps_does_not_hold_it_up_for_long(queue):
    """Twenty batches with one small image and three slices each are far more than its share."""
    batches: list[list[float]] = []
    entered, permits = threading.Semaphore(0), threading.Semaphore(0)

    def network(values: np.ndarray) -> np.ndarray:
        batches.append(values[:, 0].tolist())
        entered.release()
        assert permits.acquire(timeout=10)
        return values + 1

    with queue.open() as first, queue.open(is_job=True) as volume, queue.open() as small:
        futures = [first.submit("k", network, row(-1))]
        assert entered.acquire(timeout=10)
        futures += [volume.submit("k", network, row(0)) for _ in range(100)]
        for _ in range(20):
            futures.append(small.submit("k", network, row(1)))
            permits.release()
            assert entered.acquire(timeout=10)
        futures += [small.submit("k", network, row(1)) for _ in range(80)]
        permits.release(1000)
        for future in futures:
            future.result(10)
    assert all(sorted(batch) == [0, 0, 0, 1] for batch in batches[1:21])
    busy = [value for batch in batches[21:31] for value in batch]
    assert busy.count(0) >= 1, "ten batches without a slice of the volume"


def test_volumes_of_one_key_and_small_images_of_another_take_turns(queue, network):
    with queue.open() as first, queue.open(is_job=True) as volume, queue.open() as small:
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


def test_a_request_that_was_left_gets_no_further_slices(queue, network):
    """Its thread may not know yet that nobody waits for it."""
    network.gate.set()
    with queue.open() as left:
        left.submit("k", network, row(1)).result(10)
    with pytest.raises(CancelledError):
        left.submit("k", network, row(2))
    assert network.batches == [[1]]


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


def test_closing_the_queue_cancels_waiting_requests(network):
    network.gate.set()
    queue = BatchQueue(max_batch=4, delay_s=10.0, max_requests=8)
    request, _other = queue.open(), queue.open()
    future = request.submit("k", network, row(1))
    queue.close()
    with pytest.raises(CancelledError):
        future.result(10)
    with pytest.raises(CancelledError):
        queue.open()
