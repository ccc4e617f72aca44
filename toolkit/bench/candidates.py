"""Choose what a measurement compares: the reference, and executions of a bundle, each with the way to run it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from medseg_trt.bundles.bundle import Bundle
from medseg_trt.bundles.manifest import Execution
from medseg_trt.engines.choice import installed_version, judged_engines
from medseg_trt.engines.fingerprint import FOLDER
from medseg_trt.engines.gpu import Gpu, find_gpu
from medseg_trt.errors import MissingExtraError, UsageError
from medseg_trt.sessions.backends import BACKENDS, is_installed
from medseg_trt.sessions.open import gpu_executions
from medseg_trt.spec import LIBRARY_NAMES

EXACT = "fp32"
EXACT_DISAGREEMENT = 0.001  # share of pixels that may have another label where nothing was rounded
ROUNDED_FACTOR = 3  # by which a rounded network may disagree more often here than on the images of its build


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A network, and how it is run."""

    name: str  # its own in the report, and the same in the next one
    role: Literal["reference", "variant"]
    backend: str
    path: Path  # of the graph, of the checkpoint, or of the bundle for an engine
    graph: Path | None  # whose products and bytes can be counted
    precision: str  # of the stored weights
    compute: str  # what float parts are computed in
    flavour: str
    files: tuple[Path, ...]  # that it consists of
    executed: bool  # whether it can run here
    statement: str  # in words: what is run here, and what only was built or simulated
    allowed: float  # share of the network's pixels that may have another label than the reference's

    @property
    def label(self) -> str:
        """The precision in one word: ``bf16`` is the fp32 graph computed in bfloat16."""
        return precision_label(self.precision, self.compute)

    @property
    def arithmetic(self) -> str:
        """What most of its products are computed in: fp32, bf16 or int8."""
        return "int8" if "int8" in self.precision else self.compute

    @property
    def size_mb(self) -> float:
        """Size on the disk in 10^6 bytes."""
        return sum(file.stat().st_size for file in self.files) / 1e6


def precision_label(precision: str, compute: str) -> str:
    """Return the precision as ``--precision`` has it."""
    return compute if precision == EXACT else precision


def checkpoint_candidate(checkpoint: Path, block: Path | None) -> Candidate:
    """Return the PyTorch network itself, the reference."""
    return Candidate(
        name="pytorch fp32",
        role="reference",
        backend="pytorch",
        path=checkpoint,
        graph=None,
        precision=EXACT,
        compute=EXACT,
        flavour="eager",
        files=(checkpoint, *([block] if block else [])),
        executed=True,
        statement="the checkpoint itself, run here by PyTorch in float32",
        allowed=EXACT_DISAGREEMENT,
    )


def bundle_candidates(bundle: Bundle, backends: Sequence[str], with_reference: bool) -> list[Candidate]:
    """Return the best execution of every precision, or with ``backends`` of every precision on each of them.

    Engines that the bundle holds are there as well, whether they can run here or not.

    Args:
        bundle: what was built.
        backends: keys of ``sessions.backends.BACKENDS``; none: whatever is fastest here, as ``infer`` would take it.
        with_reference: make the bundle's own float32 network the first one, the reference.

    Raises:
        UsageError: there is no such back-end, or the bundle has nothing for it, or no float32 network as a reference.
        MissingExtraError: a back-end that was named is not installed, or there is none for the reference.
    """
    for name in backends:
        _require_usable(bundle, name)
    executions = bundle.content.executions
    groups: dict[tuple[str, str], list[Execution]] = {}
    for execution in executions:
        if not backends or execution.backend in backends:
            label = precision_label(bundle.variant(execution).precision, execution.compute)
            groups.setdefault((label, execution.backend if backends else ""), []).append(execution)
    chosen = [next((each for each in group if is_installed(each.backend)), group[0]) for group in groups.values()]
    on_gpus = _on_gpus(bundle, backends)
    if not with_reference:
        return [*(_candidate(bundle, execution, "variant") for execution in chosen), *on_gpus]
    reference = _reference(bundle, chosen)
    rest = [_candidate(bundle, execution, "variant") for execution in chosen if execution is not reference]
    return [_candidate(bundle, reference, "reference"), *rest, *on_gpus]


def _reference(bundle: Bundle, chosen: Sequence[Execution]) -> Execution:
    exact = [
        each
        for each in (*chosen, *bundle.content.executions)
        if precision_label(bundle.variant(each).precision, each.compute) == EXACT
    ]
    if not exact:
        raise UsageError(
            f"{bundle.folder} holds no fp32 network to compare with; give the checkpoint it was built from: --ckpt FILE"
        )
    for execution in exact:
        if is_installed(execution.backend):
            return execution
    raise _not_installed(exact[0].backend)


