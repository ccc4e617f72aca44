"""Throughput of one caller and of several: a CUDA graph belongs to a thread, and has one input and one output."""

import threading
from pathlib import Path

import numpy as np
import pytest
from measured_here import SHORT

from medseg_trt.bench import timed_session, timings
from medseg_trt.bench.timed_session import MeasuredSession
from medseg_trt.devices import ComputeDevice
from medseg_trt.processes import Connection
from medseg_trt.sessions.base import Session
from medseg_trt.sessions.pytorch_forms import FORMS
from medseg_trt.sessions.session_request import SessionRequest


class Threads(Session):
    """A network that keeps the threads that it runs in."""

    def __init__(self) -> None:
        self.seen = set[int]()

    def run(self, batch):
        self.seen.add(threading.get_ident())
        return batch

    def close(self) -> None:
        pass


class Batch(Connection):
    """A connection that brings a batch."""

    def __init__(self) -> None:
        pass

    def receive_array(self, shape, dtype):
        return np.zeros(shape, dtype)


@pytest.mark.parametrize("callers", [1, 3])
def test_a_single_caller_runs_in_the_thread_that_the_network_was_opened_in(callers):
    session = Threads()
    reply, _ = timed_session._throughput(session, Batch(), (1, 3, 4, 4), "float32", callers, None, 0.0)
    assert reply["batches"] >= callers
    assert (session.seen == {threading.get_ident()}) is (callers == 1)


class Asked(MeasuredSession):
    """A network on a GPU that keeps which throughput it was asked for."""

    def __init__(self, form: str) -> None:
        self._request = SessionRequest(
            backend="pytorch",
            path=Path("best.pt"),
            precision="fp32",
            compute_dtype="fp16",
            device=ComputeDevice("cuda"),
            form=form,
        )
        self.device = "GPU Fake GPU"
        self.asked: list[tuple[int, int]] = []

    def throughput(self, batch, streams, threads, duration_s):
        self.asked.append((len(batch), streams))
        return 10, 2.0


@pytest.mark.parametrize("form", FORMS)
def test_several_callers_share_a_network_that_more_than_one_may_use(form, monkeypatch):
    monkeypatch.setattr(timings, "cores", lambda: 4)
    session = Asked(form)
    measured = timings._throughput(session, np.zeros((1, 3, 4, 4), np.float32), SHORT, (1, 8))
    assert session.asked == [(1, 1), (8, 1), *([(1, 4)] if FORMS[form].overlaps else [])]
    assert [(way.batch, way.streams) for way in measured] == session.asked
