"""One bounded queue a model: slices of several requests run together, and jobs leave room for small images.

Requests that somebody waits for come before jobs, which are volumes with a result to be fetched later. While both wait,
jobs get ``JOB_SHARE`` of the slices that run, so that a job never stands still; alone, they get everything. A thread
takes one item of every waiting request in rotation until the batch is full. Slices share a run only where the network
gives the same bits for a slice whatever it runs beside, see ``model.is_batch_invariant``.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
from numpy import ndarray

from medseg_trt.errors import MedsegError

MIN_RETRY_S = 1.0
JOB_SHARE = 0.1  # of the slices that run, for jobs while others wait too
SMOOTHING = 0.1  # of the running mean of a run's duration


class BusyError(MedsegError):
    """The queue is full.

    Attributes:
        retry_after_s: when to try again.
    """

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class CancelledError(MedsegError):
    """The request was given up: its client has gone, or the server stops."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Item:
    """Slices of one request that run together, alone or beside others of the same key."""

    key: Hashable
    run: Callable[[ndarray], ndarray]
    values: ndarray
    future: "Future[ndarray]"
    arrived: float


class RequestQueue:
    """The waiting slices of one request."""

    def __init__(self, queue: "BatchQueue", *, is_job: bool) -> None:
        self._queue = queue
        self.is_job = is_job
        self.items: deque[_Item] = deque()
        self.cancelled = False

    def submit(self, key: Hashable, run: Callable[[ndarray], ndarray], values: ndarray) -> "Future[ndarray]":
        """Queue slices and return the future of their output.

        Args:
            key: slices with equal keys may share a run.
            run: the network.
            values: (slices, …); the output has as many rows.
        """
        return self._queue.submit(self, key, run, values)

    def cancel(self) -> None:
        """Drop the slices that wait; a run that has begun ends."""
        self._queue.cancel(self)

    def __enter__(self) -> "RequestQueue":
        return self

    def __exit__(self, *_: object) -> None:
        self._queue.leave(self)


@dataclass(kw_only=True, slots=True)
class QueueStatistics:
    """What a queue has done so far."""

    runs: int = 0
    slices: int = 0
    run_s: float = 0.0
    queue_s: float = 0.0
    cancelled: int = 0
    refused: int = 0


