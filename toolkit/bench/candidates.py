"""Choose the networks of a measurement: the reference, and executions of a bundle."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from medseg_trt.bundles.bundle import Bundle
from medseg_trt.bundles.manifest import ENGINES_FOLDER, Execution
from medseg_trt.devices import CPU, ComputeDevice
from medseg_trt.engines.choice import engines_with_mismatches, installed_version
from medseg_trt.errors import MissingExtraError, UsageError
from medseg_trt.gpu import Gpu, listed_gpus
from medseg_trt.sessions.backends import BACKENDS, is_installed
from medseg_trt.sessions.open import gpu_executions
from medseg_trt.sessions.pytorch_forms import EAGER, FORMATS, FORMS, PEERS_ON_GPU
from medseg_trt.sessions.session_request import SessionRequest
from medseg_trt.spec import LIBRARY_NAMES

EXACT = "fp32"
EXACT_DISAGREEMENT = 0.001  # share of pixels that may have another label in fp32
ANY_DISAGREEMENT = 1.0  # no build has measured how often a peer disagrees: its Dice is judged alone
ROUNDED_FACTOR = 3  # how many times as often a network of reduced precision may disagree here as at its build


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A network, and how it is run."""

    name: str  # unique in a report, and the same in every report
    role: Literal["reference", "variant", "peer"]
    backend: str
    path: Path  # of the graph, of the checkpoint, or of the bundle for an engine
    graph: Path | None  # for counting multiply-accumulates and bytes
    precision: str  # of the stored weights
    compute: str  # what float parts are computed in
    variant: str  # the graph's dialect, or how PyTorch runs it: a key of ``pytorch_forms.FORMS``
    files: tuple[Path, ...]  # of the network, for its size on the disk
    executed: bool  # whether it can run here
    execution_note: str  # what ran here, and what was only built or simulated
    allowed: float  # share of pixels that may have another label than the reference's
    device: ComputeDevice = CPU  # of PyTorch, or which GPU a back-end of GPUs takes

    @property
    def form(self) -> str:
        """How PyTorch runs it, a key of ``pytorch_forms.FORMS``."""
        return self.variant if self.backend == "pytorch" else EAGER

    @property
    def request(self) -> SessionRequest:
        """How a process opens it."""
        return SessionRequest(
            backend=self.backend,
            path=self.path,
            precision=self.precision,
            compute_dtype=self.compute,
            device=self.device,
            form=self.form,
        )

    @property
    def label(self) -> str:
        """The precision as ``--precision`` has it: ``bf16`` is the fp32 graph computed in bfloat16."""
        return precision_label(self.precision, self.compute)

    @property
    def arithmetic(self) -> str:
        """The number format of most multiplications: fp32, bf16, int8 or, on a GPU, fp8 or fp16."""
        if "int8" in self.precision:
            return "int8"
        if self.backend in BACKENDS and BACKENDS[self.backend].gpu:  # a CPU computes graphs of fewer bits in float32
            formats = (("fp8", "fp8"), ("16", "fp16"))
            return next((name for part, name in formats if part in self.precision), self.compute)
        return self.compute

    @property
    def size_mb(self) -> float:
        """Size on the disk in 10^6 bytes."""
        return sum(file.stat().st_size for file in self.files) / 1e6


def precision_label(precision: str, compute: str) -> str:
    """Return the precision as ``--precision`` has it."""
    return compute if precision == EXACT else precision


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchDevice:
    """Where the networks of a measurement run."""

    asked: ComputeDevice
    gpu: Gpu | None  # that rows on a GPU take
    pytorch: ComputeDevice = CPU  # where the reference runs

    @property
    def obstacle(self) -> str:
        """Why no row runs on a GPU."""
        return listed_gpus().words if self.asked.gpu_allowed else "--device cpu"

    @property
    def on_gpu(self) -> ComputeDevice:
        """The GPU, as a back-end takes it."""
        return ComputeDevice("cuda", self.asked.number)


