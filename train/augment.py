"""Augmentation: small NumPy functions on one prepared slice and its labels, and the table that recipes choose from.

Every function takes (image, labels, random generator, options) and returns a new pair; images are (channels, height,
width) float32 after normalisation, labels (height, width). Amounts of intensity are relative to the image's own mean
and spread, so that they mean the same whatever the normalisation was.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import Parameter, signature

import numpy as np
from jaxtyping import Float, UInt8
from scipy import ndimage

Picture = Float[np.ndarray, "channels height width"]
Labels = UInt8[np.ndarray, "height width"]
Pair = tuple[Picture, Labels]
TurnedPair = tuple[
    Float[np.ndarray, "channels turned_height turned_width"], UInt8[np.ndarray, "turned_height turned_width"]
]

PUBLISHED_WORKERS = 8  # of TransUNet's loader


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One augmentation of a recipe."""

    name: str  # a key of AUGMENTATIONS
    probability: float = 1.0
    options: Mapping[str, float] = field(default_factory=dict)

    __pydantic_config__ = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if self.name not in AUGMENTATIONS:
            raise ValueError(f"no augmentation is called {self.name!r}; choose one of: {', '.join(AUGMENTATIONS)}")
        if not 0 <= self.probability <= 1:
            raise ValueError(f"the probability of {self.name} is {self.probability}; it must be 0 … 1")
        wanted = option_names(self.name)
        if set(self.options) != set(wanted):
            taken, given = (", ".join(names) or "none" for names in (wanted, self.options))
            raise ValueError(f"the options of the augmentation {self.name} must be: {taken}; given are: {given}")


def option_names(name: str) -> tuple[str, ...]:
    """Return the options that an augmentation takes, all of which must be given."""
    parameters = signature(AUGMENTATIONS[name]).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.kind is Parameter.KEYWORD_ONLY)


def augment(image: Picture, labels: Labels, steps: Sequence[Step], rng: np.random.Generator) -> TurnedPair:
    """Apply the steps of a recipe in their order, each with its probability."""
    for step in steps:
        if rng.random() < step.probability:
            image, labels = AUGMENTATIONS[step.name](image, labels, rng, **step.options)
    return np.ascontiguousarray(image, np.float32), np.ascontiguousarray(labels)


def rotate90(image: Picture, labels: Labels, rng: np.random.Generator) -> Pair:
    """Turn by 0, 90, 180 or 270 degrees; a picture that is not square by 0 or 180."""
    turns = int(rng.integers(4)) if image.shape[1] == image.shape[2] else 2 * int(rng.integers(2))
    return np.rot90(image, turns, axes=(1, 2)), np.rot90(labels, turns)


def flip(image: Picture, labels: Labels, rng: np.random.Generator) -> Pair:
    """Mirror top to bottom, left to right, or both."""
    axes = [(0,), (1,), (0, 1)][int(rng.integers(3))]
    return np.flip(image, tuple(axis + 1 for axis in axes)), np.flip(labels, axes)


def affine(
    image: Picture, labels: Labels, rng: np.random.Generator, *, degrees: float, scale: float, shift: float
) -> Pair:
    """Rotate, scale and shift about the centre; what comes from outside takes the image's smallest value and label 0.

    Args:
        image: the picture.
        labels: its labels.
        rng: the random generator.
        degrees: largest rotation to either side.
        scale: largest factor of enlargement, and of reduction; 1.25 gives 0.8 to 1.25, evenly in the logarithm.
        shift: largest shift as a share of the height and of the width.
    """
    angle = np.deg2rad(rng.uniform(-degrees, degrees))
    factor = np.exp(rng.uniform(-np.log(scale), np.log(scale)))
    size = np.array(labels.shape)
    matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / factor
    centre = (size - 1) / 2
    offset = centre - matrix @ centre + rng.uniform(-shift, shift, 2) * size
    moved = [ndimage.affine_transform(channel, matrix, offset, order=1, cval=image.min()) for channel in image]
    return np.stack(moved), ndimage.affine_transform(labels, matrix, offset, order=0)


