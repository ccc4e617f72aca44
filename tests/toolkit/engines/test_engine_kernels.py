import pytest

from medseg_trt.engines import kernels as engine_kernels
from medseg_trt.engines.kernels import FOR_PICTURES, KERNELS_FOLDER, add_kernels
from medseg_trt.errors import DeviceError, MissingExtraError
from medseg_trt.kernels import load
from medseg_trt.kernels.library import open_library
from medseg_trt.kernels.nodes import NODES
from medseg_trt.spec import EngineSpec

SPEC = EngineSpec(library="tensorrt-rtx", targets=("sm86", "sm120"))
WITH_PLUGINS = EngineSpec(library="tensorrt-rtx", targets=("sm86",), plugins=True)
TURING = EngineSpec(library="tensorrt-rtx", targets=("sm75", "sm86"))
ORIN = EngineSpec(library="tensorrt", targets=("sm87",))


def test_the_kernels_of_a_bundle_are_found_for_every_later_gpu(tmp_path):
    assert add_kernels(tmp_path, SPEC) == ()
    find_ptx = open_library(tmp_path / KERNELS_FOLDER)
    for kernel in map(load, FOR_PICTURES):
        for entry in kernel.entries:
            for capability in (80, 86, 89, 120):
                assert entry.symbol in find_ptx(kernel, entry, capability, (13, 0))
            with pytest.raises(DeviceError):
                find_ptx(kernel, entry, 75, (13, 0))


def test_a_bundle_for_sm75_has_the_kernels_on_images_in_the_ptx_that_was_verified_for_sm80(tmp_path):
    assert add_kernels(tmp_path, TURING) == ()
    find_ptx = open_library(tmp_path / KERNELS_FOLDER)
    for kernel in map(load, FOR_PICTURES):
        for entry in kernel.entries:
            for_turing, for_ampere = (find_ptx(kernel, entry, capability, (13, 0)) for capability in (75, 86))
            assert ".target sm_75" in for_turing
            assert for_turing == for_ampere.replace(".target sm_80", ".target sm_75") != for_ampere


@pytest.mark.parametrize(
    ("spec", "targets", "further"),
    [
        (SPEC, ["sm_80"], ()),
        (TURING, ["sm_80", "sm_75"], ()),
        (ORIN, ["sm_80", "jetpack6"], ()),
        (WITH_PLUGINS, ["sm_80"], tuple(sorted({node.kernel_name for node in NODES.values()}))),
    ],
    ids=["pictures", "turing", "jetpack6", "plugins"],
)
def test_add_kernels_builds_the_kernels_that_an_engine_needs(tmp_path, monkeypatch, spec, targets, further):
    asked = []

    def build(folder, targets, kernels):
        asked.append((targets, kernels))
        return {}

    monkeypatch.setattr(engine_kernels, "build", build)
    add_kernels(tmp_path, spec)
    assert asked == [(targets, (*FOR_PICTURES, *further))]


def test_without_a_compiler_pictures_are_the_cpus_affair_and_plugins_impossible(tmp_path, monkeypatch, caplog):
    def absent(*_):
        raise MissingExtraError("nvidia-cuda-nvrtc is not installed")

    monkeypatch.setattr(engine_kernels, "build", absent)
    (reason,) = add_kernels(tmp_path, SPEC)
    assert "nvidia-cuda-nvrtc is not installed" in reason
    assert "on the CPU" in caplog.text
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(MissingExtraError):
        add_kernels(tmp_path, WITH_PLUGINS)
