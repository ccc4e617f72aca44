"""Every augmentation against closed forms of what it says, on pictures of odd, even and unequal sides.

The random numbers are chosen by the test: ``Chosen`` stands for a generator and says where in its range each draw lies.
"""

from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest
from scipy import ndimage

from medseg_trt.train.recipes.augment import (
    AUGMENTATIONS,
    Step,
    affine,
    augment,
    flip,
    intensity,
    noise,
    rotate,
    rotate90,
    turn_and_mirror,
)

SIZES = [(9, 9), (8, 8), (9, 14), (12, 7)]
ROUNDED = 2e-6  # float32 of numbers of order 1 to 4, a few roundings of 2**-24 each; the faults change 1e-2 and more


class Chosen(np.random.Generator):
    """A generator whose numbers lie where they are told to, 0 … 1 from the lower to the upper end of what is asked."""

    def __init__(self, shares: Sequence[float]) -> None:
        super().__init__(np.random.PCG64(0))
        self.shares = list(shares)

    def uniform(self, low=0.0, high=1.0, size=None):
        drawn = [low + (high - low) * self.shares.pop(0) for _ in range(size or 1)]
        return drawn[0] if size is None else np.array(drawn)


def ramps(size: tuple[int, int]) -> np.ndarray:
    """Return three planes without any symmetry; linear interpolation leaves a plane a plane."""
    rows, columns = np.indices(size) / 10
    return np.stack([rows + 3 * columns, 2 * rows - columns, 1 - rows + columns / 2]).astype(np.float32)


def numbered(size: tuple[int, int]) -> np.ndarray:
    """Return labels that are all different, none of them 0."""
    return (np.arange(size[0] * size[1]).reshape(size) + 1).astype(np.uint8)


