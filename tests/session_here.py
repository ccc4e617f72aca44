"""A stand-in for the child processes of a build: a build opens dozens, and each takes a second to start."""

from dataclasses import replace

import numpy as np

from medseg_trt.imaging.preprocess import Size
from medseg_trt.sessions.base import Session
from medseg_trt.sessions.session_request import SessionRequest
from medseg_trt.sessions.subprocess_session import ChildSession, open_network


class SessionHere(ChildSession):
    """A session of this process behind the interface of a child: a build opens dozens."""

    def __init__(self, request: SessionRequest) -> None:
        self._session: Session = open_network(replace(request, threads=1))
        self.backend, self.device = request.backend, self._session.device
        self.description, self.gives_masks = self._session.description, self._session.gives_masks

    def masks(self, batch: np.ndarray, size: Size, resampled: Size) -> np.ndarray:
        return self._session.masks(batch, size, resampled)

    def run(self, batch: np.ndarray) -> np.ndarray:
        return self._session.run(batch)

    def time(self, batch: np.ndarray, duration_s: float, min_runs: int) -> list[float]:
        return [float(len(self.description))]  # no unit test is decided by how busy the machine is

    def close(self) -> None:
        self._session.close()
