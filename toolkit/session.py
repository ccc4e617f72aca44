"""A session runs a network: one small interface, a table of back-ends, and one way to open one.

Nothing falls back in silence: ``auto`` says what it chose and why, and a back-end that was named and cannot run is an
error.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float32, UInt8
from numpy import ndarray

from medseg_trt.bundle import Bundle, Execution
from medseg_trt.errors import ArtefactError, MissingExtraError, UsageError
from medseg_trt.preprocess import Size
from medseg_trt.progress import LOG

if TYPE_CHECKING:
    from medseg_trt.train.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True, slots=True)
class Backend:
    """What can run a graph."""

    module: str  # of ours; it has ``open_graph``
    package: str  # that it imports
    extra: str  # of medseg-trt, which installs the package
    flavours: tuple[str, ...]  # of the graphs it is given
    computes: tuple[str, ...]  # what it can compute float parts in


BACKENDS: Mapping[str, Backend] = {
    "onnxruntime": Backend(
        module="medseg_trt.sessions.onnxruntime",
        package="onnxruntime",
        extra="cpu",
        flavours=("canonical", "uint8"),
        computes=("fp32",),
    ),
    "openvino": Backend(
        module="medseg_trt.sessions.openvino",
        package="openvino",
        extra="openvino",
        flavours=("plain",),
        computes=("fp32", "bf16"),
    ),
}


class Session(ABC):
    """A network that is ready to run; a context manager that frees it at the end."""

    backend: str  # a key of BACKENDS, or "pytorch"
    device: str
    description: str  # back-end, version, precision and threads, for a table
    gives_masks = False  # whether ``masks`` may be called: the graph was built with ``--outputs mask``

    @abstractmethod
    def run(self, batch: Float32[ndarray, "batch 3 height width"]) -> Float32[ndarray, "batch classes height width"]:
        """Return the logits of a batch of prepared images."""

    def masks(
        self, batch: Float32[ndarray, "batch 3 _ _"], size: Size, resampled: Size
    ) -> UInt8[ndarray, "batch height width"]:
        """Return the labels of a batch of prepared images at the size of their sources.

        Args:
            batch: images of one size and spacing.
            size: height and width of the sources in pixels.
            resampled: what ``preprocess.resampled_size`` says of them.

        Raises:
            UsageError: the graph gives logits alone.
        """
        raise UsageError(f"{self.description} gives logits alone; build with --outputs mask")

    @abstractmethod
    def close(self) -> None:
        """Free the network."""

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_session(
    bundle: Bundle, backend: str = "auto", threads: int | None = None, precision: str | None = None
) -> Session:
    """Open one of the bundle's executions, and see that it answers the golden input as it did at the build.

    Args:
        bundle: what ``load_bundle`` returned.
        backend: a key of ``BACKENDS``, or ``auto``: the fastest one of the build that is installed here.
        threads: CPU threads; None leaves it to the back-end, which takes one per physical core.
        precision: one of the bundle's; None takes the best.

    Raises:
        UsageError: there is no such back-end, or the bundle has nothing for it.
        MissingExtraError: its package is not installed.
        ArtefactError: it refuses the graph, or the network answers otherwise than when it was built.
    """
    execution = choose(bundle, backend, precision)
    variant = bundle.variant(execution)
    session: Session = import_module(BACKENDS[execution.backend].module).open_graph(
        bundle.folder / variant.graph, variant.precision, threads, execution.compute
    )
    try:
        _check_golden(session, bundle, execution)
    except BaseException:
        session.close()
        raise
    LOG.info(
        "run %s with %s on %s%s", bundle.folder, session.description, session.device,
        f" ({_reason(bundle, execution)})" if backend == "auto" else "",
    )  # fmt: skip
    return session


def choose(bundle: Bundle, backend: str = "auto", precision: str | None = None) -> Execution:
    """Return the best execution of the bundle for a back-end and a precision.

    Raises:
        UsageError: there is no such back-end, or the bundle has no such execution.
        MissingExtraError: none of the back-ends that could be taken is installed.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise UsageError(f"no back-end is called {backend!r}; choose one of: auto, {', '.join(BACKENDS)}")
    found = [
        execution
        for execution in bundle.content.executions
        if backend in ("auto", execution.backend) and precision in (None, bundle.variant(execution).precision)
    ]
    if not found:
        wanted = " ".join(part for part in (backend if backend != "auto" else "", precision or "") if part)
        known = dict.fromkeys(f"{each.backend} {bundle.variant(each).precision}" for each in bundle.content.executions)
        raise UsageError(f"{bundle.folder} holds nothing for {wanted}; it holds {', '.join(known)}")
    for execution in found:
        if is_installed(execution.backend):
            return execution
    first = BACKENDS[found[0].backend]
    raise MissingExtraError(f"{first.package} is not installed. Install it: pip install 'medseg-trt[{first.extra}]'")


def is_installed(backend: str) -> bool:
    """Say whether a back-end's package is here, without importing it."""
    try:
        return find_spec(BACKENDS[backend].package) is not None
    except ValueError:  # somebody has put None in its place
        return False


def open_reference(checkpoint: "Checkpoint") -> Session:
    """Open the checkpoint's own PyTorch network, in float32 on the CPU: what everything else is compared with."""
    from medseg_trt.sessions.pytorch import PyTorchSession

    # A type checker reaches this class through .typing, where Session is another one to it.
    return PyTorchSession(checkpoint.model())  # pyright: ignore[reportReturnType]


def _reason(bundle: Bundle, chosen: Execution) -> str:
    """Say why ``auto`` took this one."""
    best = bundle.default
    if chosen is not best:
        return f"auto: {BACKENDS[best.backend].package}, the fastest at the build, is not installed here"
    if chosen.median_ms is None:
        return "auto: the only one that the bundle holds"
    return f"auto: the fastest of {len(bundle.content.executions)} at the build, {chosen.median_ms:.1f} ms an image"


def _check_golden(session: Session, bundle: Bundle, execution: Execution) -> None:
    inputs, expected = bundle.golden()
    found = session.run(inputs)
    error = np.abs(found - expected).max() if found.shape == expected.shape else np.inf
    if not error <= execution.golden_error:
        raise ArtefactError(
            f"{session.description} on this machine answers the bundle's golden input with logits that are off by "
            f"{error:.3g}, more than {execution.golden_error:g}; do not use these masks. Rebuild here: "
            "medseg-trt build --ckpt model.pt"
        )
