"""Images run beside each other where the session has streams, and their masks keep the order."""

import threading
from dataclasses import replace

import numpy as np
import pytest
from tiny import write_pictures

from medseg_trt.bundles.bundle import load_bundle
from medseg_trt.imaging.images import find_images, read_image
from medseg_trt.inference.outcomes import Segmented
from medseg_trt.inference.pipelined import segment_many
from medseg_trt.sessions import open as sessions_open
from medseg_trt.sessions.base import Session
from medseg_trt.sessions.open import open_session
from medseg_trt.tiling.windows import Tiles


class Meeting(Session):
    """Counts how many of its runs are under way at once; a run waits a moment for another one."""

    backend, device, description = "openvino", "CPU", "meeting"

    def __init__(self, streams: int) -> None:
        self.streams, self.most, self._running = streams, 0, 0
        self._changed = threading.Condition()

    def run(self, batch):
        with self._changed:
            self._running += 1
            self.most = max(self.most, self._running)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self.most >= 2, 0.2)
            self._running -= 1
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


def test_streams_are_opened_for_many_images_alone_and_no_more_than_threads(tiny_bundle, monkeypatch, caplog):
    bundle = load_bundle(tiny_bundle)
    best = next(execution for execution in bundle.content.executions if execution.backend == "openvino")
    with_streams = replace(best, streams=4)
    monkeypatch.setattr(sessions_open, "choose", lambda *_: with_streams)
    for many, threads, expected in ((True, 2, 2), (False, 2, 1), (True, 1, 1)):
        with caplog.at_level("INFO", "medseg_trt"), open_session(bundle, threads=threads, many=many) as session:
            assert session.streams == expected
    assert caplog.text.count("2 images beside each other") == 1