def checkpoint_candidates(checkpoint: Path, block: Path | None, device: BenchDevice) -> list[Candidate]:
    """Return the PyTorch network of a checkpoint as the reference and, on a GPU, other ways to run it as peers."""
    reference = Candidate(
        name="pytorch fp32",
        role="reference",
        backend="pytorch",
        path=checkpoint,
        graph=None,
        precision=EXACT,
        compute=EXACT,
        variant=EAGER,
        files=(checkpoint, *([block] if block else [])),
        executed=True,
        execution_note=f"the checkpoint, run here by PyTorch in float32 on {device.pytorch}",
        allowed=EXACT_DISAGREEMENT,
        device=device.pytorch,
    )
    if device.pytorch == CPU:
        return [reference]
    peers = [
        replace(
            reference,
            name=f"pytorch {arithmetic}" + ("" if form == EAGER else f", {form}"),
            role="peer",
            compute=arithmetic,
            variant=form,
            execution_note=f"the checkpoint, run here by PyTorch: {FORMATS[arithmetic]}, {FORMS[form].words}",
            allowed=ANY_DISAGREEMENT,
        )
        for arithmetic, form in PEERS_ON_GPU
    ]
    on_cpu = replace(
        reference,
        name="pytorch fp32 on the CPU",
        role="peer",
        execution_note="the checkpoint, run here by PyTorch in float32 on the CPU; no ratio is formed with it",
        device=CPU,
    )
    return [reference, *peers, on_cpu]


def bundle_candidates(
    bundle: Bundle, backends: Sequence[str], with_reference: bool, device: BenchDevice
) -> list[Candidate]:
    """Return the fastest execution of every precision, or with ``backends`` every precision on each of them.

    Engines of the bundle are included, also those that cannot run on this machine.

    Args:
        bundle: the bundle to measure.
        backends: keys of ``sessions.backends.BACKENDS``; none: the fastest installed one, as in ``infer``.
        with_reference: put the bundle's fp32 network first, as the reference.
        device: rows of the other kind of device are left out where one was asked for.

    Raises:
        UsageError: an unknown back-end, one that the bundle has nothing for, or no fp32 network as a reference.
        MissingExtraError: a requested back-end, or every back-end of the reference, is not installed.
    """
    for name in backends:
        _require_usable(bundle, name)
    executions = bundle.content.executions
    groups: dict[tuple[str, str], list[Execution]] = {}
    for execution in executions:
        if not BACKENDS[execution.backend].gpu and (not backends or execution.backend in backends):
            label = precision_label(bundle.variant(execution).precision, execution.compute_dtype)
            groups.setdefault((label, execution.backend if backends else ""), []).append(execution)
    chosen = [
        next((execution for execution in group if is_installed(execution.backend)), group[0])
        for group in groups.values()
    ]
    on_gpus = _on_gpus(bundle, backends, device)
    if not with_reference and device.asked.kind == "cuda":
        return on_gpus
    if not with_reference:
        return [*(_candidate(bundle, execution, "variant") for execution in chosen), *on_gpus]
    reference = _reference(bundle, chosen)
    rest = [_candidate(bundle, execution, "variant") for execution in chosen if execution is not reference]
    return [_candidate(bundle, reference, "reference"), *rest, *on_gpus]


