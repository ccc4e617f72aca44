"""Every error of ours ends the command line with its exit code, and a missing package names its extra."""

import importlib
import re

import pytest

from medseg_trt import errors
from medseg_trt.errors import MedsegError, MissingExtraError, require

EXIT_CODES = {
    "MedsegError": 1,
    "InputError": 1,
    "UsageError": 2,
    "AccuracyGateError": 3,
    "SpeedGateError": 4,
    "ArtefactError": 5,
    "DeviceError": 6,
    "MissingExtraError": 6,
}


def test_every_error_has_the_exit_code_that_is_documented():
    exit_codes = {
        name: error.exit_code
        for name, error in vars(errors).items()
        if isinstance(error, type) and issubclass(error, MedsegError)
    }
    assert exit_codes == EXIT_CODES
    documented = re.findall(r"(\w+Error) +(\d)\b", errors.__doc__ or "")
    assert {name: int(code) for name, code in documented} == EXIT_CODES


def test_an_installed_package_is_imported():
    import json.decoder

    assert require("json.decoder", "train") is json.decoder


def missing(name: str):
    def import_module(module: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    return import_module


@pytest.mark.parametrize("module", ["nibabel", "nibabel.orientations"])
def test_a_missing_package_names_the_extra_that_brings_it(module, monkeypatch):
    monkeypatch.setattr(importlib, "import_module", missing("nibabel"))
    with pytest.raises(MissingExtraError, match=rf"^{module} is not installed.*: pip install 'medseg-trt\[medical\]'$"):
        require(module, "medical")


def test_a_package_that_is_installed_but_broken_is_not_called_missing(monkeypatch):
    monkeypatch.setattr(importlib, "import_module", missing("packaging"))
    with pytest.raises(ModuleNotFoundError, match="packaging"):
        require("nibabel", "medical")
