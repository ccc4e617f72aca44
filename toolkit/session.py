"""A session runs a network: one small interface, a table of back-ends, and one way to open one.

Nothing falls back in silence: ``auto`` says what it chose, and a back-end that was named and cannot run is an error.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib import import_module
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float32
from numpy import ndarray

from medseg_trt.bundle import Bundle
from medseg_trt.errors import ArtefactError, UsageError
from medseg_trt.progress import LOG

if TYPE_CHECKING:
    from medseg_trt.train.checkpoint import Checkpoint

BACKENDS: Mapping[str, str] = {"onnxruntime": "medseg_trt.sessions.onnxruntime"}  # the first is what "auto" takes


class Session(ABC):
    """A network that is ready to run; a context manager that frees it at the end."""

    backend: str  # a key of BACKENDS, or "pytorch"
    device: str
    description: str  # back-end, version, precision and threads, for a table

    @abstractmethod
    def run(self, batch: Float32[ndarray, "batch 3 height width"]) -> Float32[ndarray, "batch classes height width"]:
        """Return the logits of a batch of prepared images."""

    @abstractmethod
    def close(self) -> None:
        """Free the network."""

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_session(bundle: Bundle, backend: str = "auto", threads: int | None = None) -> Session:
    """Open the bundle's default variant, and see that it answers the golden input as PyTorch did at the build.

    Args:
        bundle: what ``load_bundle`` returned.
        backend: a key of ``BACKENDS``, or ``auto``.
        threads: CPU threads; None leaves it to the back-end, which takes one per physical core.

    Raises:
        UsageError: there is no such back-end.
        MissingExtraError: its package is not installed.
        ArtefactError: it refuses the graph, or the network answers otherwise than when it was built.
    """
    chosen = next(iter(BACKENDS)) if backend == "auto" else backend
    if chosen not in BACKENDS:
        raise UsageError(f"no back-end is called {backend!r}; choose one of: auto, {', '.join(BACKENDS)}")
    variant = bundle.default
    session: Session = import_module(BACKENDS[chosen]).open_graph(
        bundle.folder / variant.graph, variant.precision, threads
    )
    try:
        _check_golden(session, bundle)
    except BaseException:
        session.close()
        raise
    LOG.info(
        "run %s with %s on %s%s", bundle.folder, session.description, session.device,
        " (auto: the only back-end so far)" if backend == "auto" else "",
    )  # fmt: skip
    return session


def open_reference(checkpoint: "Checkpoint") -> Session:
    """Open the checkpoint's own PyTorch network, in float32 on the CPU: what everything else is compared with."""
    from medseg_trt.sessions.pytorch import PyTorchSession

    # A type checker reaches this class through .typing, where Session is another one to it.
    return PyTorchSession(checkpoint.model())  # pyright: ignore[reportReturnType]


def _check_golden(session: Session, bundle: Bundle) -> None:
    inputs, expected = bundle.golden()
    found = session.run(inputs)
    error = np.abs(found - expected).max() if found.shape == expected.shape else np.inf
    if not error <= bundle.default.golden_error:
        raise ArtefactError(
            f"{session.description} on this machine answers the bundle's golden input with logits that are off by "
            f"{error:.3g}, more than {bundle.default.golden_error:g}; do not use these masks. Rebuild here: "
            "medseg-trt build --ckpt model.pt"
        )
