"""Several networks as one: the mean of their logits, as nnU-Net averages the networks of its folds.

Source: Isensee et al. 2021, "nnU-Net".
"""

from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np
from jaxtyping import Float32
from numpy import ndarray

from medseg_trt.bundles.bundle import MANIFEST, Bundle
from medseg_trt.devices import AUTO, ComputeDevice
from medseg_trt.errors import UsageError
from medseg_trt.files import sha256
from medseg_trt.imaging.segment import Run
from medseg_trt.sessions.base import Session
from medseg_trt.sessions.open import open_session
from medseg_trt.spec import Classes, Preprocessing


class EnsembleSession(Session):
    """Networks that run one after the other on the same images; masks are made of the mean of their logits."""

    def __init__(self, sessions: Sequence[Session], description: str) -> None:
        self._sessions = tuple(sessions)
        self._mean = mean_logits([session.run for session in sessions])
        self.backend = sessions[0].backend
        self.device = sessions[0].device
        self.description = description

    def run(self, batch: Float32[ndarray, "batch 3 height width"]) -> Float32[ndarray, "batch classes height width"]:
        """Return the mean of the networks' logits."""
        return self._mean(batch)

    def close(self) -> None:
        """Free all networks."""
        with ExitStack() as stack:
            for session in self._sessions:
                stack.callback(session.close)


def mean_logits(runs: Sequence[Run]) -> Run:
    """Return a function from images to the mean of the logits of several networks, added up in order."""

    def run(batch: np.ndarray) -> np.ndarray:
        total = runs[0](batch).astype(np.float32)
        for other in runs[1:]:
            total = total + other(batch)
        return total / np.float32(len(runs))

    return run


def open_ensemble(
    bundles: Sequence[Bundle],
    backend: str = "auto",
    threads: int | None = None,
    precision: str | None = None,
    device: ComputeDevice = AUTO,
) -> Session:
    """Open every bundle, each checked as if it were alone; see ``open_session`` for the arguments and further errors.

    Raises:
        UsageError: the bundles prepare images in different ways or know different classes.
    """
    first = bundles[0]
    for bundle in bundles[1:]:
        require_alike(
            (str(first.folder), first.preprocessing, first.classes),
            (str(bundle.folder), bundle.preprocessing, bundle.classes),
        )
    with ExitStack() as stack:
        sessions = [
            stack.enter_context(open_session(bundle, backend, threads, precision, device)) for bundle in bundles
        ]
        stack.pop_all()  # from here on the ensemble closes them
    names = ", ".join(
        f"{session.description} (bundle {sha256(bundle.folder / MANIFEST)})"
        for session, bundle in zip(sessions, bundles, strict=True)
    )
    return EnsembleSession(sessions, f"the mean of {len(sessions)} networks: {names}")


def require_alike(first: tuple[str, Preprocessing, Classes], other: tuple[str, Preprocessing, Classes]) -> None:
    """Refuse to average networks whose images or classes differ.

    Args:
        first: name, preprocessing and classes of a network.
        other: the same of another one.

    Raises:
        UsageError: they differ.
    """
    for number, difference in ((1, "prepare images in different ways"), (2, "know different classes")):
        if first[number] != other[number]:
            raise UsageError(f"{first[0]} and {other[0]} {difference}; their logits have no mean")
