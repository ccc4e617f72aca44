"""Throughput of one caller and of several: a CUDA graph belongs to a thread, and has one input and one output."""

import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from measured_here import SHORT

from medseg_trt.bench import timed_session, timings
from medseg_trt.bench.timed_session import MeasuredSession
from medseg_trt.devices import ComputeDevice
from medseg_trt.sessions.pytorch_forms import FORMS
from medseg_trt.sessions.session_request import SessionRequest


@pytest.mark.parametrize("callers", [1, 3])
def test_a_single_caller_runs_in_the_thread_that_the_network_was_opened_in(callers):
    threads = set[int]()
    session = SimpleNamespace(run=lambda batch: threads.add(threading.get_ident()))
    connection = SimpleNamespace(receive_array=np.zeros)
    reply, _ = timed_session._throughput(session, connection, (1, 3, 4, 4), "float32", callers, None, 0.0)  # pyright: ignore[reportArgumentType]
    assert reply["batches"] >= callers
    assert (threads == {threading.get_ident()}) is (callers == 1)


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
