"""Runs of one network beside each other: who gets all cores, when there is one stream alone, and equal masks."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from medseg_trt.bundles.bundle import load_bundle
from medseg_trt.imaging.images import read_image
from medseg_trt.pipeline import infer
from medseg_trt.serve.model import INFER_BATCH, open_models
from medseg_trt.serve.settings import MOST_STREAMS, ServeSettings
from medseg_trt.sessions import streams as streams_module
from medseg_trt.sessions.base import Session
from medseg_trt.sessions.open import open_session
from medseg_trt.sessions.streams import SessionStreams, open_streams


class Held(Session):
    """Returns its number for every image, after it may."""

    backend, device, description = "onnxruntime", "cpu", "held"

    def __init__(self, number: float, offset: float = 0.0) -> None:
        self.number, self.offset, self.closed = number, offset, False
        self.entered, self.may_end = threading.Event(), threading.Event()

    def run(self, batch):
        self.entered.set()
        assert self.may_end.wait(10)
        return np.full((len(batch), 1, *batch.shape[2:]), self.number + self.offset, np.float32)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def workers():
    with ThreadPoolExecutor(4) as pool:
        yield pool


def test_a_run_beside_others_takes_its_share_of_the_cores_and_one_alone_takes_all(workers):
    whole, parts = Held(0), [Held(1), Held(2)]
    streams = SessionStreams(whole, parts)
    image = np.zeros((1, 3, 2, 2), np.float32)
    first = workers.submit(streams.run, image)
    assert whole.entered.wait(10)
    beside = [workers.submit(streams.run, image) for _ in range(2)]
    for part in parts:
        assert part.entered.wait(10), "the second run waits for the first"
    late = workers.submit(streams.run, image)
    parts[1].may_end.set()
    assert late.result(10)[0, 0, 0, 0] == 2, "every part is taken, and a further run uses one that is free again"
    for session in (whole, parts[0]):
        session.may_end.set()
    assert first.result(10)[0, 0, 0, 0] == 0
    assert sorted(run.result(10)[0, 0, 0, 0] for run in beside) == [1, 2]
    assert streams.run(image)[0, 0, 0, 0] == 0, "alone again"
    streams.close()
    assert whole.closed
    assert all(part.closed for part in parts)


def test_a_session_is_free_again_after_an_error(workers):
    class Broken(Held):
        def run(self, batch):
            raise RuntimeError("broken")

    whole = Held(0)
    streams = SessionStreams(whole, [Broken(1)])
    image = np.zeros((1, 3, 2, 2), np.float32)
    first = workers.submit(streams.run, image)
    assert whole.entered.wait(10)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="broken"):
            workers.submit(streams.run, image).result(10)
    whole.may_end.set()
    first.result(10)
    assert streams.run(image)[0, 0, 0, 0] == 0


def test_there_are_no_streams_on_one_core_or_where_the_threads_change_bits(bundle, monkeypatch):
    opened = load_bundle(bundle)
    parts: list[Held] = []

    def other_bits(*_arguments):
        parts.append(Held(0, offset=1e-6 * len(parts)))
        return parts[-1]

    monkeypatch.setattr(streams_module, "open_execution", other_bits)
    whole = Held(0, offset=-1e-6)
    for session in (whole, *parts):
        session.may_end.set()
    assert open_streams(opened, whole, None, 1, INFER_BATCH, MOST_STREAMS) is None
    assert open_streams(opened, whole, None, 4, INFER_BATCH, 1) is None, "they were switched off"
    assert not parts
    monkeypatch.setattr(Held, "run", lambda self, batch: np.full((len(batch), 1, 2, 2), self.offset, np.float32))
    assert open_streams(opened, whole, None, 2, INFER_BATCH, MOST_STREAMS) is None
    assert [part.closed for part in parts] == [True], "one is enough to compare"
    assert not whole.closed


def test_bits_are_compared_in_every_batch_since_the_last_one_of_a_volume_is_smaller(bundle, monkeypatch):
    class OtherInThrees(Held):
        def run(self, batch):
            return np.full((len(batch), 1, 2, 2), self.offset if len(batch) == 3 else 0.0, np.float32)

    monkeypatch.setattr(streams_module, "open_execution", lambda *_: OtherInThrees(0, offset=1e-6))
    assert open_streams(load_bundle(bundle), OtherInThrees(0), None, 2, INFER_BATCH, MOST_STREAMS) is None


def test_streams_are_closed_where_a_further_one_cannot_be_opened(bundle, monkeypatch):
    parts: list[Held] = []

    def limited(*_arguments):
        if len(parts) == 2:
            raise MemoryError
        parts.append(Held(0))
        parts[-1].may_end.set()
        return parts[-1]

    monkeypatch.setattr(streams_module, "open_execution", limited)
    whole = Held(0)
    whole.may_end.set()
    with pytest.raises(MemoryError):
        open_streams(load_bundle(bundle), whole, None, 4, INFER_BATCH, MOST_STREAMS)
    assert [part.closed for part in parts] == [True, True]


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_masks_of_overlapping_runs_equal_those_of_infer(bundle, inputs, backend, tmp_path, workers):
    settings = ServeSettings(bundles=(bundle,), spool=tmp_path, backend=backend, threads=2)
    (served,) = open_models(settings)
    paths = [inputs / "volume.nii.gz", *sorted(inputs.glob("*.png")), inputs / "volume.nii.gz"]

    def mask(path):
        with served.queue.open() as request:
            return served.segment(read_image(path), request)

    got = list(workers.map(mask, paths))
    served.close()
    expected = [next(iter(infer([path], bundle, backend=backend, threads=2))) for path in paths]
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_array_equal(one.labels, other.labels)


def test_streams_of_one_network_give_the_bits_of_a_session_on_all_cores(bundle):
    opened = load_bundle(bundle)
    streams = open_streams(opened, open_session(opened, "onnxruntime", 2), None, 2, INFER_BATCH, MOST_STREAMS)
    assert streams is not None, "ONNX Runtime's float32 kernels split work by rows and columns of the output alone"
    assert streams.count == 2
    streams.close()
