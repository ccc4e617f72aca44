"""Test-time augmentation: the mean of a network's logits over flipped or turned copies of each slice, turned back.

Source: Simonyan & Zisserman 2015, "Very Deep Convolutional Networks", §3.2, for flips; nnU-Net mirrors likewise.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from jaxtyping import Float32
from numpy import ndarray

from medseg_trt.errors import UsageError
from medseg_trt.imaging.preprocess import Size
from medseg_trt.imaging.segment import Run
from medseg_trt.sessions.base import Session

Turn = Callable[[ndarray], ndarray]


def _flip(axes: tuple[int, ...], batch: ndarray) -> ndarray:
    return np.flip(batch, axes)


def _turn(quarters: int, batch: ndarray) -> ndarray:
    return np.rot90(batch, quarters, (2, 3))


TTA: Mapping[str, tuple[tuple[Turn, Turn], ...]] = {  # name -> copies: how each is made, and how it is turned back
    "flips": tuple((partial(_flip, axes), partial(_flip, axes)) for axes in ((), (2,), (3,), (2, 3))),
    "rot90": tuple((partial(_turn, quarters), partial(_turn, -quarters)) for quarters in range(4)),
}


def averaged(run: Run, name: str, image_size: Size) -> Run:
    """Return a function from images to the mean of the logits of all copies, added up in order.

    Args:
        run: the network.
        name: a key of ``TTA``.
        image_size: of the network's input.

    Raises:
        UsageError: there is no such augmentation, or the network's input is not square and is to be turned.
    """
    check_tta(name, image_size)

    def mean(batch: ndarray) -> ndarray:
        total: ndarray | None = None
        for turn, back in TTA[name]:
            logits = back(run(np.ascontiguousarray(turn(batch))))
            total = logits.astype(np.float32) if total is None else total + logits
        assert total is not None
        return np.ascontiguousarray(total / np.float32(len(TTA[name])))

    return mean


def check_tta(name: str, image_size: Size) -> None:
    """Refuse an augmentation that a network cannot have.

    Raises:
        UsageError: there is no such augmentation, or the network's input is not square and is to be turned.
    """
    if name not in TTA:
        raise UsageError(f"no test-time augmentation is called {name!r}; choose one of: {', '.join(TTA)}")
    if name == "rot90" and image_size[0] != image_size[1]:
        raise UsageError(
            f"the network takes {image_size[0]} x {image_size[1]} pixels, which cannot be turned; choose --tta flips"
        )


class AugmentedSession(Session):
    """A network whose logits are averaged over copies of each slice; masks are made of the mean."""

    def __init__(self, session: Session, name: str, image_size: Size) -> None:
        """Wrap an open session, which this one closes; see ``averaged`` for the errors."""
        self._session = session
        self._mean = averaged(session.run, name, image_size)
        self.backend, self.device = session.backend, session.device
        self.description = f"{session.description}, tta {name}"

    def run(self, batch: Float32[ndarray, "batch 3 height width"]) -> Float32[ndarray, "batch classes height width"]:
        """Return the mean of the logits of all copies."""
        return self._mean(batch)

    def close(self) -> None:
        """Free the network."""
        self._session.close()


@dataclass(kw_only=True, slots=True)
class TimedRun:
    """A network that adds up the time of its runs; an uncounted run comes before the first of every size of batch."""

    run: Run
    seconds: float = 0.0
    slices: int = 0
    warm: set[tuple[int, ...]] = field(default_factory=set[tuple[int, ...]])  # shapes of the batches that were run

    def __call__(self, batch: ndarray) -> ndarray:
        """Run the network on a batch of prepared images."""
        if batch.shape not in self.warm:
            self.run(batch)  # allocates, and compiles where the back-end compiles for a shape
            self.warm.add(batch.shape)
        began = time.perf_counter()
        logits = self.run(batch)
        self.seconds += time.perf_counter() - began
        self.slices += len(batch)
        return logits

    def take_ms(self) -> float:
        """Return the milliseconds of a slice since the last call; 0 where there was none."""
        ms = 1000 * self.seconds / max(self.slices, 1)
        self.seconds, self.slices = 0.0, 0
        return ms
