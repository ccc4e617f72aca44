"""Compare two sessions of one network bit for bit: some back-ends add up in another order on fewer threads."""

import numpy as np

from medseg_trt.imaging.preprocess import Size
from medseg_trt.sessions.base import Session

PROBE_SIZE = (173, 219)  # of the masks that are compared


def have_equal_bits(first: Session, second: Session, size: Size, batch: int) -> bool:
    """Compare outputs of seeded noise in every batch; kernels are chosen by shape, not by value.

    Args:
        first: a session.
        second: another one of the same network.
        size: of the network's input.
        batch: the largest number of slices in a run.
    """
    noise = np.random.default_rng(0).standard_normal((batch, 3, *size)).astype(np.float32)
    sizes = range(1, batch + 1)
    if not all(np.array_equal(first.run(noise[:slices]), second.run(noise[:slices])) for slices in sizes):
        return False
    if not first.gives_masks:
        return True
    of_first, of_second = (session.masks(noise[:1], PROBE_SIZE, PROBE_SIZE) for session in (first, second))
    return np.array_equal(of_first, of_second)