class BatchQueue:
    """Runs the slices of many requests in batches, in threads of its own."""

    def __init__(
        self,
        *,
        max_batch: int,
        delay_s: float,
        max_requests: int,
        on_batch: Callable[[int, float], None] = lambda _slices, _seconds: None,
        num_threads: int = 1,
    ) -> None:
        """Start the threads.

        Args:
            max_batch: slices per run; more where a request brings more at once.
            delay_s: how long an incomplete batch waits for a further request.
            max_requests: how many requests may be open; a further one is refused.
            on_batch: called after every run with the number of slices and its seconds.
            num_threads: how many runs may overlap.
        """
        self.statistics = QueueStatistics()
        self._max_batch, self._delay_s, self._max_requests, self._on_batch = max_batch, delay_s, max_requests, on_batch
        self._changed = threading.Condition()
        self._open: set[RequestQueue] = set()
        self._waiting: deque[RequestQueue] = deque()  # those with items, the next one first
        self._mean_run_s = 0.0
        self._job_credit = 0.0  # slices that jobs may run before others; below 0 they wait
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"batches {number}", daemon=True) for number in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def num_open(self) -> int:
        """Requests that wait or run."""
        return len(self._open)

    @property
    def num_waiting(self) -> int:
        """Slices that wait."""
        with self._changed:
            return sum(len(request.items) for request in self._waiting)

    def open(self, *, is_job: bool = False) -> RequestQueue:
        """Admit a request; leave it with ``with``.

        Args:
            is_job: it was accepted before: it is admitted whatever waits, and its slices leave room for others'.

        Raises:
            BusyError: ``max_requests`` are open.
            CancelledError: the queue is closed.
        """
        with self._changed:
            if self._closed:
                raise CancelledError("the server is shutting down")
            if len(self._open) >= self._max_requests and not is_job:
                self.statistics.refused += 1
                wait_s = max(MIN_RETRY_S, self._mean_run_s * len(self._open) / (self._max_batch * len(self._threads)))
                raise BusyError(f"{len(self._open)} requests are waiting; try again in {wait_s:.0f} s", wait_s)
            request = RequestQueue(self, is_job=is_job)
            self._open.add(request)
            return request

    def submit(
        self, request: RequestQueue, key: Hashable, run: Callable[[ndarray], ndarray], values: ndarray
    ) -> "Future[ndarray]":
        """See ``RequestQueue.submit``."""
        item = _Item(key=key, run=run, values=values, future=Future(), arrived=time.monotonic())
        with self._changed:
            if request.cancelled or self._closed:
                raise CancelledError("the request was cancelled")
            if not request.items:
                self._waiting.append(request)
            request.items.append(item)
            self._changed.notify_all()
        return item.future

    def cancel(self, request: RequestQueue) -> None:
        """See ``RequestQueue.cancel``."""
        with self._changed:
            if request.cancelled or request not in self._open:
                return
            request.cancelled = True
            self.statistics.cancelled += 1
            self._drop(request)

    def leave(self, request: RequestQueue) -> None:
        """Forget a request; its waiting slices are dropped, and it gets no further ones."""
        with self._changed:
            request.cancelled = True
            self._open.discard(request)
            self._drop(request)

    def close(self) -> None:
        """Drop everything that waits, and end the threads after the runs that have begun."""
        with self._changed:
            self._closed = True
            for request in tuple(self._open):
                request.cancelled = True
                self._drop(request)
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _drop(self, request: RequestQueue) -> None:
        if request in self._waiting:
            self._waiting.remove(request)
        while request.items:
            request.items.popleft().future.set_exception(CancelledError("the request was cancelled"))

    def _work(self) -> None:
        while (batch := self._next_batch()) is not None:
            if not batch:
                continue
            started = time.monotonic()
            try:
                joined = batch[0].values if len(batch) == 1 else np.concatenate([item.values for item in batch])
                outputs = batch[0].run(joined)
                if len(outputs) != len(joined):
                    raise ValueError(f"the network returned {len(outputs)} outputs for {len(joined)} slices")
            except BaseException as error:  # whatever it is, nobody may wait for ever
                for item in batch:
                    item.future.set_exception(error)
                continue
            self._count(batch, started)
            start = 0
            for item in batch:
                item.future.set_result(outputs[start : start + len(item.values)])
                start += len(item.values)

    def _count(self, batch: Sequence[_Item], started: float) -> None:
        seconds, slices = time.monotonic() - started, sum(len(item.values) for item in batch)
        with self._changed:
            self._mean_run_s += SMOOTHING * (seconds - self._mean_run_s)
            self.statistics.runs += 1
            self.statistics.slices += slices
            self.statistics.run_s += seconds
            self.statistics.queue_s += sum(started - item.arrived for item in batch)
        self._on_batch(slices, seconds)

    def _next_batch(self) -> list[_Item] | None:
        """Wait for slices and take a batch; return None when the queue is closed."""
        with self._changed:
            while not self._waiting:
                if self._closed:
                    return None
                self._changed.wait()
            deadline = self._waiting[0].items[0].arrived + self._delay_s
            while self._is_incomplete() and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
                if not self._waiting:  # cancelled meanwhile
                    break
            return self._take() if self._waiting else []

    def _is_incomplete(self) -> bool:
        """Say whether waiting could add slices to the next batch: some open request has none waiting yet."""
        slices = sum(len(item.values) for request in self._waiting for item in request.items)
        return slices < self._max_batch and len(self._open) > len(self._waiting)

    def _take(self) -> list[_Item]:
        """Take items of the first one's key until the batch is full, one of each request in turn.

        A request that was served goes behind all others that wait, also those of other keys.
        """
        both_wait = len({request.is_job for request in self._waiting}) > 1
        batch: list[_Item] = []
        while request := self._next_for(batch):
            item = request.items.popleft()
            batch.append(item)
            self._waiting.remove(request)
            if request.items:
                self._waiting.append(request)
            if both_wait:
                self._note_share(request.is_job, len(item.values))
        return batch

    def _next_for(self, batch: list[_Item]) -> RequestQueue | None:
        """Return the request whose first item comes next in a batch, or None where the batch is full."""
        room = self._max_batch - sum(len(item.values) for item in batch)
        for request in self._in_turn():
            item = request.items[0]
            if not batch or (item.key == batch[0].key and len(item.values) <= room):
                return request
        return None

    def _in_turn(self) -> list[RequestQueue]:
        """Return the waiting requests: jobs last, but first where their share is due."""
        return sorted(self._waiting, key=lambda request: request.is_job == (self._job_credit < 0))

    def _note_share(self, is_job: bool, slices: int) -> None:
        """Count slices that ran while jobs and others waited; what jobs ran in gaps is soon forgotten."""
        if is_job:
            self._job_credit = max(self._job_credit - slices, -max(self._max_batch, slices))
        else:
            self._job_credit = min(self._job_credit + slices * JOB_SHARE / (1 - JOB_SHARE), 0.0)
