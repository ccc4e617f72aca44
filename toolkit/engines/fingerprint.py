"""What an engine was built from and for: the side-car beside every ``*.plan``, and whether it fits the machine here.

An engine is machine code for one version of one library and for a few GPUs. Nothing of a plan is ever parsed to find
out; the side-car says it, and each difference becomes a sentence.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medseg_trt.errors import ArtefactError
from medseg_trt.files import parse_json, read_limited, write_json
from medseg_trt.spec import LIBRARY_NAMES, Hardware, from_dict, to_dict

SCHEMA = 1
MAX_BYTES = 1 << 20  # of a side-car
FOLDER = "engines"  # of a bundle
FIRST_COMPATIBLE_SM = 80  # of the hardware level "ampere_plus"


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineFingerprint:
    """Everything that decides what an engine is and where it may run."""

    schema: int = SCHEMA
    plan: str  # file name, beside the side-car
    sha256: str  # of the plan
    bytes: int
    library: str  # a key of LIBRARY_NAMES
    version: str  # of the library
    targets: tuple[str, ...]  # "sm86", "sm89" …; for the classic library, the GPU it was built on
    gpu: str | None = None  # that it was built and timed on; None: built without one
    driver: str | None = None  # of that machine
    cuda: str | None = None  # the CUDA version the library is built for, "13" or "13.0"
    precision: str  # of the variant
    flavour: str
    graph: str  # file name of the ONNX graph in the bundle
    graph_sha256: str
    weights_sha256: str
    plugins: Mapping[str, str] = field(default_factory=dict[str, str])  # name -> digest of the kernels behind it
    batch: tuple[int, int, int]  # least, most usual and largest batch
    stripped: bool = False  # without weights: it has to be refitted from the graph before it runs
    version_compatible: bool = False  # any version of the library with the same major number reads it
    hardware: Hardware = "none"  # level of hardware compatibility
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
    """What an engine meets on a machine; None where that is not known."""

    library: str
    version: str | None  # None: not installed
    sm: str | None = None  # of the GPU, "sm86"
    gpu: str | None = None
    driver: str | None = None
    cuda: str | None = None  # the newest CUDA that the driver runs, "13.0"
    graph_sha256: str | None = None  # of the file in the bundle
    weights_sha256: str | None = None
    plugins: Mapping[str, str] = field(default_factory=dict[str, str])  # that this version of medseg-trt would register


def side_car(plan: Path) -> Path:
    """Return where the fingerprint of a plan lies."""
    return plan.with_suffix(".json")


def write_fingerprint(fingerprint: EngineFingerprint, folder: Path) -> Path:
    """Write the side-car of a plan in ``folder`` and return its path."""
    path = side_car(folder / fingerprint.plan)
    write_json(path, to_dict(fingerprint))
    return path


def read_fingerprint(path: Path) -> EngineFingerprint:
    """Read the side-car of a plan; ``path`` is either of the two. The plan itself is not opened.

    Raises:
        ArtefactError: there is none, or it is damaged, or it belongs to another plan.
    """
    car = side_car(path)
    if not car.is_file():
        raise ArtefactError(f"{car} is missing, so nobody knows what {path.name} is; build the engine again")
    fingerprint = from_dict(EngineFingerprint, parse_json(car, read_limited(car, MAX_BYTES)), str(car))
    if side_car(car.with_name(fingerprint.plan)) != car:
        raise ArtefactError(f"{car} describes {fingerprint.plan}, another plan; build the engine again")
    return fingerprint


def mismatches(fingerprint: EngineFingerprint, here: RuntimeEnvironment) -> list[str]:
    """Say in one sentence each what keeps an engine from being used here; an empty list: nothing known does."""
    return [sentence for check in CHECKS if (sentence := check(fingerprint, here)) is not None]


def rebuild_hint(folder: Path) -> str:
    """Return the sentence that says how the engines of a bundle are built again."""
    return f"Rebuild it from the bundle's own graph: medseg-trt infer --rebuild --bundle {folder} IMAGES"


def _library(found: EngineFingerprint, here: RuntimeEnvironment) -> str | None:
    name = LIBRARY_NAMES[found.library]
    if here.library != found.library:
        return f"{found.plan} is an engine of {name}, which {LIBRARY_NAMES[here.library]} cannot read."
    if here.version is None:
        return f"{found.plan} needs {name} {found.version}, which is not installed here."
    same = here.version == found.version
    if same or (found.version_compatible and _major(here.version) == _major(found.version)):
        return None
    return f"{found.plan} was built by {name} {found.version}; {here.version} is installed here and cannot read it."


def _gpu(found: EngineFingerprint, here: RuntimeEnvironment) -> str | None:
    if here.sm is None:
        return None
    what = f"this GPU{f', {here.gpu},' if here.gpu else ''} is {here.sm}"
    if found.hardware == "ampere_plus":
        known = here.sm.removeprefix("sm").isdecimal() and int(here.sm.removeprefix("sm")) >= FIRST_COMPATIBLE_SM
        return None if known else f"{found.plan} runs on sm{FIRST_COMPATIBLE_SM} and newer; {what}."
    if here.sm not in found.targets:
        return f"{found.plan} was built for {', '.join(found.targets)}; {what}."
    if found.hardware == "none" and found.gpu is not None and here.gpu not in (None, found.gpu):
        return f"{found.plan} was tuned on another GPU of the same kind, {found.gpu}; this one is {here.gpu}."
    return None


def _driver(found: EngineFingerprint, here: RuntimeEnvironment) -> str | None:
    if here.cuda is None or found.cuda is None or int(_major(here.cuda)) >= int(_major(found.cuda)):
        return None
    driver = f"driver {here.driver}" if here.driver else "driver"
    return f"{found.plan} needs CUDA {found.cuda}; the {driver} here goes up to CUDA {here.cuda}."


def _graph(found: EngineFingerprint, here: RuntimeEnvironment) -> str | None:
    pairs = ((here.graph_sha256, found.graph_sha256), (here.weights_sha256, found.weights_sha256))
    if all(there in (None, then) for there, then in pairs):
        return None
    return f"{found.plan} was built from another {found.graph} than the one that lies in the bundle."


def _plugins(found: EngineFingerprint, here: RuntimeEnvironment) -> str | None:
    changed = sorted(name for name, digest in found.plugins.items() if here.plugins.get(name) != digest)
    if not changed:
        return None
    return f"{found.plan} was built with other kernels behind its plugins {', '.join(changed)} than this version has."


Check = Callable[[EngineFingerprint, RuntimeEnvironment], str | None]
CHECKS: tuple[Check, ...] = (_library, _gpu, _driver, _graph, _plugins)


def _major(version: str) -> str:
    return version.partition(".")[0]
