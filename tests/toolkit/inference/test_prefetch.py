"""Stages overlap, keep the order, hold little, and end as the simple loop would: in order, with its error."""

import csv
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from infer_folder import infer_to_folder
from tiny import write_pictures

from medseg_trt.bundles.bundle import load_bundle
from medseg_trt.errors import ArtefactError, InputError
from medseg_trt.imaging.images import Mask, find_images, read_image, write_mask
from medseg_trt.imaging.segment import segment
from medseg_trt.inference import pipelined, to_folder
from medseg_trt.inference.outcomes import Refused, Segmented
from medseg_trt.inference.prefetch import DEPTH, Prefetcher
from medseg_trt.pipeline import infer
from medseg_trt.sessions.base import Session
from medseg_trt.sessions.open import open_session


def our_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("medseg-trt")]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert our_threads() == []


def test_items_come_in_order_and_the_threads_end():
    with Prefetcher() as prefetcher:
        doubled = prefetcher.prefetch(2 * number for number in prefetcher.prefetch(range(100)))
        assert list(doubled) == list(range(0, 200, 2))


def second_is_made_while_first_is_used(through, wait_s: float) -> bool:
    second = threading.Event()

    def items():
        yield 0
        second.set()
        yield 1

    return next(second.wait(wait_s) for _ in through(items()))


def test_stages_run_at_the_same_time():
    with Prefetcher() as prefetcher:
        assert second_is_made_while_first_is_used(prefetcher.prefetch, 10)
    assert not second_is_made_while_first_is_used(iter, 0.05)


@pytest.mark.parametrize("depth", [1, DEPTH, 5])
def test_prefetch_takes_at_most_depth_plus_one_items_ahead(depth):
    taken = []
    with Prefetcher() as prefetcher:
        items = prefetcher.prefetch((taken.append(number) or number for number in range(50)), depth)
        for done in range(1, 20):
            next(items)
            time.sleep(0.002)
            assert len(taken) <= done + depth + 1


def failing():
    yield from range(3)
    raise ArtefactError("the fourth")


def test_prefetch_raises_an_error_at_its_position():
    with Prefetcher() as prefetcher:
        items = prefetcher.prefetch(iter(prefetcher.prefetch(failing())))
        assert [next(items) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(ArtefactError, match="the fourth"):
            next(items)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ArtefactError])
def test_threads_that_wait_for_room_end_with_the_block(error):
    def interrupted():
        with Prefetcher() as prefetcher:
            next(prefetcher.prefetch(prefetcher.prefetch(iter(int, 1))))  # zeros without end
            raise error

    with pytest.raises(error):
        interrupted()


def test_prefetch_takes_no_items_after_the_context_ends():
    begun, go_on = threading.Event(), threading.Event()
    taken = []

    def items():
        for number in range(5):
            taken.append(number)
            begun.set()
            go_on.wait(10)
            yield number

    prefetcher = Prefetcher()
    with prefetcher:
        prefetcher.prefetch(items())
        begun.wait(10)
        threading.Timer(0.1, go_on.set).start()
    assert taken == [0]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_pictures(tmp_path / "data", count=8, size=(40, 52)) / "images"


def test_masks_are_those_of_the_simple_loop_byte_for_byte(tiny_bundle, data, images, tmp_path):
    sources = find_images([data, images / "scan.nii.gz"])
    bundle = load_bundle(tiny_bundle)
    with open_session(bundle) as session:
        for source in sources:
            image = read_image(source)
            write_mask(
                Mask.of(image, segment(session.run, image, bundle.preprocessing, 2), bundle.classes), tmp_path / "a"
            )
    written = infer_to_folder([data, images / "scan.nii.gz"], tiny_bundle, tmp_path / "b", batch=2, on_error=unexpected)
    assert [path.name for path in written.masks] == [f"case{number}.png" for number in range(8)] + ["scan.nii.gz"]
    for path in written.masks:
        assert path.read_bytes() == (tmp_path / "a" / path.name).read_bytes()


def unexpected(path: Path, error: InputError) -> None:
    raise AssertionError(f"{path}: {error}")


class BrokenError(Exception):
    """What nobody foresaw."""


def break_reading(monkeypatch, victim: str, error: type[Exception]) -> None:
    def read(source, real=to_folder.read_image):
        if source.name == victim:
            raise error
        return real(source)

    monkeypatch.setattr(to_folder, "read_image", read)


def break_running(monkeypatch, victim: str, error: type[Exception]) -> None:
    numbers = iter(range(1000))

    def steps(*arguments, real=pipelined.segmentation_stages):
        result = real(*arguments)
        if next(numbers) != int(victim[4]):
            return result

        def run(inputs):
            raise error

        return type(result)(prepare=result.prepare, run=run, finish=result.finish)

    monkeypatch.setattr(pipelined, "segmentation_stages", steps)


def break_finishing(monkeypatch, victim: str, error: type[Exception]) -> None:
    def of(image, *arguments, real=Mask.of):
        if image.path.name == victim:
            raise error
        return real(image, *arguments)

    monkeypatch.setattr(pipelined.Mask, "of", of)


def break_writing(monkeypatch, victim: str, error: type[Exception]) -> None:
    def write(mask, output, real=to_folder.write_mask):
        if mask.path.name == victim:
            raise error
        return real(mask, output)

    monkeypatch.setattr(to_folder, "write_mask", write)


