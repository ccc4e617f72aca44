"""Choose the training slices that a replacement of the block is fitted to, plain and augmented.

Every second slice is held out, with its augmented copies: a copy of a slice that was fitted would hide an error. No
slice may be one that the accuracy gate judges.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32
from numpy import ndarray

from medseg_trt.building.reference_images import block_fitting_cases
from medseg_trt.building.spread_slices import evenly_spread, spread_inputs, spread_slices
from medseg_trt.errors import UsageError
from medseg_trt.imaging.digest import image_digests
from medseg_trt.progress import LOG
from medseg_trt.spec import from_dict
from medseg_trt.train.checkpoint import Checkpoint
from medseg_trt.train.datasets.folder import read_case_image
from medseg_trt.train.recipes.augment import Step, augment

MAX_SLICES = 128
MIN_SLICES = 2  # one to fit, one held out
COPIES = 2  # augmented ones of every slice
SEED = 0

Inputs = Float32[ndarray, "_ 3 height width"]


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockImages:
    """Prepared training slices for the block's replacement."""

    fitted: Inputs  # plain slices, then their augmented copies
    held_out: Inputs  # the slices between them, then their augmented copies
    slices: int  # plain ones, fitted and held out
    files: tuple[str, ...]
    digests: tuple[str, ...]  # of the plain slices

    @property
    def augmented(self) -> int:
        """How many augmented copies there are."""
        return len(self.fitted) + len(self.held_out) - self.slices


def block_images(checkpoint: Checkpoint, data: Path | None, judged: Collection[ndarray]) -> BlockImages:
    """Return training slices to fit a replacement of the block to, and others to measure its error on.

    Args:
        checkpoint: its preprocessing and the augmentation of its training are used.
        data: as for ``reference_images``.
        judged: the prepared slices of every judged split.

    Raises:
        UsageError: there are no training images, fewer slices than ``MIN_SLICES``, or one of them is also judged.
    """
    cases = block_fitting_cases(checkpoint, data)
    if not cases:
        raise UsageError(
            "--block needs training images that are not judged, to fit the replacement of the block to; give a folder "
            "with a train and a val split: --data DIR, or choose --block exact"
        )
    per_case = -(-MAX_SLICES // len(cases))
    read = ((case.name, read_case_image(case), None) for case in cases)
    prepared = spread_inputs(list(spread_slices(checkpoint.preprocessing, read, per_case)), MAX_SLICES)
    if len(prepared) < MIN_SLICES:
        raise UsageError(
            f"--block needs at least {MIN_SLICES} training slices, since every second one is held out; the train split "
            f"has {len(prepared)}; add images to it, or choose --block exact"
        )
    plain = np.stack([inputs for _, inputs in prepared])[evenly_spread(len(prepared), MAX_SLICES)]
    check_not_judged(plain, judged)
    steps = training_augmentation(checkpoint)
    if not steps:
        LOG.warning("the checkpoint records no augmentation, so the block's replacement is fitted to plain slices only")
    return BlockImages(
        fitted=_with_copies(plain[::2], steps, SEED),
        held_out=_with_copies(plain[1::2], steps, SEED + 1),
        slices=len(plain),
        files=tuple(dict.fromkeys(name for name, _ in prepared)),
        digests=tuple(image_digests(plain)),
    )


def check_not_judged(plain: Inputs, judged: Collection[ndarray]) -> None:
    """Refuse calibration on slices that judge the result.

    Raises:
        UsageError: a slice is judged.
    """
    digests = {digest for images in judged for digest in image_digests(images)}
    if shared := digests & set(image_digests(plain)):
        raise UsageError(
            f"{len(shared)} of the slices that the block's replacement would be fitted to are also judged; remove the "
            "copies, or give other splits in dataset.json"
        )


def training_augmentation(checkpoint: Checkpoint) -> tuple[Step, ...]:
    """Return the augmentation that the checkpoint was trained with, as its provenance records it; empty if it does not.

    Steps that are applied before the resizing are left out: they would not fit prepared slices.
    """
    recipe = checkpoint.provenance.recipe or {}
    if recipe.get("augment_at", "network") != "network":
        return ()
    return tuple(from_dict(Step, step, "the checkpoint's recipe") for step in recipe.get("augmentation", ()))


def _with_copies(plain: Inputs, steps: tuple[Step, ...], seed: int) -> Inputs:
    if not steps:
        return plain
    rng, labels = np.random.default_rng(seed), np.zeros(plain.shape[2:], np.uint8)
    copies = [augment(image, labels, steps, rng)[0] for _ in range(COPIES) for image in plain]
    return np.concatenate([plain, np.stack(copies)])
