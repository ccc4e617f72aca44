"""Choose what a measurement compares: the reference, and executions of a bundle, each with the way to run it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from medseg_trt.bundle import Bundle, Execution
from medseg_trt.errors import MissingExtraError, UsageError
from medseg_trt.session import BACKENDS, is_installed

EXACT = "fp32"
EXACT_DISAGREEMENT = 0.001  # share of pixels that may have another label where nothing was rounded
ROUNDED_FACTOR = 3  # by which a rounded network may disagree more often here than on the images of its build


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A network, and how it is run."""

    name: str  # its own in the report, and the same in the next one
    role: Literal["reference", "variant"]
    backend: str
    path: Path  # of the graph, or of the checkpoint
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
        name="pytorch fp32", role="reference", backend="pytorch", path=checkpoint, precision=EXACT, compute=EXACT,
        flavour="eager", files=(checkpoint, *([block] if block else [])), executed=True,
        statement="the checkpoint itself, run here by PyTorch in float32", allowed=EXACT_DISAGREEMENT,
    )  # fmt: skip


def bundle_candidates(bundle: Bundle, backends: Sequence[str], with_reference: bool) -> list[Candidate]:
    """Return the best execution of every precision, or with ``backends`` of every precision on each of them.

    Args:
        bundle: what was built.
        backends: keys of ``session.BACKENDS``; none: whatever is fastest here, as ``infer`` would take it.
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
    if not with_reference:
        return [_candidate(bundle, execution, "variant") for execution in chosen]
    reference = _reference(bundle, chosen)
    rest = [_candidate(bundle, execution, "variant") for execution in chosen if execution is not reference]
    return [_candidate(bundle, reference, "reference"), *rest]


def _reference(bundle: Bundle, chosen: Sequence[Execution]) -> Execution:
    exact = [
        each for each in (*chosen, *bundle.content.executions)
        if precision_label(bundle.variant(each).precision, each.compute) == EXACT
    ]  # fmt: skip
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
    if name not in held:
        raise UsageError(f"{bundle.folder} holds nothing for {name}; it holds {', '.join(held)}")
    if not is_installed(name):
        raise _not_installed(name)


def _not_installed(backend: str) -> MissingExtraError:
    return MissingExtraError(
        f"{BACKENDS[backend].package} is not installed. Install it: pip install 'medseg-trt[{BACKENDS[backend].extra}]'"
    )


def _candidate(bundle: Bundle, execution: Execution, role: Literal["reference", "variant"]) -> Candidate:
    variant = bundle.variant(execution)
    here = is_installed(execution.backend)
    label = precision_label(variant.precision, execution.compute)
    floats = "" if label == execution.compute or execution.compute == EXACT else f", {execution.compute} floats"
    exact = variant.precision == execution.compute == EXACT
    rounded = EXACT_DISAGREEMENT + ROUNDED_FACTOR * (1 - execution.verification["agreement"])
    return Candidate(
        name=f"{execution.backend} {label}{floats}", role=role, backend=execution.backend,
        path=bundle.folder / variant.graph, precision=variant.precision, compute=execution.compute,
        flavour=variant.flavour, files=(bundle.folder / variant.graph, bundle.folder / variant.weights),
        executed=here, statement=_statement(execution, here), allowed=EXACT_DISAGREEMENT if exact else rounded,
    )  # fmt: skip


def _statement(execution: Execution, here: bool) -> str:
    package = BACKENDS[execution.backend].package
    if here:
        return f"run here by {package}"
    judged = execution.verification.get("by", "another back-end")
    if execution.executed:
        return f"not executed: {package} is not installed here; at the build, elsewhere, it ran"
    return (
        f"built, never executed: {package} was not installed at the build and is not here; "
        f"its masks were judged with {judged}, a simulation"
    )
