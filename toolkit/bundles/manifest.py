"""The manifest of a bundle, as data: every graph, every way to run it, every engine and file."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from medseg_trt.bundles.block_report import BlockReport
from medseg_trt.bundles.verification import Verification
from medseg_trt.guard.guard import Guard
from medseg_trt.networks import AnyNetworkSpec
from medseg_trt.postprocess.steps import Postprocessing
from medseg_trt.spec import LIBRARY_NAMES, BuildSpec, Classes, EngineSpec, Preprocessing

SCHEMA = 4
MAX_STREAMS = 4  # each holds the activations of an image
GRAPH_SUFFIX, PLAN_SUFFIX, ENGINES_FOLDER = ".onnx", ".plan", "engines"
COMPUTE_DTYPES: Mapping[str, tuple[str, ...]] = {  # by back-end that a build tries, where its device is there
    "onnxruntime": ("fp32",),
    "openvino": ("fp32", "bf16"),
    "onnxruntime-cuda": ("fp32",),
    "onnxruntime-tensorrt": ("fp32",),
    "onnxruntime-tensorrt-rtx": ("fp32",),
    **dict.fromkeys(LIBRARY_NAMES, ("fp32",)),  # of engines that have run
}
PLAIN_NAME = re.compile(
    r"[^/\\\x00-\x1f\x7f]+"
)  # of a file in one folder; the file system refuses what else it cannot hold


@dataclass(frozen=True, kw_only=True, slots=True)
class FileEntry:
    """What a file of the bundle must be."""

    sha256: str
    bytes: int

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One graph of the bundle: the network in one precision, written for one target."""

    precision: str
    dialect: str  # a key of building.variants.GRAPH_TARGETS
    graph: str  # file name in the bundle, "NAME.onnx"
    weights: str  # file name in the bundle
    passes: Mapping[str, Any]  # what folding, fusing and quantising did, and why not more

    __pydantic_config__ = {"extra": "forbid"}

    def __post_init__(self) -> None:
        for name in (self.graph, self.weights):
            if not PLAIN_NAME.fullmatch(name):
                raise ValueError(f"{name!r} is no plain file name")
        if not self.graph.endswith(GRAPH_SUFFIX) or self.weights.endswith(GRAPH_SUFFIX):
            raise ValueError(f"the graph {self.graph!r} is an {GRAPH_SUFFIX} file, and the weights are not")


@dataclass(frozen=True, kw_only=True, slots=True)
class Execution:
    """One way to run a variant, and what came of it on the machine where the bundle was built."""

    variant: str  # a key of Manifest.variants
    backend: str  # a key of COMPUTE_DTYPES
    compute_dtype: str  # of its float parts: fp32 or bf16
    executed: bool  # False where the back-end was not installed: then the other figures are of the same graph elsewhere
    golden_error: float  # how far the logits of the golden input may be from those in GOLDEN
    verification: Verification
    median_ms: float | None = None  # of one image
    streams: int = 1  # of images: many are computed fastest so many beside each other; 1: one after another

    __pydantic_config__ = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if not (isfinite(self.golden_error) and self.golden_error >= 0):
            raise ValueError(f"the golden_error is {self.golden_error}; it must be a finite number from 0")
        if not 1 <= self.streams <= MAX_STREAMS:
            raise ValueError(f"streams are {self.streams}; they must be from 1 to {MAX_STREAMS}")


@dataclass(frozen=True, kw_only=True, slots=True)
class BuiltEngine:
    """An engine of the bundle, for GPUs; its fingerprint and the report of its layers lie beside it."""

    plan: str  # "engines/NAME.plan"
    variant: str  # a key of Manifest.variants: the graph that it was built from
    spec: EngineSpec
    executed: bool = False  # whether it was verified on a GPU; else all that is known of its masks is that of the graph
    wall_s: float  # that the process which built it took, with everything
    processor_s: float  # that it used
    peak_resident_mb: float  # that it had at most; 0 where the system does not say
    failed_expectations: tuple[str, ...] = ()  # of its layers

    __pydantic_config__ = {"extra": "forbid"}

    def __post_init__(self) -> None:
        folder, _, name = self.plan.partition("/")
        if folder != ENGINES_FOLDER or not PLAIN_NAME.fullmatch(name) or not name.endswith(PLAN_SUFFIX):
            raise ValueError(f"{self.plan!r} is not called {ENGINES_FOLDER}/NAME{PLAN_SUFFIX}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What stands in ``manifest.json``."""

    schema: int = SCHEMA
    model: AnyNetworkSpec
    preprocessing: Preprocessing
    classes: Classes
    build: BuildSpec
    source: Mapping[str, Any]  # the checkpoint's name, digests, training data and recipe
    versions: Mapping[str, str]
    variants: Mapping[str, Variant]
    executions: tuple[Execution, ...]  # the best first: that is what ``infer`` uses where its back-end is installed
    engines: tuple[BuiltEngine, ...] = ()
    block: BlockReport | None = None  # None: the network has no language block, or the bundle is older
    postprocessing: Postprocessing | None = None  # of masks; None: no step raises Dice, or the bundle is older
    guard: Guard | None = None  # against images unlike the training's; None: none was learnt, or the bundle is older
    rejected_executions: tuple[str, ...] = ()  # tried and not to be used, each with its reason
    files: Mapping[str, FileEntry] = field(default_factory=dict[str, FileEntry])  # filled in by seal

    __pydantic_config__ = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if not self.executions:
            raise ValueError("there is no way to run the bundle in it")
        corrected = [] if self.postprocessing is None else [steps.name for steps in self.postprocessing.classes]
        if unknown := sorted(set(corrected) - set(self.classes.names[1:])):
            raise ValueError(f"post-processing is of {', '.join(unknown)}, which the network does not know")
        for name in (item.variant for item in (*self.executions, *self.engines)):
            if name not in self.variants:
                raise ValueError(f"the variant {name!r} is not among {', '.join(self.variants)}")
        executed = {(engine.variant, engine.spec.library) for engine in self.engines if engine.executed}
        for execution in self.executions:
            if execution.backend in LIBRARY_NAMES and (execution.variant, execution.backend) not in executed:
                raise ValueError(f"{execution.backend} is to run {execution.variant}, and no engine of it was executed")
            if execution.compute_dtype not in COMPUTE_DTYPES.get(execution.backend, ()):
                raise ValueError(
                    f"this version has no back-end {execution.backend!r} that computes in {execution.compute_dtype!r}"
                )