def intensity(
    image: Picture, labels: Labels, rng: np.random.Generator, *, gamma: float, contrast: float, brightness: float
) -> Pair:
    """Bend, stretch and shift the values.

    Args:
        image: the picture.
        labels: its labels.
        rng: the random generator.
        gamma: largest exponent, and its inverse the smallest; applied between the image's smallest and largest value.
        contrast: largest factor about the mean, and its inverse the smallest.
        brightness: largest shift, in standard deviations of the image.
    """
    low, high = float(image.min()), float(image.max())
    spread = max(high - low, 1e-6)
    bent = ((image - low) / spread) ** np.exp(rng.uniform(-np.log(gamma), np.log(gamma))) * spread + low
    mean, deviation = float(bent.mean()), float(bent.std())
    stretched = (bent - mean) * np.exp(rng.uniform(-np.log(contrast), np.log(contrast))) + mean
    return stretched + rng.uniform(-brightness, brightness) * deviation, labels


def noise(image: Picture, labels: Labels, rng: np.random.Generator, *, deviation: float) -> Pair:
    """Add Gaussian noise of up to ``deviation`` standard deviations of the image."""
    amount = rng.uniform(0, deviation) * float(image.std())
    return image + rng.normal(0, amount, image.shape).astype(np.float32), labels


def turn_and_mirror(image: Picture, labels: Labels, rng: np.random.Generator) -> TurnedPair:
    """Turn by 0, 90, 180 or 270 degrees, then mirror top to bottom or left to right; a picture may change its shape.

    Source: Beckschen/TransUNet ``dataset_synapse.py``, ``random_rot_flip``.
    """
    turns, axis = int(rng.integers(4)), int(rng.integers(2))
    image, labels = np.rot90(image, turns, axes=(1, 2)), np.rot90(labels, turns)
    return np.flip(image, axis + 1), np.flip(labels, axis)


def rotate(image: Picture, labels: Labels, rng: np.random.Generator, *, degrees: float) -> Pair:
    """Rotate by a whole number of degrees, the nearest pixel of each; what comes from outside is 0.

    Args:
        image: the picture.
        labels: its labels.
        rng: the random generator.
        degrees: rotate by ``-degrees`` … ``degrees - 1``, each as likely.

    Source: Beckschen/TransUNet ``dataset_synapse.py``, ``random_rotate``.
    """
    angle = int(rng.integers(-int(degrees), int(degrees)))
    turned = ndimage.rotate(image, angle, axes=(2, 1), order=0, reshape=False)
    return turned, ndimage.rotate(labels, angle, order=0, reshape=False)


def turn_or_rotate(image: Picture, labels: Labels, rng: np.random.Generator, *, degrees: float) -> TurnedPair:
    """Of two slices turn and mirror one, of two others rotate one, and leave the rest alone.

    Source: Beckschen/TransUNet ``dataset_synapse.py``, class ``RandomGenerator``.
    """
    if rng.random() > 0.5:
        return turn_and_mirror(image, labels, rng)
    if rng.random() > 0.5:
        return rotate(image, labels, rng, degrees=degrees)
    return image, labels


def worker_steps(steps: Sequence[Step], seed: int, count: int, batch_size: int) -> list[tuple[Step, ...]]:
    """Return what TransUNet's loader does to each slice of an epoch: the same in every epoch.

    Which augmentation a slice gets is drawn from Python's ``random``, which each of eight worker processes starts anew
    with its own number at every epoch. By how much is drawn per slice here: it depended on the version of PyTorch.

    Args:
        steps: a recipe's, ``turn_or_rotate`` alone.
        seed: of the run.
        count: slices of an epoch.
        batch_size: a worker prepares every eighth batch of this size.

    Source: Beckschen/TransUNet ``trainer.py``, ``worker_init_fn``; PyTorch's ``DataLoader``.
    """
    (step,) = steps
    chosen: list[tuple[Step, ...]] = []
    draws = [random.Random(seed + worker) for worker in range(PUBLISHED_WORKERS)]
    for item in range(count):
        draw = draws[item // batch_size % PUBLISHED_WORKERS]
        if draw.random() > 0.5:
            chosen.append((Step(name="turn_and_mirror"),))
        elif draw.random() > 0.5:
            chosen.append((Step(name="rotate", options=step.options),))
        else:
            chosen.append(())
    return chosen


AUGMENTATIONS: Mapping[str, Callable[..., Pair]] = {
    "rotate90": rotate90,
    "flip": flip,
    "affine": affine,
    "intensity": intensity,
    "noise": noise,
    "turn_and_mirror": turn_and_mirror,
    "rotate": rotate,
    "turn_or_rotate": turn_or_rotate,
}
SHAPE_CHANGING = ("turn_and_mirror", "turn_or_rotate")  # of a picture that is not square
