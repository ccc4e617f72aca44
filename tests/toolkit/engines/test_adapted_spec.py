"""An engine that is rebuilt gets the other library where its own does not build for the GPU."""

from dataclasses import replace
from enum import Enum
from types import ModuleType

import pytest

from medseg_trt.engines import rebuild
from medseg_trt.engines.rebuild import adapted_spec
from medseg_trt.errors import UsageError
from medseg_trt.export.tensorrt.build import LIBRARIES
from medseg_trt.gpu import Gpu
from medseg_trt.spec import EngineSpec

HOPPER = Gpu(name="NVIDIA H200", sm="sm90", cuda="13.0", driver=None)
ADA = Gpu(name="NVIDIA L4", sm="sm89", cuda="13.0", driver=None)
SPEC = EngineSpec(library="tensorrt-rtx", targets=("sm86",), opt_batch=2, max_batch=4)
CLASSIC = EngineSpec(library="tensorrt", targets=("sm86",), version_compatible=True, hardware="ampere_plus")


def module(**names: object) -> ModuleType:
    made = ModuleType("stand-in")
    vars(made).update(names)
    return made


@pytest.fixture
def installed(monkeypatch):
    """Return a function that installs stand-ins; TensorRT-RTX knows the GPUs that 1.7 knows."""
    targets = Enum("ComputeCapability", [(f"SM{number}", number) for number in (75, 80, 86, 89, 120, 121)])
    modules = {
        "tensorrt-rtx": module(__version__="1.7.1.116", ComputeCapability=targets),
        "tensorrt": module(__version__="11.4.0"),
    }

    def install(*names: str) -> None:
        monkeypatch.setattr(rebuild, "installed_version", lambda name: "1" if name in names else None)
        monkeypatch.setattr(rebuild, "require_library", lambda name: modules[name])

    return install


def test_adapted_spec_keeps_the_library_that_supports_the_gpu(installed):
    installed("tensorrt-rtx", "tensorrt")
    spec = adapted_spec(SPEC, ADA)
    assert (spec.library, spec.targets, spec.opt_batch, spec.max_batch) == ("tensorrt-rtx", ("sm89",), 2, 4)


def test_on_hopper_the_classic_library_takes_over(installed):
    installed("tensorrt-rtx", "tensorrt")
    assert adapted_spec(SPEC, HOPPER).library == "tensorrt"
    assert adapted_spec(SPEC, HOPPER).targets == ("sm90",)


def test_plugins_are_left_out_for_a_gpu_that_runs_none_of_their_kernels(installed, caplog):
    installed("tensorrt-rtx")
    plugins = replace(SPEC, plugins=True)
    assert adapted_spec(plugins, ADA).plugins
    assert not caplog.text
    assert not adapted_spec(plugins, Gpu(name="T4", sm="sm75", cuda="13.0", driver=None)).plugins
    assert "sm75 runs no plugins" in caplog.text


def test_options_that_the_other_library_lacks_are_dropped(installed):
    installed("tensorrt-rtx")
    spec = adapted_spec(CLASSIC, ADA)
    assert (spec.library, spec.version_compatible, spec.hardware) == ("tensorrt-rtx", False, "none")


@pytest.mark.parametrize("names", [("tensorrt-rtx",), ()])
def test_without_a_library_for_the_gpu_every_reason_is_given(installed, names):
    installed(*names)
    with pytest.raises(UsageError, match=r"NVIDIA H200, sm90: .*; TensorRT is not installed: pip install") as caught:
        adapted_spec(SPEC, HOPPER)
    assert ("cannot build for sm90" in str(caught.value)) is bool(names)


@pytest.mark.parametrize(("library", "asked"), [("tensorrt-rtx", True), ("tensorrt", False)])
def test_an_engine_that_is_captured_allocates_nothing_while_it_runs(library, asked):
    """A capture needs the flag of TensorRT-RTX; the classic library does not have it."""
    assert ("REQUIRE_USER_ALLOCATION" in LIBRARIES[library].flags) is asked
    trt = pytest.importorskip("tensorrt_rtx")
    assert all(flag in trt.BuilderFlag.__members__ for flag in LIBRARIES["tensorrt-rtx"].flags)
