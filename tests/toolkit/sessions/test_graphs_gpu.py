"""On a GPU: PyTorch's ways and ONNX Runtime's providers, with a bundle that needs neither TensorRT nor a network.

Bounds that no GPU has confirmed yet say so.
"""

import numpy as np
import pytest

from medseg_trt.bundles.bundle import load_bundle
from medseg_trt.devices import ComputeDevice
from medseg_trt.errors import DeviceError, MissingExtraError
from medseg_trt.sessions.backends import BACKENDS, is_installed
from medseg_trt.sessions.open import open_session
from medseg_trt.sessions.pytorch import open_graph
from medseg_trt.sessions.pytorch_forms import FORMS, PEERS_ON_GPU

pytestmark = pytest.mark.gpu
GPU = ComputeDevice("cuda")
SLACK = {"fp32": 0.001, "tf32": 0.01, "fp16": 0.02, "bf16": 0.05}  # share of other labels; not confirmed yet


@pytest.fixture(scope="module")
def images(tiny_bundle) -> np.ndarray:
    size = load_bundle(tiny_bundle).preprocessing.image_size
    return np.random.default_rng(0).normal(size=(3, 3, *size)).astype(np.float32)


@pytest.fixture(scope="module")
def checkpoint(tiny_bundle):
    return tiny_bundle.parent / "model" / "model.pt"


@pytest.fixture(scope="module")
def expected(checkpoint, images) -> np.ndarray:
    with open_graph(checkpoint, "fp32", None, "fp32") as reference:
        return reference.run(images)


def opened(checkpoint, arithmetic: str, form: str = "eager"):
    try:
        return open_graph(checkpoint, "fp32", None, arithmetic, GPU, form)
    except DeviceError as error:
        pytest.skip(str(error))


def test_pytorch_in_float32_gives_the_logits_of_the_cpu(checkpoint, images, expected):
    with opened(checkpoint, "fp32") as session:
        logits = session.run(images)
        assert session.device.startswith("GPU ")
    assert np.abs(logits - expected).max() <= 1e-3 * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize(("arithmetic", "form"), [("fp32", "cuda-graph"), *PEERS_ON_GPU])
def test_every_pytorch_form_has_correct_masks_and_device_times(
    checkpoint, images, expected, arithmetic, form, record_property
):
    with opened(checkpoint, arithmetic, form) as session:
        for batch in (images, images[:1], images):
            labels = session.run(batch).argmax(1)
            assert (labels != expected[: len(batch)].argmax(1)).mean() <= SLACK[arithmetic]
        times = session.time_on_device(images[:1], 0.0, 50)
    assert times is not None
    record_property("device_ms", float(np.median(times.compute_ms)))
    record_property("enqueue_ms", float(np.median(times.enqueue_ms)))
    assert len(times.compute_ms) >= 50
    assert all(0 < ms < 1000 for ms in (*times.compute_ms, *times.upload_ms, *times.download_ms))
    assert len(times.images_per_s) == FORMS[form].overlaps
    assert all(rate > 0 for rate in times.images_per_s)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name.startswith("onnxruntime-")])
def test_onnx_runtime_has_every_node_on_the_gpu_and_the_masks_of_the_cpu(
    tiny_bundle, images, expected, backend, record_property
):
    try:
        session = open_session(load_bundle(tiny_bundle), backend, device=GPU)
    except MissingExtraError as error:
        pytest.skip(str(error))
    except DeviceError as error:
        if backend == "onnxruntime-tensorrt" and not is_installed("tensorrt"):
            pytest.skip(f"TensorRT is not installed: {error}")
        raise
    with session:
        assert (session.run(images).argmax(1) != expected.argmax(1)).mean() <= SLACK["fp32"]
        times = session.time_on_device(images[:1], 0.0, 50)
        if BACKENDS[backend].package == "onnxruntime":
            assert times is not None
            record_property("device_ms", float(np.median(times.compute_ms)))
            assert all(0 < ms < 1000 for ms in times.compute_ms)
            assert times.images_per_s == []  # it computes in one stream