def _reference(bundle: Bundle, chosen: Sequence[Execution]) -> Execution:
    exact = [
        execution
        for execution in (*chosen, *bundle.content.executions)
        if not BACKENDS[execution.backend].gpu
        and precision_label(bundle.variant(execution).precision, execution.compute_dtype) == EXACT
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


def _on_gpus(bundle: Bundle, backends: Sequence[str], device: BenchDevice) -> list[Candidate]:
    """Return the engines of a bundle, and its graphs on the requested GPU back-ends."""
    candidates: list[Candidate] = []
    for name, kind in BACKENDS.items():
        if not kind.gpu or name not in (backends or LIBRARY_NAMES):
            continue
        for execution in gpu_executions(bundle, name):
            candidates.append((_engine if kind.engines else _graph_on_gpu)(bundle, execution, device))
    return candidates


def _engine(bundle: Bundle, execution: Execution, device: BenchDevice) -> Candidate:
    """Return the engine of a variant that fits this machine, or else the closest one, with the reason."""
    variant, library = bundle.variant(execution), execution.backend
    version, title = installed_version(library), LIBRARY_NAMES[library]
    engines = engines_with_mismatches(bundle, library, version, variant.precision, device.gpu)
    chosen, reasons = min(engines, key=lambda judgement: len(judgement[1]))
    obstacle = " ".join(reasons) if device.gpu else f"{device.obstacle}."
    built = f"built for {', '.join(chosen.targets)} by {title} {chosen.version}"
    judged = execution.verification.by
    plan = bundle.folder / ENGINES_FOLDER / chosen.plan
    return Candidate(
        name=f"{library} {variant.precision}{_block_suffix(bundle)}",
        role="variant",
        backend=library,
        path=bundle.folder,
        graph=bundle.folder / variant.graph,
        precision=variant.precision,
        compute=execution.compute_dtype,
        variant=variant.dialect,
        files=(plan,),
        executed=not obstacle,
        execution_note=f"{built}, not executed: {obstacle} Its graph's masks were judged with {judged}, a simulation"
        if obstacle
        else f"{built}, run here",
        allowed=_allowed(execution),
        device=device.on_gpu,
    )


def _graph_on_gpu(bundle: Bundle, execution: Execution, device: BenchDevice) -> Candidate:
    variant, package = bundle.variant(execution), BACKENDS[execution.backend].package
    runs, graph = device.gpu is not None, bundle.folder / variant.graph
    return Candidate(
        name=f"{execution.backend} {variant.precision}{_block_suffix(bundle)}",
        role="variant",
        backend=execution.backend,
        path=graph,
        graph=graph,
        precision=variant.precision,
        compute=execution.compute_dtype,
        variant=variant.dialect,
        files=(graph, bundle.folder / variant.weights),
        executed=runs,
        execution_note=f"run here by {package}" if runs else f"not executed: {device.obstacle}",
        allowed=_allowed(execution),
        device=device.on_gpu,
    )


def _allowed(execution: Execution) -> float:
    """Return the share of pixels that may have another label than the reference's, in reduced precision."""
    return EXACT_DISAGREEMENT + ROUNDED_FACTOR * (1 - execution.verification.agreement)


def _candidate(bundle: Bundle, execution: Execution, role: Literal["reference", "variant"]) -> Candidate:
    variant = bundle.variant(execution)
    is_here = is_installed(execution.backend)
    label = precision_label(variant.precision, execution.compute_dtype)
    floats = (
        ""
        if label == execution.compute_dtype or execution.compute_dtype == EXACT
        else f", {execution.compute_dtype} floats"
    )
    exact = variant.precision == execution.compute_dtype == EXACT and not bundle.is_block_replaced
    return Candidate(
        name=f"{execution.backend} {label}{floats}{_block_suffix(bundle)}",
        role=role,
        backend=execution.backend,
        path=bundle.folder / variant.graph,
        graph=bundle.folder / variant.graph,
        precision=variant.precision,
        compute=execution.compute_dtype,
        variant=variant.dialect,
        files=(bundle.folder / variant.graph, bundle.folder / variant.weights),
        executed=is_here,
        execution_note=_execution_note(execution, is_here),
        allowed=EXACT_DISAGREEMENT if exact else _allowed(execution),
    )


def _block_suffix(bundle: Bundle) -> str:
    """Return the rung of a replaced language block, which every row of it names."""
    return f", block {bundle.block}" if bundle.is_block_replaced else ""


def _execution_note(execution: Execution, is_here: bool) -> str:
    package = BACKENDS[execution.backend].package
    if is_here:
        return f"run here by {package}"
    judged = execution.verification.by
    if execution.executed:
        return f"not executed: {package} is not installed here; it ran at the build, on another machine"
    return (
        f"built, never executed: {package} was not installed at the build and is not installed here; "
        f"its masks were judged with {judged}, a simulation"
    )
