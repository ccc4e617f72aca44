import itertools

import numpy as np
import pytest

from medseg_trt.errors import AccuracyGateError
from medseg_trt.export.verify import BATCH_SIZES, labels_of, noise, verify_logits

LIMITS = {"max_abs_error": 1e-4, "min_agreement": 0.9999}
IMAGES = np.random.default_rng(0).random((6, 3, 16, 16), dtype=np.float32)


def network(batch: np.ndarray) -> np.ndarray:
    """Two logits a pixel, each from its own row of the batch alone."""
    return np.stack([batch.sum(1) - 1.5, batch[:, 0] * 2 - batch[:, 2]], axis=1)


def shifted(batch):
    return network(batch) + np.float32(2e-4)


def one_label_in_a_hundred(batch):
    logits = network(batch).copy()
    logits[:, :, 0, :3] = logits[:, ::-1, 0, :3]
    return logits


def wrong_in_batches_only(batch):
    return network(batch) + np.float32(1e-2 * (len(batch) > 1))


def normalised_over_the_batch(batch):
    return network(batch) + np.float32(1e-2) * (batch.mean() - IMAGES.mean())


def rows_depend_on_their_index(batch):
    return network(batch) + np.float32(1e-2) * np.arange(len(batch), dtype=np.float32)[:, None, None, None] * 0.1


def rows_are_mixed(batch):
    return network(batch) + np.float32(1e-3) * network(batch)[::-1]


def nan_in_one_pixel(batch):
    logits = network(batch).copy()
    logits[-1, 0, 3, 3] = np.nan
    return logits


def one_class_too_few(batch):
    return network(batch)[:, :1]


def forgets_itself():
    """Return a network that answers a little otherwise every second time."""
    calls = itertools.count()
    return lambda batch: network(batch) + np.float32(1e-3 * (next(calls) % 2))


def wrong_in_batches_of_three(batch: np.ndarray) -> np.ndarray:
    return network(batch) + np.float32(1e-3 * (len(batch) == 3))


def test_the_same_network_has_no_differences():
    verification = verify_logits(network, network, IMAGES, "generated", **LIMITS)
    assert (verification.max_abs_error, verification.agreement, verification.max_row_error) == (0, 1, 0)
    assert (verification.num_images, verification.batch_sizes) == (len(IMAGES), BATCH_SIZES)


def test_an_error_below_the_limit_passes_and_is_measured():
    verification = verify_logits(
        lambda batch: network(batch) + np.float32(3e-5), network, IMAGES, "generated", **LIMITS
    )
    assert verification.max_abs_error == pytest.approx(3e-5, rel=0.02)  # float32 of order 1 resolves 1e-7


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (shifted, "logits differ"),
        (one_label_in_a_hundred, "logits differ"),
        (wrong_in_batches_only, "logits differ"),
        (wrong_in_batches_of_three, "logits differ"),
        (normalised_over_the_batch, "logits differ"),
        (rows_depend_on_their_index, "logits differ"),
        (rows_are_mixed, "logits differ"),
        (nan_in_one_pixel, "nan"),
        (one_class_too_few, "those of the reference"),
    ],
)
def test_verify_logits_rejects_faulty_networks(fault, message):
    with pytest.raises(AccuracyGateError, match=message):
        verify_logits(fault, network, IMAGES, "generated", **LIMITS)


@pytest.mark.parametrize(
    "fault", [normalised_over_the_batch, rows_depend_on_their_index, rows_are_mixed, forgets_itself()]
)
def test_dependence_between_rows_is_detected_within_the_other_limits(fault):
    """Each is within a limit of 0.1 for the logits, where only the rows among themselves tell."""
    verification = verify_logits(fault, network, IMAGES, "generated", max_abs_error=10.0, min_agreement=0.0)
    assert verification.max_row_error > 5e-4
    assert (
        verify_logits(network, network, IMAGES, "generated", max_abs_error=10.0, min_agreement=0.0).max_row_error == 0
    )


def test_labels_are_compared_when_logits_are_within_the_limit():
    flat = lambda batch: np.zeros((len(batch), 2, 16, 16), np.float32)  # noqa: E731
    tilted = lambda batch: flat(batch) + np.array([0, 1e-5], np.float32)[None, :, None, None]  # noqa: E731
    with pytest.raises(AccuracyGateError, match="equal labels is 0,"):
        verify_logits(tilted, flat, IMAGES, "generated", **LIMITS)


def test_fewer_images_than_a_batch_are_repeated():
    seen = []

    def spy(batch):
        seen.append(len(batch))
        return network(batch)

    verification = verify_logits(spy, network, IMAGES[:1], "generated", **LIMITS)
    assert verification.num_images == 1
    assert set(seen) == set(BATCH_SIZES)


def test_one_logit_is_a_threshold_and_several_are_a_maximum():
    logits = np.array([[[[-1.0, 0.0, 1.0]]]], np.float32)
    assert labels_of(logits).tolist() == [[[False, False, True]]]
    assert labels_of(np.concatenate([logits, -logits], axis=1)).tolist() == [[[1, 0, 0]]]


def test_noise_is_the_same_every_time_and_has_contrast():
    images = noise((48, 64))
    np.testing.assert_array_equal(images, noise((48, 64)))
    assert images.shape == (4, 3, 48, 64)
    assert images.std() > 0.2
    assert not np.array_equal(images[0], images[1])
