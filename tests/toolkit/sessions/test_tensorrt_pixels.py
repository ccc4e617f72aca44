"""Pixels go up, masks come down: the kernels before and after the network give the masks of the CPU."""

import numpy as np
import pytest
from fakes.gpu import symbol_as_ptx
from fakes.tensorrt_session import FORMS, PIXEL_PASS, SIZE, Opened, masks_of_the_cpu, slices_of

from medseg_trt.sessions.tensorrt import PixelKernels
from medseg_trt.sessions.tensorrt_stream import InferenceStream
from medseg_trt.spec import Preprocessing


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("channels", [1, 3])
def test_masks_from_pixels_are_those_of_the_cpu_and_nothing_else_crosses_the_bus(form, channels):
    p, spacing_mm = FORMS[form]
    with Opened(PixelKernels(find_ptx=symbol_as_ptx, preprocessing=p)) as opened:
        slices = slices_of(5, channels=channels)
        masks = opened.masks_of(slices, spacing_mm)
        for _ in range(3):  # call by call, recorded, launched
            opened.gpu.calls.clear()
            np.testing.assert_array_equal(masks(slices), masks_of_the_cpu(slices, p, spacing_mm))
        moved = {name: sum(call[1] for call in opened.gpu.calls if call[0] == name) for name in ("upload", "download")}
        assert moved == {"upload": slices.nbytes, "download": 5 * 23 * 41}


def test_the_kernels_stand_before_and_after_the_network():
    p, _ = FORMS["stretched"]
    with Opened(PixelKernels(find_ptx=symbol_as_ptx, preprocessing=p), graphs=False) as opened:
        masks = opened.masks_of(slices_of(2))
        masks(slices_of(2))
        before = len(opened.gpu.calls)
        masks(slices_of(2, seed=1))
        calls = opened.gpu.calls[before:]
        assert [name for name, *_ in calls] == ["activate", *PIXEL_PASS, "synchronize"]
        assert [call[1] for call in calls if call[0] == "launch"] == ["image_to_tensor", "logits_to_mask"]
        assert [call[1] for call in calls if call[0] in ("upload", "download")] == [2 * 23 * 41 * 3, 2 * 23 * 41]


def test_pictures_of_many_sizes_share_the_buffers():
    p, _ = FORMS["stretched"]
    allocated: list[tuple[int, int]] = []  # buffers on the device, and pinned ones
    with Opened(PixelKernels(find_ptx=symbol_as_ptx, preprocessing=p)) as opened:
        for number, size in enumerate([(10, 10), (40, 50), (10, 10), (12, 9), (10, 10), (40, 50), (40, 50)]):
            slices = slices_of(2, size, seed=number)
            masks = opened.masks_of(slices)
            opened.gpu.calls.clear()
            np.testing.assert_array_equal(masks(slices), masks_of_the_cpu(slices, p, None))
            names = opened.gpu.names()
            allocated.append((names.count("allocate"), names.count("allocate_host")))
    # Three of the network, and pixels and masks on both sides, which grow once: no later picture is larger.
    assert allocated == [(5, 2), (2, 2), *[(0, 0)] * 5]


def test_twenty_sizes_in_turn_capture_nothing_after_the_warm_up():
    p, _ = FORMS["stretched"]
    with Opened(PixelKernels(find_ptx=symbol_as_ptx, preprocessing=p)) as opened:
        opened.session.warm_up()
        opened.gpu.calls.clear()
        for number in range(20):
            slices = slices_of(2, (10 + number, 30 - number), seed=number)
            np.testing.assert_array_equal(opened.masks_of(slices)(slices), masks_of_the_cpu(slices, p, None))
        names = opened.gpu.names()
        assert (names.count("begin_capture"), names.count("create_execution_context")) == (0, 0)
        assert (names.count("launch_graph"), names.count("launch"), names.count("load")) == (20, 40, 2)
        assert len(opened.trt.contexts) == 1


def a_graph_for_each_size(monkeypatch):
    real, sizes = InferenceStream.run, dict[object, dict[int, object]]()

    def run(stream, request, source):
        stream._batches = sizes.setdefault(request.to_tensor, {})
        return real(stream, request, source)

    monkeypatch.setattr(InferenceStream, "run", run)


def checks_every_launch_anew(monkeypatch):
    real = InferenceStream._launch

    def launch(stream, *arguments):
        stream._launches.clear()
        stream._launcher._functions.clear()
        real(stream, *arguments)

    monkeypatch.setattr(InferenceStream, "_launch", launch)


@pytest.mark.parametrize("fault", [a_graph_for_each_size, checks_every_launch_anew], ids=lambda fault: fault.__name__)
def test_image_size_caching_fault_fails_the_twenty_sizes_test(fault, monkeypatch):
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        test_twenty_sizes_in_turn_capture_nothing_after_the_warm_up()


def test_unsupported_pixels_or_preprocessing_have_no_device_pipeline():
    p, _ = FORMS["stretched"]
    nearest = Preprocessing(image_size=SIZE, resize="nearest")
    with Opened(PixelKernels(find_ptx=symbol_as_ptx, preprocessing=p)) as opened:
        path = opened.session.device_pipeline
        assert path(slices_of(1), None) is not None
        assert path(slices_of(1).astype(np.int16), None) is None
        assert path(slices_of(1).astype(np.float32), None) is None
        assert path(slices_of(1, (1, 20000)), None) is None
    with Opened(PixelKernels(find_ptx=symbol_as_ptx, preprocessing=nearest)) as opened:
        assert opened.session.device_pipeline(slices_of(1), None) is None
    with Opened() as opened:
        assert opened.session.device_pipeline(slices_of(1), None) is None
    p, _ = FORMS["spacing"]
    with Opened(PixelKernels(find_ptx=symbol_as_ptx, preprocessing=p)) as opened:
        assert opened.session.device_pipeline(slices_of(1), (0.0, 1.0)) is None
