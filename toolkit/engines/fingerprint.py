"""The fingerprint of an engine, in a metadata file beside every ``*.plan``, and its comparison with this machine.

An engine is machine code for one version of one library and for a few GPUs. A plan is never parsed to find out which:
the metadata file records it, and each mismatch is reported as a sentence.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from medseg_trt.errors import ArtefactError
from medseg_trt.files import parse_json, read_limited, write_json
from medseg_trt.spec import LIBRARY_NAMES, Hardware, from_dict, to_dict

SCHEMA, OLDER = 2, 1  # both are read
RENAMED: Mapping[str, str] = {"flavour": "dialect"}  # fields of the older schema: old name -> new name
MAX_BYTES = 1 << 20  # of a metadata file
FIRST_COMPATIBLE_SM = 80  # of the hardware level "ampere_plus"


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineFingerprint:
    """What an engine was built from, by and for, which decides where it can run."""

    schema: int = SCHEMA
    plan: str  # file name, in the folder of the metadata file
    sha256: str  # of the plan
    bytes: int
    library: str  # a key of LIBRARY_NAMES
    version: str  # of the library
    targets: tuple[str, ...]  # "sm86", "sm89" …; for the classic library, the GPU it was built on
    gpu: str | None = None  # on which it was built and timed; None: built without a GPU
    driver: str | None = None  # of that machine
    cuda: str | None = None  # the CUDA version the library is built for, "13" or "13.0"
    precision: str  # of the variant
    dialect: str
    graph: str  # file name of the ONNX graph in the bundle
    graph_sha256: str
    weights_sha256: str
    plugins: Mapping[str, str] = field(default_factory=dict[str, str])  # name -> digest of the kernels behind it
    batch: tuple[int, int, int]  # smallest, optimised and largest batch size
    stripped: bool = False  # without weights, which must be refitted from the graph before it runs
    version_compatible: bool = False  # every library version with the same major number can load it
    hardware: Hardware = "none"  # hardware compatibility level
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])  # of the builder

    __pydantic_config__ = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise ValueError(f"schema {self.schema}; this version reads {SCHEMA}")
        for name in (self.plan, self.graph):
            if not name or Path(name).name != name:
                raise ValueError(f"{name!r} is no plain file name")
        if self.library not in LIBRARY_NAMES:
            raise ValueError(f"no library is called {self.library!r}; known are {', '.join(LIBRARY_NAMES)}")
        if self.cuda is not None and not _major(self.cuda).isdecimal():
            raise ValueError(f"the CUDA version {self.cuda!r} is no number")
        if not 1 <= self.batch[0] <= self.batch[1] <= self.batch[2]:
            raise ValueError(f"the batch range {self.batch} is not in ascending order from 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class RuntimeEnvironment:
    """The properties of a machine and a bundle that an engine must match; None: unknown."""

    library: str
    version: str | None  # None: not installed
    sm: str | None = None  # of the GPU, "sm86"
    gpu: str | None = None
    driver: str | None = None
    cuda: str | None = None  # the newest CUDA that the driver runs, "13.0"
    graph_sha256: str | None = None  # of the file in the bundle
    weights_sha256: str | None = None
    plugins: Mapping[str, str] = field(default_factory=dict[str, str])  # of this version of medseg-trt


def metadata_path(plan: Path) -> Path:
    """Return the path of a plan's metadata file."""
    return plan.with_suffix(".json")


def write_fingerprint(fingerprint: EngineFingerprint, folder: Path) -> Path:
    """Write the metadata file of a plan in ``folder`` and return its path."""
    path = metadata_path(folder / fingerprint.plan)
    write_json(path, to_dict(fingerprint))
    return path


def read_fingerprint(path: Path) -> EngineFingerprint:
    """Read the metadata file of a plan; ``path`` names either of the two. The plan itself is not opened.

    Raises:
        ArtefactError: it is missing or damaged, or it belongs to another plan.
    """
    metadata = metadata_path(path)
    if not metadata.is_file():
        raise ArtefactError(f"{metadata} is missing, so {path.name} cannot be identified; build the engine again")
    return parse_fingerprint(metadata, read_limited(metadata, MAX_BYTES))


