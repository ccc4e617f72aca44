"""Augmentation: NumPy functions on one prepared slice and its labels, and the table of them for recipes.

Every function takes (image, labels, random generator, options) and returns a new pair. Images are (channels, height,
width) float32 after normalisation, labels (height, width). Intensity options are relative to the image's own mean and
standard deviation, so that they do not depend on the normalisation.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import Parameter, signature

import numpy as np
from jaxtyping import Float, UInt8
from scipy import ndimage

ImageArray = Float[np.ndarray, "channels height width"]
Labels = UInt8[np.ndarray, "height width"]
Pair = tuple[ImageArray, Labels]
ReshapedPair = tuple[Float[np.ndarray, "channels new_height new_width"], UInt8[np.ndarray, "new_height new_width"]]

PUBLISHED_WORKERS = 8  # worker processes of TransUNet's loader


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
        if set(self.options) != set(option_names(self.name)):
            required, actual = (", ".join(names) or "none" for names in (option_names(self.name), self.options))
            raise ValueError(f"the options of the augmentation {self.name} must be: {required}; given are: {actual}")


def option_names(name: str) -> tuple[str, ...]:
    """Return the options of an augmentation; all are required."""
    parameters = signature(AUGMENTATIONS[name]).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.kind is Parameter.KEYWORD_ONLY)


def augment(image: ImageArray, labels: Labels, steps: Sequence[Step], rng: np.random.Generator) -> ReshapedPair:
    """Apply the steps of a recipe in order, each with its probability."""
    for step in steps:
        if rng.random() < step.probability:
            image, labels = AUGMENTATIONS[step.name](image, labels, rng, **step.options)
    return np.ascontiguousarray(image, np.float32), np.ascontiguousarray(labels)


def rotate90(image: ImageArray, labels: Labels, rng: np.random.Generator) -> Pair:
    """Rotate by 0, 90, 180 or 270 degrees; an image that is not square by 0 or 180."""
    quarters = int(rng.integers(4)) if image.shape[1] == image.shape[2] else 2 * int(rng.integers(2))
    return np.rot90(image, quarters, axes=(1, 2)), np.rot90(labels, quarters)


def flip(image: ImageArray, labels: Labels, rng: np.random.Generator) -> Pair:
    """Mirror top to bottom, left to right, or both."""
    axes = [(0,), (1,), (0, 1)][int(rng.integers(3))]
    return np.flip(image, tuple(axis + 1 for axis in axes)), np.flip(labels, axes)


def affine(
    image: ImageArray, labels: Labels, rng: np.random.Generator, *, degrees: float, scale: float, shift: float
) -> Pair:
    """Rotate, scale and shift about the centre; pixels from outside get the image's smallest value and label 0.

    Args:
        image: of a slice.
        labels: its labels.
        rng: the random generator.
        degrees: largest rotation to either side.
        scale: largest factor of enlargement and of reduction; 1.25 gives 0.8 to 1.25, log-uniform.
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
    image: ImageArray, labels: Labels, rng: np.random.Generator, *, gamma: float, contrast: float, brightness: float
) -> Pair:
    """Change gamma, contrast and brightness.

    Args:
        image: of a slice.
        labels: its labels.
        rng: the random generator.
        gamma: largest exponent (the smallest is its inverse), applied between the image's smallest and largest value.
        contrast: largest factor about the mean (the smallest is its inverse).
        brightness: largest shift, in standard deviations of the image.
    """
    low, high = float(image.min()), float(image.max())
    spread = max(high - low, 1e-6)
    bent = ((image - low) / spread) ** np.exp(rng.uniform(-np.log(gamma), np.log(gamma))) * spread + low
    mean, deviation = float(bent.mean()), float(bent.std())
    stretched = (bent - mean) * np.exp(rng.uniform(-np.log(contrast), np.log(contrast))) + mean
    return stretched + rng.uniform(-brightness, brightness) * deviation, labels


def noise(image: ImageArray, labels: Labels, rng: np.random.Generator, *, deviation: float) -> Pair:
    """Add Gaussian noise of up to ``deviation`` standard deviations of the image."""
    amount = rng.uniform(0, deviation) * float(image.std())
    return image + rng.normal(0, amount, image.shape).astype(np.float32), labels


def turn_and_mirror(image: ImageArray, labels: Labels, rng: np.random.Generator) -> ReshapedPair:
    """Rotate by 0, 90, 180 or 270 degrees, then mirror vertically or horizontally; the shape may change.

    Source: Beckschen/TransUNet ``dataset_synapse.py``, ``random_rot_flip``.
    """
    quarters, axis = int(rng.integers(4)), int(rng.integers(2))
    image, labels = np.rot90(image, quarters, axes=(1, 2)), np.rot90(labels, quarters)
    return np.flip(image, axis + 1), np.flip(labels, axis)


def rotate(image: ImageArray, labels: Labels, rng: np.random.Generator, *, degrees: float) -> Pair:
    """Rotate by an integer number of degrees with nearest-neighbour sampling; pixels from outside are 0.

    Args:
        image: of a slice.
        labels: its labels.
        rng: the random generator.
        degrees: uniform in ``-degrees`` … ``degrees - 1``.

    Source: Beckschen/TransUNet ``dataset_synapse.py``, ``random_rotate``.
    """
    angle = int(rng.integers(-int(degrees), int(degrees)))
    rotated = ndimage.rotate(image, angle, axes=(2, 1), order=0, reshape=False)
    return rotated, ndimage.rotate(labels, angle, order=0, reshape=False)


def turn_or_rotate(image: ImageArray, labels: Labels, rng: np.random.Generator, *, degrees: float) -> ReshapedPair:
    """Apply ``turn_and_mirror`` with probability 1/2, else ``rotate`` with probability 1/2, else nothing.

    Source: Beckschen/TransUNet ``dataset_synapse.py``, class ``RandomGenerator``.
    """
    if rng.random() > 0.5:
        return turn_and_mirror(image, labels, rng)
    if rng.random() > 0.5:
        return rotate(image, labels, rng, degrees=degrees)
    return image, labels


def worker_steps(steps: Sequence[Step], seed: int, count: int, batch_size: int) -> list[tuple[Step, ...]]:
    """Return the augmentation of each slice in TransUNet's loader, which is the same in every epoch.

    The kind of augmentation is drawn from Python's ``random``, which each of eight worker processes seeds again with
    its own number in every epoch. The parameters are drawn per slice here; there they depend on the version of PyTorch.

    Args:
        steps: of the recipe, only ``turn_or_rotate``.
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
SHAPE_CHANGING = ("turn_and_mirror", "turn_or_rotate")  # of an image that is not square
