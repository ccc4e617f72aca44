"""What many tests share: real samples from package registries, a tiny bundle, and which tests need what."""

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # one process per core: PyTorch's threads would spin for a core that is taken
    os.environ.setdefault("OMP_NUM_THREADS", "1")

REAL_SAMPLES = ("organs", "llama_gguf")  # fixtures that fetch packages, once per user: the cache keeps what they hold


@pytest.hookimpl(tryfirst=True)  # before -m chooses by the marks that are set here
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    without_gpu = pytest.mark.skip(reason="needs an NVIDIA GPU; no CUDA device is here")
    for item in items:
        if set(REAL_SAMPLES) & set(getattr(item, "fixturenames", ())):
            item.add_marker("network")
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    for item in gpu_tests:  # what libraries say of a card that few have seen is shown, and fails nothing
        item.add_marker(pytest.mark.filterwarnings("default"))
    if gpu_tests and not has_cuda_device():
        for item in gpu_tests:
            item.add_marker(without_gpu)


def has_cuda_device() -> bool:
    """Ask the driver, not PyTorch: the tests' PyTorch may be built for the CPU alone."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


@pytest.fixture(scope="session", autouse=True)
def state_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what the program stores for its user out of the home folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session")
def organs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the data set ``organs``: two CT scans and an MR scan, labelled by TotalSegmentator."""
    return _sample("organs", tmp_path_factory)


@pytest.fixture(scope="session")
def llama_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real language model of LLaMA architecture, quantised to four bits."""
    return _sample("llama-block", tmp_path_factory) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a bundle of random weights, whose default is ONNX Runtime; do not write to it."""
    from once import made_once

    return made_once(tmp_path_factory, "tiny", _make_tiny_bundle) / "model.medseg"


def _make_tiny_bundle(folder: Path) -> None:
    from tiny import make_checkpoint

    from medseg_trt.devices import CPU
    from medseg_trt.pipeline import build
    from medseg_trt.sessions.subprocess_session import ChildSession
    from medseg_trt.spec import BuildSpec

    milliseconds = {"onnxruntime": 1.0, "openvino": 2.0}  # of a millisecond's network, chance would decide
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ChildSession, "time", lambda session, *_, **__: [milliseconds[session.backend]])
        build(make_checkpoint(folder / "model"), BuildSpec(), folder / "model.medseg", None, device=CPU)


def _sample(name: str, factory: pytest.TempPathFactory) -> Path:
    """Skip without a network; a package that is gone or is not the one pinned fails."""
    from medseg_trt.samples.catalogue import NetworkError, get

    try:
        return get([name], factory.mktemp("samples"))[0]
    except NetworkError as error:
        pytest.skip(str(error))
