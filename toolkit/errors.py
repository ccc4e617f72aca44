"""The errors that medseg-trt raises on purpose, and the exit code that each one ends the command line with.

    MedsegError                 1
    ├── InputError              1   a file or folder from outside that cannot be used
    ├── UsageError              2   arguments that cannot work together
    ├── AccuracyGateError       3   the masks changed more than was allowed
    ├── SpeedGateError          4   the model is slower than was asked for
    ├── ArtefactError           5   a checkpoint, block or bundle that is incompatible or not to be trusted
    └── DeviceError             6   nothing on this machine can run what was asked for
        └── MissingExtraError   6   ... because a package is not installed

A message is one line that says what is wrong, where, and what to type next.
"""

import importlib
from types import ModuleType


class MedsegError(Exception):
    """Any error that medseg-trt raises on purpose."""

    exit_code = 1


class InputError(MedsegError):
    """A file or folder from outside cannot be used."""


class UsageError(MedsegError):
    """The arguments cannot work together."""

    exit_code = 2


class AccuracyGateError(MedsegError):
    """The masks changed more than was allowed."""

    exit_code = 3


class SpeedGateError(MedsegError):
    """The model is slower than was asked for."""

    exit_code = 4


class ArtefactError(MedsegError):
    """A checkpoint, frozen block or bundle is incompatible, damaged or not to be trusted."""

    exit_code = 5


class DeviceError(MedsegError):
    """Nothing on this machine can run what was asked for."""

    exit_code = 6


class MissingExtraError(DeviceError):
    """A package that this command needs is not installed."""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional package, or say which extra of medseg-trt installs it.

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
