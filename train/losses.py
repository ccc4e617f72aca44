"""The training losses: cross-entropy plus Dice for several classes, binary cross-entropy plus Dice for one.

Sources: the binary loss is UNeXt's ``BCEDiceLoss`` (0.5 BCE + Dice per image), as the paper's protocol has it; the
multi-class one is TransUNet's (Dice over the unsharded batch, squares in the denominator, background included).

Where several processes share a batch, ``shard`` adds up what they have: each returns the loss of all their pictures.
"""

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from medseg_trt.train.global_batch import BatchShard, unsharded

SMOOTH = 1e-5  # keeps an empty class from dividing by zero


def segmentation_loss(
    logits: Float[Tensor, "batch classes height width"],
    labels: Int[Tensor, "batch height width"],
    shard: BatchShard | None = None,
) -> Float[Tensor, ""]:
    """Return the loss that fits the number of logits: ``bce_dice`` for one, ``ce_dice`` for more."""
    return bce_dice(logits[:, 0], labels, shard) if logits.shape[1] == 1 else ce_dice(logits, labels, shard)


def ce_dice(
    logits: Float[Tensor, "batch classes height width"],
    labels: Int[Tensor, "batch height width"],
    shard: BatchShard | None = None,
) -> Float[Tensor, ""]:
    """Return half the cross-entropy plus half the Dice loss, which is averaged over all classes with the background.

    Source: Beckschen/TransUNet ``utils.py``, class ``DiceLoss``, and ``trainer.py``.
    """
    probabilities = logits.softmax(1)
    truth = F.one_hot(labels, logits.shape[1]).movedim(-1, 1).to(logits.dtype)
    shard = shard or unsharded(len(logits))
    both = shard.sum((probabilities * truth).sum((0, 2, 3)))
    either = shard.sum(probabilities.square().sum((0, 2, 3)) + truth.square().sum((0, 2, 3)))
    dice = 1 - (2 * both + SMOOTH) / (either + SMOOTH)
    return 0.5 * shard.mean(F.cross_entropy(logits, labels)) + 0.5 * dice.mean()


def bce_dice(
    logits: Float[Tensor, "batch height width"],
    labels: Int[Tensor, "batch height width"],
    shard: BatchShard | None = None,
) -> Float[Tensor, ""]:
    """Return half the binary cross-entropy plus the Dice loss, which is taken per image without squares.

    Source: UNeXt-pytorch ``losses.py``, class ``BCEDiceLoss``.
    """
    probabilities, truth = logits.sigmoid(), labels.to(logits.dtype)
    both = (probabilities * truth).sum((1, 2))
    either = probabilities.sum((1, 2)) + truth.sum((1, 2))
    dice = 1 - (2 * both + SMOOTH) / (either + SMOOTH)
    shard = shard or unsharded(len(logits))
    return shard.mean(0.5 * F.binary_cross_entropy_with_logits(logits, truth) + dice.mean())