def sources(size: tuple[int, int], rotation: np.ndarray, shift: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Return where, (row, column), every pixel comes from: turned about the picture's centre, then shifted.

    Pixel i reaches from i to i + 1, so that a side of n pixels has its centre at n / 2 and pixel i lies at i + 0.5.
    """
    rows, columns = np.indices(size) + 0.5
    from_centre = np.stack([rows - size[0] / 2, columns - size[1] / 2])
    moved = np.tensordot(rotation, from_centre, 1)
    return tuple(moved[axis] + size[axis] / 2 + shift[axis] - 0.5 for axis in range(2))


def matrix(degrees: float, factor: float) -> np.ndarray:
    angle = np.deg2rad(degrees)
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / factor


AFFINE = {"degrees": 40.0, "scale": 1.5, "shift": 0.2}
DRAWS = [
    (0.5, 0.5, 0.5, 0.5),
    (1, 0.5, 0.5, 0.5),
    (0.5, 1, 0.5, 0.5),
    (0.5, 0, 0.5, 0.5),
    (0.5, 0.5, 0.9, 0.5),
    (0.5, 0.5, 0.5, 0.1),
    (0.1, 0.8, 0.3, 0.7),
    (0.9, 0.2, 0.6, 0.4),
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shares", DRAWS)
def test_affine_turns_scales_and_shifts_about_the_centre(size, shares):
    image, labels = ramps(size), numbered(size)
    moved, moved_labels = affine(image, labels, Chosen(shares), **AFFINE)
    angle, factor = 40 * (2 * shares[0] - 1), 1.5 ** (2 * shares[1] - 1)
    shift = [0.2 * (2 * share - 1) * side for share, side in zip(shares[2:], size, strict=True)]
    rows, columns = sources(size, matrix(angle, factor), shift)
    edge = 1e-6  # the last digits decide on which side of an edge a pixel lies
    far_rows, far_columns = size[0] - 1, size[1] - 1
    inside = (rows > edge) & (rows < far_rows - edge) & (columns > edge) & (columns < far_columns - edge)
    outside = (rows < -edge) | (rows > far_rows + edge) | (columns < -edge) | (columns > far_columns + edge)
    assert inside.sum() > 0.2 * inside.size
    a, b = rows / 10, columns / 10
    expected = np.stack([a + 3 * b, 2 * a - b, 1 - a + b / 2])
    np.testing.assert_allclose(moved[:, inside], expected[:, inside], atol=ROUNDED, rtol=0)
    assert (moved[:, outside] == image.min()).all()  # of all channels
    clear = inside & (np.abs(rows % 1 - 0.5) > edge) & (np.abs(columns % 1 - 0.5) > edge)
    nearest = labels[np.rint(rows).astype(int).clip(0, far_rows), np.rint(columns).astype(int).clip(0, far_columns)]
    np.testing.assert_array_equal(moved_labels[clear], nearest[clear])
    assert not moved_labels[outside & (np.rint(rows) != np.rint(rows).clip(0, far_rows))].any()


@pytest.mark.parametrize("size", [(9, 9), (8, 8)])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_quarter_turn_of_a_square_loses_no_pixel(size, share):
    """About a centre that is off by half a pixel, a row or a column would leave the picture."""
    image, labels = ramps(size), numbered(size)
    options = {"degrees": 90.0, "scale": 1.0, "shift": 0.0}
    moved, _ = affine(image, labels, Chosen([share, 0, 0, 0]), **options)
    rotated = [np.rot90(image, quarter_turns, axes=(1, 2)) for quarter_turns in (1, 3)]
    inner = np.s_[:, 1:-1, 1:-1]  # the cosine of a quarter turn is 6e-17, and on the rim that decides
    assert any(np.allclose(moved[inner], one[inner], atol=ROUNDED) for one in rotated)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("angle", [-20, -7, 0, 1, 13, 19])
def test_rotate_takes_the_nearest_pixel_about_the_centre(size, angle):
    image, labels = ramps(size), numbered(size)
    seed = next(s for s in range(2000) if np.random.default_rng(s).integers(-20, 20) == angle)
    rotated, rotated_labels = rotate(image, labels, np.random.default_rng(seed), degrees=20.0)
    rows, columns = sources(size, matrix(-angle, 1), (0, 0))
    clear = (np.abs(rows % 1 - 0.5) > 1e-6) & (np.abs(columns % 1 - 0.5) > 1e-6)
    inside = (rows >= 0) & (rows <= size[0] - 1) & (columns >= 0) & (columns <= size[1] - 1) & clear
    nearest = np.rint(rows).astype(int).clip(0, size[0] - 1), np.rint(columns).astype(int).clip(0, size[1] - 1)
    np.testing.assert_array_equal(rotated_labels[inside], labels[nearest][inside])
    np.testing.assert_array_equal(rotated[:, inside], image[:, *nearest][:, inside])
    beyond = (rows < -0.5) | (rows > size[0] - 0.5) | (columns < -0.5) | (columns > size[1] - 0.5)
    assert not rotated[:, beyond].any()
    assert not rotated_labels[beyond].any()
    # TransUNet's own line; its picture and its labels are planes, and have the same axes.
    np.testing.assert_array_equal(rotated_labels, ndimage.rotate(labels, angle, order=0, reshape=False))
    for channel, plane in zip(rotated, image, strict=True):
        np.testing.assert_array_equal(channel, ndimage.rotate(plane, angle, order=0, reshape=False))


def test_rotate_takes_every_whole_angle_but_the_last():
    image = ramps((9, 14))
    angles = {rotate(image, numbered((9, 14)), np.random.default_rng(s), degrees=2.0)[0].tobytes() for s in range(99)}
    expected = {
        np.stack([ndimage.rotate(plane, angle, order=0, reshape=False) for plane in image]).tobytes()
        for angle in (-2, -1, 0, 1)
    }
    assert angles <= expected
    np.testing.assert_array_equal(len(angles), len(expected))


def moved_by(image: np.ndarray, name: str) -> np.ndarray:
    """Return one of the eight ways to lay a plane, written out by rows and columns."""
    height, width = image.shape[-2:]
    rows, columns = np.indices((width, height) if name in TURNING else (height, width))
    row, column = {
        "same": (rows, columns),
        "left": (columns, width - 1 - rows),
        "half": (height - 1 - rows, width - 1 - columns),
        "right": (height - 1 - columns, rows),
        "top to bottom": (height - 1 - rows, columns),
        "left to right": (rows, width - 1 - columns),
        "transposed": (columns, rows),
        "transposed the other way": (height - 1 - columns, width - 1 - rows),
    }[name]
    return image[..., row, column]


TURNING = ("left", "right", "transposed", "transposed the other way")
TURNS = ("same", "left", "half", "right")
MIRRORS = ("top to bottom", "left to right", "transposed", "transposed the other way")
OUTCOMES = [
    (rotate90, (9, 9), TURNS),
    (rotate90, (8, 8), TURNS),
    (rotate90, (9, 14), ("same", "half")),
    (flip, (9, 9), ("top to bottom", "left to right", "half")),
    (flip, (12, 7), ("top to bottom", "left to right", "half")),
    (turn_and_mirror, (8, 8), MIRRORS),
    (turn_and_mirror, (9, 14), MIRRORS),
]
COUNT = 600


@pytest.mark.parametrize(("function", "size", "outcomes"), OUTCOMES)
def test_turns_and_mirrors_are_these_and_equally_likely(function, size, outcomes):
    image, labels, rng = ramps(size), numbered(size), np.random.default_rng(0)
    seen = dict.fromkeys(outcomes, 0)
    for _ in range(COUNT):
        moved, moved_labels = function(image, labels, rng)
        (name,) = (name for name in seen if np.array_equal(moved_labels, moved_by(labels, name)))
        np.testing.assert_array_equal(moved, moved_by(image, name))
        seen[name] += 1
    share = 1 / len(outcomes)
    # Six standard deviations of a binomial; the seed is fixed, so that this never varies.
    assert max(abs(count / COUNT - share) for count in seen.values()) < 6 * np.sqrt(share * (1 - share) / COUNT)


@pytest.mark.parametrize("shares", list(product((0.0, 0.3, 1.0), repeat=3)))
def test_intensity_bends_between_the_extremes_and_stretches_about_the_mean(shares):
    image, labels = ramps((9, 14)), numbered((9, 14))
    moved, same = intensity(image, labels, Chosen(shares), gamma=1.4, contrast=1.3, brightness=0.25)
    np.testing.assert_array_equal(same, labels)
    exact = image.astype(np.float64)
    low, high = exact.min(), exact.max()
    bent = low + (high - low) * ((exact - low) / (high - low)) ** (1.4 ** (2 * shares[0] - 1))
    expected = bent.mean() + (bent - bent.mean()) * 1.3 ** (2 * shares[1] - 1) + 0.25 * (2 * shares[2] - 1) * bent.std()
    np.testing.assert_allclose(moved, expected, atol=5 * ROUNDED, rtol=0)  # a power, and sums of 378 values


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_noise_is_normal_with_its_share_of_the_spread(share):
    rng = np.random.default_rng(2)
    image = (5 + 3 * rng.normal(size=(3, 100, 90))).astype(np.float32)
    moved, same = noise(image, numbered((100, 90)), Chosen([share]), deviation=0.4)
    np.testing.assert_array_equal(same, numbered((100, 90)))
    added = (moved.astype(np.float64) - image) / (0.4 * share * image.std() or 1.0)
    if share == 0:
        assert not added.any()
        return
    count = added.size
    assert abs(added.mean()) < 6 / np.sqrt(count)
    assert abs(added.std() - 1) < 6 / np.sqrt(2 * count)
    assert abs((added**4).mean() - 3) < 6 * np.sqrt(96 / count)  # of a normal number; a uniform has 1.8
    between = np.asarray(np.corrcoef(added.reshape(3, -1)))[np.triu_indices(3, 1)]
    assert np.abs(between).max() < 6 / np.sqrt(count / 3)  # each channel has its own
    beside = (added[:, :, :-1] * added[:, :, 1:]).mean()
    assert abs(beside) < 6 / np.sqrt(count)  # and each pixel


@pytest.mark.parametrize("size", [(8, 8), (9, 14)])
def test_half_the_slices_are_turned_a_quarter_rotated_and_a_quarter_left_alone(size):
    image, labels, rng = ramps(size), numbered(size), np.random.default_rng(3)
    seen = {"turned": 0, "rotated": 0, "left alone": 0}
    for _ in range(COUNT):
        moved, moved_labels = AUGMENTATIONS["turn_or_rotate"](image, labels, rng, degrees=20.0)
        mirrored = any(np.array_equal(moved_labels, moved_by(labels, name)) for name in MIRRORS)
        alone = np.array_equal(moved_labels, labels) and np.array_equal(moved, image)
        seen["turned" if mirrored else "left alone" if alone else "rotated"] += 1
    # One angle in 40 is 0, and small ones may move no pixel: these count as left alone.
    assert abs(seen["turned"] / COUNT - 0.5) < 6 * np.sqrt(0.25 / COUNT)
    assert abs(seen["rotated"] / COUNT - 0.23) < 6 * np.sqrt(0.19 / COUNT)


def test_a_step_happens_as_often_as_it_says_and_steps_come_in_their_order():
    image, labels, rng = ramps((9, 9)), numbered((9, 9)), np.random.default_rng(4)
    steps = [Step(name="noise", probability=0.3, options={"deviation": 0.5})]
    changed = sum(not np.array_equal(augment(image, labels, steps, rng)[0], image) for _ in range(COUNT))
    assert abs(changed / COUNT - 0.3) < 6 * np.sqrt(0.21 / COUNT)
    bend = Step(name="intensity", options={"gamma": 1.5, "contrast": 1.5, "brightness": 0.5})
    both = [Step(name="rotate", options={"degrees": 20.0}), bend]
    seed = 5
    one, _ = augment(image, labels, both, np.random.default_rng(seed))
    rng = np.random.default_rng(seed)
    rng.random()
    rotated, rotated_labels = rotate(image, labels, rng, degrees=20.0)
    rng.random()
    expected, _ = intensity(rotated, rotated_labels, rng, **bend.options)
    np.testing.assert_allclose(one, expected, atol=ROUNDED)