def _require_usable(bundle: Bundle, name: str) -> None:
    if name not in BACKENDS:
        raise UsageError(f"no back-end is called {name!r}; choose from: {', '.join(BACKENDS)}")
    held = dict.fromkeys(execution.backend for execution in bundle.content.executions)
    held |= dict.fromkeys(engine.spec.library for engine in bundle.content.engines)
    runs_graphs = BACKENDS[name].gpu and not BACKENDS[name].engines
    if name not in held and not (runs_graphs and gpu_executions(bundle, name)):
        raise UsageError(f"{bundle.folder} holds nothing for {name}; it holds {', '.join(held)}")
    if not is_installed(name):
        raise _not_installed(name)


def _not_installed(backend: str) -> MissingExtraError:
    return MissingExtraError(
        f"{BACKENDS[backend].package} is not installed. Install it: pip install 'medseg-trt[{BACKENDS[backend].extra}]'"
    )


def _on_gpus(bundle: Bundle, backends: Sequence[str]) -> list[Candidate]:
    """Return the engines of a bundle, and its graphs on those back-ends of GPUs that are named."""
    found: list[Candidate] = []
    gpu = find_gpu()
    for name, kind in BACKENDS.items():
        if not kind.gpu or name not in (backends or LIBRARY_NAMES):
            continue
        for execution in gpu_executions(bundle, name):
            found.append((_engine if kind.engines else _graph_on_gpu)(bundle, execution, gpu))
    return found


def _engine(bundle: Bundle, execution: Execution, gpu: Gpu | None) -> Candidate:
    """Return the engine of a variant that fits this machine, or else the first one, with the reason."""
    variant, library = bundle.variant(execution), execution.backend
    version, title = installed_version(library), LIBRARY_NAMES[library]
    engines = judged_engines(bundle, library, version, variant.precision, gpu)
    chosen, sentences = min(engines, key=lambda each: len(each[1]))
    obstacle = " ".join(sentences) if gpu else "no NVIDIA GPU is here."
    built = f"built for {', '.join(chosen.targets)} by {title} {chosen.version}"
    judged = execution.verification.get("by", "another back-end")
    plan = bundle.folder / FOLDER / chosen.plan
    return Candidate(
        name=f"{library} {variant.precision}",
        role="variant",
        backend=library,
        path=bundle.folder,
        graph=bundle.folder / variant.graph,
        precision=variant.precision,
        compute=execution.compute,
        flavour=variant.flavour,
        files=(plan,),
        executed=not obstacle,
        statement=f"{built}, not executed: {obstacle} Its graph's masks were judged with {judged}, a simulation"
        if obstacle
        else f"{built}, run here",
        allowed=_allowed(execution),
    )


def _graph_on_gpu(bundle: Bundle, execution: Execution, gpu: Gpu | None) -> Candidate:
    variant, package = bundle.variant(execution), BACKENDS[execution.backend].package
    runs, graph = gpu is not None, bundle.folder / variant.graph
    return Candidate(
        name=f"{execution.backend} {variant.precision}",
        role="variant",
        backend=execution.backend,
        path=graph,
        graph=graph,
        precision=variant.precision,
        compute=execution.compute,
        flavour=variant.flavour,
        files=(graph, bundle.folder / variant.weights),
        executed=runs,
        statement=f"run here by {package}" if runs else "not executed: no NVIDIA GPU is here",
        allowed=_allowed(execution),
    )


def _allowed(execution: Execution) -> float:
    """Return the share of pixels that may have another label than the reference's where numbers are rounded."""
    return EXACT_DISAGREEMENT + ROUNDED_FACTOR * (1 - execution.verification["agreement"])


def _candidate(bundle: Bundle, execution: Execution, role: Literal["reference", "variant"]) -> Candidate:
    variant = bundle.variant(execution)
    is_here = is_installed(execution.backend)
    label = precision_label(variant.precision, execution.compute)
    floats = "" if label == execution.compute or execution.compute == EXACT else f", {execution.compute} floats"
    exact = variant.precision == execution.compute == EXACT
    return Candidate(
        name=f"{execution.backend} {label}{floats}",
        role=role,
        backend=execution.backend,
        path=bundle.folder / variant.graph,
        graph=bundle.folder / variant.graph,
        precision=variant.precision,
        compute=execution.compute,
        flavour=variant.flavour,
        files=(bundle.folder / variant.graph, bundle.folder / variant.weights),
        executed=is_here,
        statement=_statement(execution, is_here),
        allowed=EXACT_DISAGREEMENT if exact else _allowed(execution),
    )


def _statement(execution: Execution, is_here: bool) -> str:
    package = BACKENDS[execution.backend].package
    if is_here:
        return f"run here by {package}"
    judged = execution.verification.get("by", "another back-end")
    if execution.executed:
        return f"not executed: {package} is not installed here; at the build, elsewhere, it ran"
    return (
        f"built, never executed: {package} was not installed at the build and is not here; "
        f"its masks were judged with {judged}, a simulation"
    )