STAGES = [break_reading, break_running, break_finishing, break_writing]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("number", [0, 3, 7])
def test_fatal_error_keeps_the_masks_finished_before_it(tiny_bundle, data, tmp_path, stage, number):
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        stage(patch, f"case{number}.png", ArtefactError)
        with pytest.raises(ArtefactError):
            infer_to_folder([data], tiny_bundle, out, on_error=unexpected)
    before = [f"case{index}" for index in range(number)]
    assert sorted(path.stem for path in out.glob("*.png")) == before
    assert sorted(path.stem for path in (out / ".finished").glob("*.json")) == before
    assert list(out.rglob(".partial-*")) == []
    with (out / "areas.csv").open(newline="") as file:
        assert sorted({row["file"] for row in csv.DictReader(file)}) == [f"{name}.png" for name in before]
    written = infer_to_folder([data], tiny_bundle, out, resume=True, on_error=unexpected)
    assert (written.kept, len(written.masks)) == (number, 8)


@pytest.mark.parametrize(("error", "line"), [(BrokenError, "BrokenError"), (MemoryError, "more memory than is free")])
@pytest.mark.parametrize("stage", STAGES)
def test_an_error_with_one_image_stops_that_image_alone(tiny_bundle, data, tmp_path, monkeypatch, stage, error, line):
    stage(monkeypatch, "case3.png", error)
    monkeypatch.setattr(pipelined, "MAX_PENDING_BYTES", 0)  # what a failed image takes is given back, or all would wait
    failed = {}
    written = infer_to_folder(
        [data], tiny_bundle, tmp_path / "out", on_error=lambda path, error: failed.update({path.name: str(error)})
    )
    assert list(failed) == ["case3.png"]
    assert line in failed["case3.png"]
    assert str(data / "case3.png") in failed["case3.png"]
    assert [path.stem for path in written.masks] == [f"case{number}" for number in (0, 1, 2, 4, 5, 6, 7)]


@pytest.mark.parametrize("fails_at", [0, 1, 2])
def test_a_volume_that_fails_at_any_slice_is_one_failure(tiny_bundle, images, monkeypatch, fails_at):
    """And the image after it gets its own mask, not what was left of the volume."""
    bundle = load_bundle(tiny_bundle)
    volume, picture = read_image(images / "scan.nii.gz"), read_image(images / "case0.png")
    with open_session(bundle) as session:
        expected = segment(session.run, picture, bundle.preprocessing, 2)
        runs = iter(range(1000))

        def run(batch, real=session.run):
            if next(runs) == fails_at:
                raise MemoryError
            return real(batch)

        monkeypatch.setattr(session, "run", run)
        first, second = pipelined.segment_many([volume, picture], session, bundle, 2)
    assert isinstance(first, Refused)
    assert first.image is volume
    assert isinstance(first.error, MemoryError)
    assert isinstance(second, Segmented)
    np.testing.assert_array_equal(second.mask.labels, expected)


@pytest.mark.parametrize("attempt", range(20))
def test_a_stage_that_ends_after_the_block_says_nothing(attempt, capfd):
    """A stage that fails while nobody takes its items any more must not end in a traceback of its thread."""
    full = threading.Event()

    def items():
        yield from range(DEPTH)
        full.set()
        raise BrokenError

    with Prefetcher() as prefetcher:
        prefetcher.prefetch(items())
        full.wait(10)
        time.sleep(0.001 * attempt)
    assert capfd.readouterr().err == ""


def test_bad_files_are_named_in_order_and_the_rest_is_done(tiny_bundle, data, tmp_path):
    for number in (0, 4, 5):
        (data / f"case{number}.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    failed = []
    written = infer_to_folder([data], tiny_bundle, tmp_path / "out", on_error=lambda path, _: failed.append(path.stem))
    assert failed == ["case0", "case4", "case5"]
    assert [path.stem for path in written.masks] == ["case1", "case2", "case3", "case6", "case7"]


def test_large_images_are_read_one_at_a_time(tiny_bundle, data, monkeypatch):
    monkeypatch.setattr(pipelined, "MAX_PENDING_BYTES", 0)
    bundle, reading, most = load_bundle(tiny_bundle), set(), 0
    sources = find_images([data])

    def images():
        for source in sources:
            reading.add(source.path)
            yield read_image(source)

    with open_session(bundle) as session:
        for segmented in pipelined.segment_many(images(), session, bundle, 4):
            assert isinstance(segmented, Segmented)
            time.sleep(0.01)
            most = max(most, len(reading))
            reading.discard(segmented.image.path)
    assert most == 1


def test_a_caller_that_stops_early_leaves_no_thread(tiny_bundle, data):
    masks = infer([data], tiny_bundle)
    assert next(masks).path.name == "case0.png"
    assert our_threads()
    masks.close()
    assert our_threads() == []


def test_the_session_is_closed_after_the_last_run(tiny_bundle, data, tmp_path, monkeypatch):
    """An interrupt must not free the network while a thread is in it."""
    calls = []

    def spied(name: str, real):
        def call(session: Session, *arguments):
            calls.append(f"{name} begins")
            time.sleep(0.01)
            result = real(session, *arguments)
            calls.append(f"{name} ends")
            return result

        return call

    with open_session(load_bundle(tiny_bundle)) as session:
        kind = type(session)
    monkeypatch.setattr(kind, "run", spied("run", kind.run))
    monkeypatch.setattr(kind, "close", spied("close", kind.close))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(to_folder, "write_mask", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            infer_to_folder([data], tiny_bundle, tmp_path / "out", on_error=unexpected)
    assert calls[-2:] == ["close begins", "close ends"]
    assert [call for call in calls if call.startswith("run")] == ["run begins", "run ends"] * (len(calls) // 2 - 1)
    assert np.count_nonzero([call == "run begins" for call in calls]) < 8
