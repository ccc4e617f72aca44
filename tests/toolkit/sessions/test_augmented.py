"""Test-time augmentation is the mean over the copies, and each copy is turned back."""

import time

import numpy as np
import pytest

from medseg_trt.errors import UsageError
from medseg_trt.sessions.augmented import TTA, TimedRun, averaged

BATCH = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)


def pointwise(batch: np.ndarray) -> np.ndarray:
    return np.stack([batch[:, 0] * batch[:, 1], batch[:, 2]], axis=1)


def shifting(batch: np.ndarray) -> np.ndarray:
    """Look at the pixel to the left, so that direction matters."""
    return np.roll(pointwise(batch), 1, axis=3)


@pytest.mark.parametrize("name", TTA)
def test_a_network_without_direction_gives_the_same_logits(name):
    np.testing.assert_allclose(averaged(pointwise, name, (8, 8))(BATCH), pointwise(BATCH), atol=1e-6)


def test_tta_inverts_flips_and_rotations_before_averaging():
    flat = pointwise(BATCH)
    left, right = np.roll(flat, 1, axis=3), np.roll(flat, -1, axis=3)
    np.testing.assert_allclose(averaged(shifting, "flips", (8, 8))(BATCH), (left + right) / 2, atol=1e-6)
    up, down = np.roll(flat, 1, axis=2), np.roll(flat, -1, axis=2)
    np.testing.assert_allclose(averaged(shifting, "rot90", (8, 8))(BATCH), (left + right + up + down) / 4, atol=1e-6)


def test_networks_that_are_not_square_are_flipped_and_not_turned():
    batch = BATCH[:, :, :6]
    np.testing.assert_allclose(averaged(pointwise, "flips", (6, 8))(batch), pointwise(batch), atol=1e-6)
    with pytest.raises(UsageError, match="6 x 8 pixels, which cannot be turned; choose --tta flips"):
        averaged(pointwise, "rot90", (6, 8))
    with pytest.raises(UsageError, match="choose one of: flips, rot90"):
        averaged(pointwise, "shear", (8, 8))


def test_the_time_of_a_slice_is_counted_from_the_last_call():
    run = TimedRun(run=pointwise)
    assert run.take_ms() == 0
    run(BATCH)
    assert run.slices == 2
    assert run.take_ms() > 0
    assert run.take_ms() == 0


def test_the_first_run_of_a_shape_is_not_timed():
    """A back-end allocates and compiles in it: 30 ms here, and 1 ms in every other run."""
    shapes: list[tuple[int, ...]] = []

    def slow_at_first(batch):
        time.sleep(0.001 if batch.shape in shapes else 0.03)
        shapes.append(batch.shape)
        return batch

    run = TimedRun(run=slow_at_first)
    for batch in (BATCH, BATCH, BATCH[:1]):
        assert run(batch) is batch
    assert shapes == [BATCH.shape] * 3 + [BATCH[:1].shape] * 2
    assert run.slices == 5
    assert run.take_ms() < 30 / 5  # one uncounted run that was counted would add as much
