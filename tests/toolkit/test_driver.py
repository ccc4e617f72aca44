import ctypes
from types import SimpleNamespace

import pytest

from medseg_trt import gpu
from medseg_trt.errors import DeviceError
from medseg_trt.gpu import Gpu, find_gpu, listed_gpus, pci_bus_id, require_gpu


def driver(*, devices: int = 1, init: int = 0, attribute: int = 0) -> SimpleNamespace:
    """A driver that knows an A10 and CUDA 13.0."""

    def put(number: int, result: int = 0):
        def call(target, *_: object) -> int:
            target._obj.value = number
            return result

        return call

    def name(target, *_: object) -> int:
        target.value = b"NVIDIA A10"
        return 0

    def capability(target, number: int, _: object) -> int:
        target._obj.value = {75: 8, 76: 6}[number]
        return attribute

    def place(target, length: int, _: object) -> int:
        assert length >= 13
        target.value = b"0000:41:00.0"
        return attribute

    return SimpleNamespace(
        cuInit=lambda _: init,
        cuDeviceGetCount=put(devices),
        cuDeviceGet=put(0),
        cuDeviceGetName=name,
        cuDriverGetVersion=put(13000),
        cuDeviceGetAttribute=capability,
        cuDeviceGetPCIBusId=place,
    )


@pytest.fixture
def installed(monkeypatch, tmp_path):
    def install(driver_library: SimpleNamespace | None) -> None:
        def load(_: str) -> SimpleNamespace:
            if driver_library is None:
                raise OSError("no such library")
            return driver_library

        monkeypatch.setattr(ctypes, "CDLL", load)
        monkeypatch.setattr(gpu, "DRIVER_FILE", tmp_path / "version")

    return install


def test_a_gpu_is_named_with_its_kind_and_its_driver(installed, tmp_path):
    installed(driver())
    assert find_gpu() == Gpu(name="NVIDIA A10", sm="sm86", cuda="13.0", driver=None)
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 2025\n")
    a10 = find_gpu()
    assert a10 is not None
    assert a10.driver == "580.65.06"


@pytest.mark.parametrize("library", [None, driver(devices=0), driver(init=100), driver(attribute=1)])
def test_without_a_driver_or_a_device_there_is_none(installed, library):
    installed(library)
    assert find_gpu() is None


@pytest.mark.parametrize(
    ("library", "number", "words"),
    [
        (None, 0, "there is no GPU cuda:0: no NVIDIA driver is installed; see medseg-trt doctor"),
        (driver(init=100), 1, "there is no GPU cuda:1: the NVIDIA driver lists no GPUs; see"),
        (driver(init=803), 0, r"the NVIDIA driver does not start \(CUDA error 803\); see"),
        (driver(devices=1), 1, "there is no GPU cuda:1: the NVIDIA driver lists 1 GPU; see"),
        (driver(devices=2), 2, "there is no GPU cuda:2: the NVIDIA driver lists 2 GPUs; see"),
    ],
)
def test_a_missing_gpu_is_an_error_that_says_what_the_driver_lists(installed, library, number, words):
    installed(library)
    with pytest.raises(DeviceError, match=words) as caught:
        require_gpu(number)
    assert "\n" not in str(caught.value)
    assert find_gpu(number) is None


def test_a_gpu_that_is_listed_is_returned(installed):
    installed(driver(devices=2))
    assert listed_gpus().count == 2
    assert require_gpu(1).name == "NVIDIA A10"


@pytest.mark.parametrize(
    ("library", "place"),
    [(None, None), (driver(init=100), None), (driver(attribute=1), None), (driver(), "0000:41:00.0")],
)
def test_a_gpu_has_a_place_on_the_bus(installed, library, place):
    installed(library)
    assert pci_bus_id(0) == place
