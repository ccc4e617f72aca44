"""Where a trained model comes from, as its checkpoint and the bundles built from it record it."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from typing import Any

from medseg_trt import __version__
from medseg_trt.spec import from_dict


@dataclass(frozen=True, kw_only=True, slots=True)
class DataRecord:
    """The data set of a training."""

    name: str | None = None
    sha256: str | None = None  # of the manifest
    note: str | None = None
    manifest: Mapping[str, object] | None = None  # ``DataFolder.manifest``; a bundle does not hold it
    root: str | None = None  # only in checkpoints of version 0.1

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """A file that weights were read from."""

    file: str  # without its folder
    sha256: str
    unused: tuple[str, ...] | None = None  # tensors of the file that the network does not have

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """Everything that is recorded about the origin of a model; None: not recorded."""

    recipe: Mapping[str, Any] | None = None  # of the training, without paths of its machine
    data: DataRecord | None = None
    imported: FileRecord | None = None  # the authors' checkpoint that it was imported from
    versions: Mapping[str, str] | None = None  # of medseg-trt, torch and python
    weights: FileRecord | None = None  # the pretrained encoder
    block: Mapping[str, Any] | None = None  # the frozen block, ``blocks.provenance_of``
    epoch: int | None = None
    step: int | None = None  # within the epoch after ``epoch``
    metrics: Mapping[str, Any] | None = None  # by split, then by class
    other: Mapping[str, Any] = field(default_factory=dict[str, Any])  # fields that this version does not know

    def to_dict(self) -> dict[str, Any]:
        """Return the stored form, plain data without the fields that are None."""
        values = {name: getattr(self, name) for name in _names(Provenance) if name != "other"}
        return {**{name: _plain(value) for name, value in values.items() if value is not None}, **self.other}


def versions() -> dict[str, str]:
    """Return the versions that a checkpoint records."""
    return {"medseg-trt": __version__, "torch": version("torch"), "python": platform.python_version()}


def parse_provenance(values: Mapping[str, object], source: str) -> Provenance:
    """Return the provenance whose stored form was read from ``source``.

    Raises:
        ArtefactError: a field is of the wrong type.
    """
    known = {name: value for name, value in values.items() if name in _names(Provenance) and name != "other"}
    other = {name: value for name, value in values.items() if name not in known}
    return from_dict(Provenance, {**known, "other": other}, source)


def _names(kind: type[Provenance | DataRecord | FileRecord]) -> list[str]:
    return [entry.name for entry in fields(kind)]


def _plain(value: Any) -> Any:
    if not isinstance(value, DataRecord | FileRecord):
        return dict(value) if isinstance(value, Mapping) else value
    values = {name: getattr(value, name) for name in _names(type(value))}
    return {name: list(part) if isinstance(part, tuple) else part for name, part in values.items() if part is not None}
