"""The manifest of a bundle, as data: every graph, every way to run it, every engine and file."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from medseg_trt.spec import BuildSpec, Classes, EngineSpec, ModelSpec, Preprocessing

SCHEMA = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class FileEntry:
    """What a file of the bundle must be."""

    sha256: str
    bytes: int

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One graph of the bundle: the network in one precision and one flavour."""

    precision: str
    flavour: str  # a key of export.graph.dialects.DIALECTS
    graph: str  # file names in the bundle
    weights: str
    passes: Mapping[str, Any]  # what folding, fusing and quantising did, and why not more

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Execution:
    """One way to run a variant, and what came of it on the machine where the bundle was built."""

    variant: str  # a key of Manifest.variants
    backend: str  # a key of sessions.backends.BACKENDS
    compute: str  # what its float parts are computed in: fp32 or bf16
    executed: bool  # False where the back-end was not installed: then the other figures are of the same graph elsewhere
    golden_error: float  # how far the logits of the golden input may be from those in GOLDEN
    verification: Mapping[str, Any]  # against PyTorch: how far, on which images, whether the gate holds
    median_ms: float | None = None  # of one image

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class BuiltEngine:
    """An engine of the bundle, for GPUs; its fingerprint and the report of its layers lie beside it."""

    plan: str  # "engines/NAME.plan"
    variant: str  # a key of Manifest.variants: the graph that it was built from
    spec: EngineSpec
    executed: bool = False  # whether it ever ran; until then all that is known of its masks is that of the graph
    wall_s: float  # that the process which built it took, with everything
    processor_s: float  # that it used
    peak_resident_mb: float  # that it had at most; 0 where the system does not say
    unmet: tuple[str, ...] = ()  # what the report of its layers expected in vain

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What stands in ``manifest.json``."""

    schema: int = SCHEMA
    model: ModelSpec
    preprocessing: Preprocessing
    classes: Classes
    build: BuildSpec
    source: Mapping[str, Any]  # the checkpoint's name, digests, training data and recipe
    versions: Mapping[str, str]
    variants: Mapping[str, Variant]
    executions: tuple[Execution, ...]  # the best first: that is what ``infer`` uses where its back-end is installed
    engines: tuple[BuiltEngine, ...] = ()
    dropped: tuple[str, ...] = ()  # the executions that were tried and are not to be used, each with its reason
    files: Mapping[str, FileEntry] = field(default_factory=dict[str, FileEntry])  # filled in by seal

    __pydantic_config__ = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if not self.executions:
            raise ValueError("there is no way to run the bundle in it")
        for execution in self.executions:
            if execution.variant not in self.variants:
                raise ValueError(f"the variant {execution.variant!r} is not among {', '.join(self.variants)}")
        for engine in self.engines:
            if engine.variant not in self.variants:
                raise ValueError(f"the variant {engine.variant!r} is not among {', '.join(self.variants)}")