def parse_fingerprint(metadata: Path, content: bytes) -> EngineFingerprint:
    """Return the fingerprint in a metadata file.

    Args:
        metadata: path of the file.
        content: its bytes.

    Raises:
        ArtefactError: it is damaged, or belongs to another plan.
    """
    fingerprint = from_dict(EngineFingerprint, _current_fields(parse_json(metadata, content)), str(metadata))
    if metadata_path(metadata.with_name(fingerprint.plan)) != metadata:
        raise ArtefactError(f"{metadata} describes {fingerprint.plan}, another plan; build the engine again")
    return fingerprint


def _current_fields(value: object) -> object:
    """Return the fields of an earlier schema under today's names; anything else stays as it is."""
    if not isinstance(value, dict):
        return value
    fields = cast("dict[str, Any]", value)
    if fields.get("schema") != OLDER:
        return fields
    return {RENAMED.get(name, name): content for name, content in fields.items()} | {"schema": SCHEMA}


def mismatches(fingerprint: EngineFingerprint, environment: RuntimeEnvironment) -> list[str]:
    """Return one sentence per reason why an engine cannot run in an environment; empty if no reason is known."""
    return [sentence for check in CHECKS if (sentence := check(fingerprint, environment)) is not None]


def rebuild_hint(folder: Path) -> str:
    """Return the sentence that tells how to rebuild the engines of a bundle."""
    return f"Rebuild it from the bundle's own graph: medseg-trt infer --rebuild --bundle {folder} IMAGES"


def _library(built: EngineFingerprint, machine: RuntimeEnvironment) -> str | None:
    name = LIBRARY_NAMES[built.library]
    if machine.library != built.library:
        return f"{built.plan} is an engine of {name}, which {LIBRARY_NAMES[machine.library]} cannot read."
    if machine.version is None:
        return f"{built.plan} needs {name} {built.version}, which is not installed here."
    is_same = machine.version == built.version
    if is_same or (built.version_compatible and _major(machine.version) == _major(built.version)):
        return None
    return f"{built.plan} was built by {name} {built.version}; {machine.version} is installed here and cannot read it."


def _gpu(built: EngineFingerprint, machine: RuntimeEnvironment) -> str | None:
    if machine.sm is None:
        return None
    this_gpu = f"this GPU{f', {machine.gpu},' if machine.gpu else ''} is {machine.sm}"
    if built.hardware == "ampere_plus":
        is_compatible = (
            machine.sm.removeprefix("sm").isdecimal() and int(machine.sm.removeprefix("sm")) >= FIRST_COMPATIBLE_SM
        )
        return None if is_compatible else f"{built.plan} runs on sm{FIRST_COMPATIBLE_SM} and newer; {this_gpu}."
    if machine.sm not in built.targets:
        return f"{built.plan} was built for {', '.join(built.targets)}; {this_gpu}."
    if built.hardware == "none" and built.gpu is not None and machine.gpu not in (None, built.gpu):
        return f"{built.plan} was tuned on another GPU of the same kind, {built.gpu}; this one is {machine.gpu}."
    return None


def _driver(built: EngineFingerprint, machine: RuntimeEnvironment) -> str | None:
    if machine.cuda is None or built.cuda is None or int(_major(machine.cuda)) >= int(_major(built.cuda)):
        return None
    driver = f"driver {machine.driver}" if machine.driver else "driver"
    return f"{built.plan} needs CUDA {built.cuda}; the {driver} goes up to CUDA {machine.cuda}."


def _graph(built: EngineFingerprint, machine: RuntimeEnvironment) -> str | None:
    pairs = (
        (machine.graph_sha256, built.graph_sha256),
        (machine.weights_sha256, built.weights_sha256),
    )
    if all(present in (None, recorded) for present, recorded in pairs):
        return None
    return f"{built.plan} was built from another {built.graph} than the one in the bundle."


def _plugins(built: EngineFingerprint, machine: RuntimeEnvironment) -> str | None:
    changed = sorted(name for name, digest in built.plugins.items() if machine.plugins.get(name) != digest)
    if not changed:
        return None
    return f"{built.plan} was built with other kernels behind its plugins {', '.join(changed)} than this version has."


CHECKS: tuple[Callable[[EngineFingerprint, RuntimeEnvironment], str | None], ...] = (
    _library,
    _gpu,
    _driver,
    _graph,
    _plugins,
)


def _major(version: str) -> str:
    return version.partition(".")[0]
