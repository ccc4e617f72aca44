"""``--device`` and ``--backend`` together: an engine that fits, else the graphs; what contradicts itself is refused."""

from dataclasses import replace

import pytest
from fakes.bundles import with_engine
from fakes.trt import FakeTrt

from medseg_trt.bundles.bundle import load_bundle
from medseg_trt.devices import AUTO, CPU, ComputeDevice
from medseg_trt.engines import choice
from medseg_trt.errors import DeviceError, UsageError
from medseg_trt.gpu import Gpu
from medseg_trt.sessions import open as opening
from medseg_trt.sessions.open import choose

ADA = Gpu(name="Fake GPU", sm="sm89", cuda="13.0", driver=None)
HOPPER = replace(ADA, sm="sm90")
CUDA = ComputeDevice("cuda")


@pytest.fixture
def bundle(tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(
        choice, "installed_version", lambda name: FakeTrt.__version__ if name == "tensorrt-rtx" else None
    )
    monkeypatch.setattr(opening, "is_installed", lambda _: True)
    return load_bundle(with_engine(tiny_bundle, tmp_path / "model.medseg"))


@pytest.mark.parametrize(("gpu", "backend"), [(ADA, "tensorrt-rtx"), (HOPPER, "onnxruntime-cuda")])
def test_on_a_gpu_an_engine_that_fits_is_taken_or_else_the_graphs(bundle, monkeypatch, gpu, backend):
    monkeypatch.setattr("medseg_trt.gpu.find_gpu", lambda number: gpu)
    assert choose(bundle, "auto", None, CUDA).backend == backend
    assert choose(bundle, "auto", "fp32", CUDA).backend == backend


def test_a_gpu_that_is_not_there_is_an_error_and_no_other_device_is_taken(bundle, monkeypatch):
    monkeypatch.setattr("medseg_trt.gpu.find_gpu", lambda number: None)
    with pytest.raises(DeviceError, match="there is no GPU cuda:0: "):
        choose(bundle, "auto", None, CUDA)


@pytest.mark.parametrize(
    ("backend", "device", "words"),
    [
        ("onnxruntime", CUDA, "onnxruntime runs on the processor, not on --device cuda:0; choose --device cpu"),
        ("tensorrt-rtx", CPU, "tensorrt-rtx runs on a GPU, not on --device cpu; choose --device cuda"),
        ("onnxruntime-cuda", CPU, "choose --device cuda"),
    ],
)
def test_backend_unsupported_on_the_device_is_refused(bundle, backend, device, words):
    with pytest.raises(UsageError, match=words):
        choose(bundle, backend, None, device)


def test_what_a_build_measured_on_a_gpu_is_taken_only_where_there_is_one(bundle, monkeypatch):
    first = replace(bundle.default, backend="onnxruntime-cuda", median_ms=0.1)
    measured = replace(bundle, content=replace(bundle.content, executions=(first, *bundle.content.executions)))
    for device, gpu, backend in (
        (AUTO, ADA, "onnxruntime-cuda"),
        (AUTO, None, bundle.default.backend),
        (CPU, ADA, bundle.default.backend),
    ):
        monkeypatch.setattr(opening, "find_gpu", lambda number, gpu=gpu: gpu)
        assert choose(measured, "auto", None, device).backend == backend


def test_an_engine_that_a_build_measured_is_taken_only_on_a_gpu_that_it_fits(bundle, monkeypatch):
    engine = replace(bundle.content.engines[0], executed=True)
    first = replace(bundle.default, backend="tensorrt-rtx", median_ms=0.1, golden_error=0.25)
    content = replace(bundle.content, executions=(first, *bundle.content.executions), engines=(engine,))
    measured = replace(bundle, content=content)
    for gpu, backend in ((ADA, "tensorrt-rtx"), (HOPPER, bundle.default.backend), (None, bundle.default.backend)):
        monkeypatch.setattr(opening, "find_gpu", lambda number, gpu=gpu: gpu)
        assert choose(measured, "auto", None, AUTO).backend == backend
    assert choose(measured, "tensorrt-rtx", None, AUTO) == first  # opening it says why it cannot run
    with pytest.raises(ValueError, match="no engine of it was executed"):
        replace(content, engines=(replace(engine, executed=False),))
