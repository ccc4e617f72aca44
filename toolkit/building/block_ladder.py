"""The rungs of a build: each is fitted to the block of the checkpoint, measured on held-out tokens, and ready to trace.

Source of the idea that a frozen block need not be run: Bai et al. 2025 (AAAI), "Frozen Language Models Are Gradient
Coherence Rectifiers in Vision Transformers", who drop theirs after the training.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import nn

from medseg_trt.building.block_images import BlockImages, block_images
from medseg_trt.building.reference_images import JudgedImages
from medseg_trt.bundles.block_report import BlockCalibration
from medseg_trt.errors import UsageError
from medseg_trt.export.compress.affine import fit_affine
from medseg_trt.export.compress.cost import InsertCost, insert_cost
from medseg_trt.export.compress.held_out import HeldOutError, held_out_error
from medseg_trt.export.compress.narrow import NarrowFit
from medseg_trt.export.compress.replace import with_replacement
from medseg_trt.export.compress.rungs import AFFINE, EXACT, Rung, candidate_rungs, parse_block
from medseg_trt.export.compress.tokens import BlockTokens, tokens_before_block
from medseg_trt.progress import LOG
from medseg_trt.spec import BuildSpec
from medseg_trt.train.checkpoint import Checkpoint
from medseg_trt.train.models.model import LanguageInsert
from medseg_trt.train.models.segmentation_model import SegmentationModel


@dataclass(frozen=True, kw_only=True, slots=True)
class RungCandidate:
    """A folded network with one rung in the place of its block."""

    rung: Rung
    network: SegmentationModel
    cost: InsertCost | None  # None: the network has no block
    error: HeldOutError | None  # None: the exact block

    @property
    def is_exact(self) -> bool:
        """Whether the block is the checkpoint's own."""
        return self.rung == EXACT


class BlockLadder:
    """Fits the rungs that a build asks for, the cheapest first; tokens are collected when the first one is fitted.

    Args:
        checkpoint: the checkpoint.
        network: its network.
        folded: the same network, folded.
        spec: what to build.
        data: the data folder, as for ``reference_images``.
        judged: the images of every judged split.

    Raises:
        UsageError: the block cannot be replaced, or not as ``spec`` asks.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        network: SegmentationModel,
        folded: SegmentationModel,
        spec: BuildSpec,
        data: Path | None,
        judged: tuple[JudgedImages, ...],
    ) -> None:
        self._checkpoint, self._network, self._folded = checkpoint, network, folded
        self._data, self._judged = data, judged
        self.spec = spec
        self.rungs = candidate_rungs(parse_block(spec.block), checkpoint.spec)

    def candidates(self) -> Iterator[RungCandidate]:
        """Yield the fitted rungs, the cheapest first; one that is no cheaper than the exact block is left out.

        Raises:
            UsageError: there are no training images, or too few, or no rung is left.
        """
        exact = self._exact()
        for rung in self.rungs:
            candidate = exact if rung == EXACT else self._fitted(rung)
            if candidate is exact or _is_cheaper(candidate, exact):
                yield candidate
            elif self.rungs == (rung,):
                raise UsageError(f"block {rung} is no cheaper than the exact block; choose --block exact, or auto")
            else:
                LOG.warning("block %s is left out: it is no cheaper than the exact block", rung)

    @property
    def calibration(self) -> BlockCalibration | None:
        """What the rungs were fitted to; None where only the exact block is asked for."""
        if self.rungs == (EXACT,):
            return None
        images, tokens = self._images, self._tokens
        return BlockCalibration(
            tokens=tokens.count,
            held_out_tokens=tokens.held_out_count,
            slices=images.slices,
            augmented=images.augmented,
            files=images.files,
            digests=images.digests,
        )

    def _exact(self) -> RungCandidate:
        insert = self._folded.insert
        cost = insert_cost(insert, self._checkpoint.spec) if insert is not None else None
        return RungCandidate(rung=EXACT, network=self._folded, cost=cost, error=None)

    def _fitted(self, rung: Rung) -> RungCandidate:
        LOG.info("fit block %s to %d tokens", rung, self._tokens.count)
        replacement = self._fit(rung)
        return RungCandidate(
            rung=rung,
            network=with_replacement(self._folded, replacement),
            cost=insert_cost(replacement, self._checkpoint.spec),
            error=held_out_error(replacement, self._insert, self._tokens.held_out),
        )

    def _fit(self, rung: Rung) -> nn.Module:
        return fit_affine(self._insert, self._tokens.fitted) if rung == AFFINE else self._narrow_fit.fit(rung)

    @property
    def _insert(self) -> LanguageInsert:
        insert = self._network.insert
        assert isinstance(insert, LanguageInsert)  # ``candidate_rungs`` requires a block
        return insert

    @cached_property
    def _images(self) -> BlockImages:
        return block_images(self._checkpoint, self._data, [judged.inputs for judged in self._judged])

    @cached_property
    def _tokens(self) -> BlockTokens:
        LOG.info("collect the block's tokens on %d training slices", self._images.slices)
        fitted, held_out = (
            tokens_before_block(self._network, inputs) for inputs in (self._images.fitted, self._images.held_out)
        )
        return BlockTokens(fitted=fitted, held_out=held_out)

    @cached_property
    def _narrow_fit(self) -> NarrowFit:
        return NarrowFit(self._insert, self._tokens.fitted)


def _is_cheaper(candidate: RungCandidate, exact: RungCandidate) -> bool:
    assert candidate.cost is not None  # the network has a block, or nothing could be fitted to it
    assert exact.cost is not None
    return candidate.cost.macs < exact.cost.macs
