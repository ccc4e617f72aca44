"""Images run beside each other where the session has streams, and their masks keep the order."""

import threading
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
from tiny import write_pictures

from medseg_trt import pipeline
from medseg_trt.bundles.bundle import Bundle, load_bundle
from medseg_trt.errors import ArtefactError, DeviceError
from medseg_trt.imaging.images import find_images, read_image
from medseg_trt.inference import pipelined
from medseg_trt.inference.outcomes import Segmented
from medseg_trt.inference.pipelined import segment_many
from medseg_trt.sessions import open as sessions_open
from medseg_trt.sessions.base import Session
from medseg_trt.sessions.open import MIN_IMAGES_FOR_STREAMS, open_session
from medseg_trt.tiling.windows import Tiles


class Meeting(Session):
    """Counts how many of its runs are under way at once; a run waits a moment for another one."""

    backend, device, description = "openvino", "CPU", "meeting"

    def __init__(self, streams: int, broken: np.ndarray | None = None) -> None:
        """Have so many streams, and raise an error for the batch ``broken``."""
        self.streams, self.most, self.batches, self._running, self._broken = streams, 0, [], 0, broken
        self._changed = threading.Condition()

    def run(self, batch):
        with self._changed:
            self._running += 1
            self.batches.append(batch)
            self.most = max(self.most, self._running)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self.most >= 2, 0.2)
            self._running -= 1
        if self._broken is not None and np.array_equal(batch, self._broken):
            raise DeviceError("the device is gone")
        return np.zeros((len(batch), 3, *batch.shape[2:]), np.float32)

    def close(self) -> None:
        """Nothing is held."""


@pytest.fixture
def images(tmp_path):
    sources = find_images([write_pictures(tmp_path / "data", count=6, size=(40, 52)) / "images"])
    return [read_image(source) for source in sources]


@pytest.mark.parametrize(("streams", "tiles", "most"), [(2, None, 2), (1, None, 1), (2, Tiles(size=32), 1)])
def test_as_many_runs_overlap_as_there_are_streams_and_of_windowed_images_one(
    tiny_bundle, images, streams, tiles, most
):
    session = Meeting(streams)
    outcomes = list(segment_many(images, session, replace(load_bundle(tiny_bundle), tiles=tiles), batch=4))
    assert session.most == most
    masks = [outcome.mask for outcome in outcomes if isinstance(outcome, Segmented)]
    assert [mask.stem for mask in masks] == [image.stem for image in images]


def test_an_image_larger_than_the_budget_is_handed_over_before_the_next_one_is_read(tiny_bundle, images, monkeypatch):
    monkeypatch.setattr(pipelined, "MAX_PENDING_BYTES", 1)
    outcomes = list(segment_many(images, Meeting(2), load_bundle(tiny_bundle), batch=1))
    assert len(outcomes) == len(images)


@pytest.mark.parametrize("broken", [2, 5])
def test_images_before_an_error_are_handed_over(tiny_bundle, images, broken):
    bundle, one_after_another, outcomes = load_bundle(tiny_bundle), Meeting(1), []
    assert len(list(segment_many(images, one_after_another, bundle, batch=1))) == len(images)
    session = Meeting(2, one_after_another.batches[broken])
    with pytest.raises(DeviceError, match="the device is gone"):
        outcomes.extend(segment_many(images, session, bundle, batch=1))
    assert [outcome.image.stem for outcome in outcomes] == [image.stem for image in images[:broken]]


def test_a_caller_that_stops_ends_all_threads(tiny_bundle, images):
    with closing(segment_many(images, Meeting(2), load_bundle(tiny_bundle), batch=1)) as outcomes:
        next(outcomes)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("medseg-trt")]


@pytest.fixture
def bundle_with_streams(tiny_bundle, monkeypatch):
    bundle = load_bundle(tiny_bundle)
    best = next(execution for execution in bundle.content.executions if execution.backend == "openvino")
    monkeypatch.setattr(sessions_open, "choose", lambda *_: replace(best, streams=4))
    monkeypatch.setattr(sessions_open, "have_equal_bits", lambda *_, **__: True)
    monkeypatch.setattr(sessions_open, "cores", lambda: 4)
    return bundle


MANY = MIN_IMAGES_FOR_STREAMS


@pytest.mark.parametrize(
    ("num_images", "threads", "expected"), [(MANY, 2, 2), (MANY - 1, 2, 1), (MANY, 1, 1)], ids=["many", "few", "1 core"]
)
def test_streams_are_opened_for_many_images_alone_and_no_more_than_threads(
    bundle_with_streams, caplog, num_images, threads, expected
):
    caplog.set_level("INFO", "medseg_trt")
    with open_session(bundle_with_streams, threads=threads, num_images=num_images) as session:
        assert session.streams == expected
    assert ("2 images beside each other" in caplog.text) == (expected == 2)


def test_a_network_whose_last_bits_differ_here_runs_one_image_at_a_time(bundle_with_streams, monkeypatch, caplog):
    monkeypatch.setattr(sessions_open, "have_equal_bits", lambda *_, **__: False)
    caplog.set_level("INFO", "medseg_trt")
    with open_session(bundle_with_streams, threads=2, num_images=MANY) as session:
        assert session.streams == 1
    assert "other last bits on fewer cores" in caplog.text


@pytest.mark.parametrize(("tta", "tiles"), [("flips", None), (None, Tiles(size=32))])
def test_no_streams_are_opened_where_an_image_has_several_runs(bundle_with_streams, images, monkeypatch, tta, tiles):
    monkeypatch.setattr(sessions_open, "MIN_IMAGES_FOR_STREAMS", 2)
    opened = []

    def spied(*arguments):
        opened.append(open_session(*arguments))
        return opened[-1]

    monkeypatch.setattr(pipeline, "open_session", spied)
    folder = images[0].path.parent
    for asked in ({"tta": tta, "tiles": tiles}, {}):
        assert len(list(pipeline.infer([folder], bundle_with_streams, threads=2, **asked))) == len(images)
    assert [session.streams for session in opened] == [1, 2]


@pytest.mark.parametrize("error", [ArtefactError("it is refused"), MemoryError()])
def test_streams_that_cannot_be_opened_leave_one_image_at_a_time(bundle_with_streams, monkeypatch, caplog, error):
    opened, original = [], sessions_open.open_execution

    def open_once(*arguments, streams=1, **options):
        if streams > 1:
            raise error
        opened.append(streams)
        return original(*arguments, streams=streams, **options)

    monkeypatch.setattr(sessions_open, "open_execution", open_once)
    caplog.set_level("INFO", "medseg_trt")
    with open_session(bundle_with_streams, threads=2, num_images=MANY) as session:
        assert session.streams == 1
        assert session.run(bundle_with_streams.golden()[0]) is not None
    assert "runs one image at a time" in caplog.text
    assert opened == [1]


def test_an_error_of_the_guard_costs_no_mask(tiny_bundle, images, monkeypatch, caplog):
    monkeypatch.setattr(Bundle, "unusual", lambda *_: {}["dark"])
    outcomes = list(segment_many(images[:2], Meeting(1), load_bundle(tiny_bundle), batch=1))
    assert [type(outcome) for outcome in outcomes] == [Segmented] * 2
    assert "is not compared with the training images: KeyError: 'dark'" in caplog.text
