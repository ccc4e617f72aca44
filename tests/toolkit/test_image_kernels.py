import pytest

from medseg_trt import image_kernels
from medseg_trt.errors import DeviceError, MissingExtraError
from medseg_trt.image_kernels import FOLDER, KERNELS, add_image_kernels
from medseg_trt.kernels import load
from medseg_trt.kernels.library import open_library


def test_the_kernels_of_a_bundle_are_found_for_every_later_gpu(tmp_path):
    assert add_image_kernels(tmp_path, ["sm86", "sm120"]) == ()
    find_ptx = open_library(tmp_path / FOLDER)
    for kernel in map(load, KERNELS):
        for entry in kernel.entries:
            for capability in (80, 86, 89, 120):
                assert entry.symbol in find_ptx(kernel, entry, capability, (13, 0))
            with pytest.raises(DeviceError):
                find_ptx(kernel, entry, 75, (13, 0))


@pytest.mark.parametrize(("gpus", "targets"), [(["sm86"], {"sm_80"}), (["sm86", "sm87"], {"sm_80", "jetpack6"})])
def test_jetpack_6_gets_ptx_of_its_own(tmp_path, monkeypatch, gpus, targets):
    asked = []
    monkeypatch.setattr(
        image_kernels, "build", lambda folder, chosen, kernels: asked.append((set(chosen), kernels)) or {}
    )
    add_image_kernels(tmp_path, gpus)
    assert asked == [(targets, KERNELS)]


def test_without_a_compiler_the_bundle_goes_without_and_says_so(tmp_path, monkeypatch, caplog):
    def absent(*_):
        raise MissingExtraError("nvidia-cuda-nvrtc is not installed")

    monkeypatch.setattr(image_kernels, "build", absent)
    (reason,) = add_image_kernels(tmp_path, ["sm86"])
    assert "nvidia-cuda-nvrtc is not installed" in reason
    assert "on the CPU" in caplog.text
    assert list(tmp_path.iterdir()) == []
