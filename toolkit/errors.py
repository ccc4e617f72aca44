"""The errors that medseg-trt raises, and their exit codes.

    MedsegError                 1
    ├── InputError              1   an input file or folder cannot be used
    ├── UsageError              2   invalid or contradictory arguments
    ├── AccuracyGateError       3   the accuracy gate failed
    ├── SpeedGateError          4   the speed gate failed
    ├── ArtefactError           5   a file is incompatible, damaged or not to be trusted
    └── DeviceError             6   a device or package is missing
        └── MissingExtraError   6   a package is not installed

A message is one line with the problem, its location and the next step.
"""

import importlib
from types import ModuleType


class MedsegError(Exception):
    """Base class of the errors of medseg-trt."""

    exit_code = 1


class InputError(MedsegError):
    """An input file or folder cannot be used."""


class UsageError(MedsegError):
    """Invalid or contradictory arguments."""

    exit_code = 2


class AccuracyGateError(MedsegError):
    """The accuracy gate failed: the masks changed more than allowed."""

    exit_code = 3


class SpeedGateError(MedsegError):
    """The speed gate failed: the model is slower than required."""

    exit_code = 4


class ArtefactError(MedsegError):
    """A checkpoint, frozen block or bundle is incompatible, damaged or not to be trusted."""

    exit_code = 5


class DeviceError(MedsegError):
    """No device of this machine can run the request."""

    exit_code = 6


class MissingExtraError(DeviceError):
    """A package that this command needs is not installed."""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional package; the error names the extra of medseg-trt that installs it.

    Args:
        module: dotted name to import, for example ``"nibabel"``.
        extra: the extra of pyproject.toml that carries it, for example ``"medical"``.

    Raises:
        MissingExtraError: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.split(".")[0]:
            raise
        raise MissingExtraError(f"{module} is not installed. Install it: pip install 'medseg-trt[{extra}]'") from error
