"""The training losses: cross-entropy plus Dice for several classes, binary cross-entropy plus Dice for one.

``LossSpec`` sets the weights of the terms, and selects another loss for one class.

Sources: the binary loss is UNeXt's ``BCEDiceLoss`` (0.5 BCE + Dice per image), as in the paper's protocol; the
multi-class one is TransUNet's (Dice over the unsharded batch, squares in the denominator, background included).

If several processes share a batch, ``shard`` sums over them: each process returns the loss of the whole batch.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from medseg_trt.train.models.global_batch import BatchShard, unsharded
from medseg_trt.train.recipes.loss_spec import LossSpec

SMOOTH = 1e-5  # avoids a division by zero for an empty class
EDGE_WINDOW = 31  # pixels across, in which ``structure`` compares a pixel's label with its neighbours'
EDGE_WEIGHT = 5


def segmentation_loss(
    outputs: Tensor | tuple[Tensor, ...],
    labels: Int[Tensor, "batch height width"],
    shard: BatchShard | None = None,
    spec: LossSpec | None = None,
) -> Float[Tensor, ""]:
    """Return the loss that fits the number of logits: that of one class, or ``ce_dice`` for more.

    Args:
        outputs: the logits, (batch, classes, height, width); of a network with deep supervision, a tuple of them and of
            those of its auxiliary heads.
        labels: of the same pictures.
        shard: of the batch.
        spec: what is weighted how.
    """
    spec = spec or LossSpec()
    if isinstance(outputs, Tensor):
        return _loss(outputs, labels, shard, spec)
    main, *auxiliary = (_loss(logits, labels, shard, spec) for logits in outputs)
    total = (1 - spec.auxiliary * len(auxiliary)) * main
    for loss in auxiliary:
        total = total + spec.auxiliary * loss
    return total


def _loss(logits: Tensor, labels: Tensor, shard: BatchShard | None, spec: LossSpec) -> Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # 16 bits are too few for sums over pixels
    if logits.shape[1] > 1:
        return ce_dice(logits, labels, shard, spec.cross_entropy)
    binary = {"bce_dice": bce_dice, "structure": structure}[spec.binary]
    return binary(logits[:, 0], labels, shard)


def ce_dice(
    logits: Float[Tensor, "batch classes height width"],
    labels: Int[Tensor, "batch height width"],
    shard: BatchShard | None = None,
    cross_entropy: float = 0.5,
) -> Float[Tensor, ""]:
    """Return half the cross-entropy plus half the Dice loss, which is averaged over all classes with the background.

    ``cross_entropy`` is its share, 0 … 1, where it is not half.

    Source: Beckschen/TransUNet ``utils.py``, class ``DiceLoss``, and ``trainer.py``.
    """
    probabilities = logits.softmax(1)
    truth = F.one_hot(labels, logits.shape[1]).movedim(-1, 1).to(logits.dtype)
    shard = shard or unsharded(len(logits))
    intersection = shard.sum((probabilities * truth).sum((0, 2, 3)))
    denominator = shard.sum(probabilities.square().sum((0, 2, 3)) + truth.square().sum((0, 2, 3)))
    dice = 1 - (2 * intersection + SMOOTH) / (denominator + SMOOTH)
    entropy = shard.mean(F.cross_entropy(logits, labels))
    return cross_entropy * entropy + (1 - cross_entropy) * dice.mean()


def bce_dice(
    logits: Float[Tensor, "batch height width"],
    labels: Int[Tensor, "batch height width"],
    shard: BatchShard | None = None,
) -> Float[Tensor, ""]:
    """Return half the binary cross-entropy plus the Dice loss, which is taken per image without squares.

    Source: UNeXt-pytorch ``losses.py``, class ``BCEDiceLoss``.
    """
    probabilities, truth = logits.sigmoid(), labels.to(logits.dtype)
    intersection = (probabilities * truth).sum((1, 2))
    denominator = probabilities.sum((1, 2)) + truth.sum((1, 2))
    dice = 1 - (2 * intersection + SMOOTH) / (denominator + SMOOTH)
    shard = shard or unsharded(len(logits))
    return shard.mean(0.5 * F.binary_cross_entropy_with_logits(logits, truth) + dice.mean())


def structure(
    logits: Float[Tensor, "batch height width"],
    labels: Int[Tensor, "batch height width"],
    shard: BatchShard | None = None,
) -> Float[Tensor, ""]:
    """Return the binary cross-entropy plus an IoU loss per image, in which pixels near an edge count up to six times.

    The published code weights the cross-entropy as well, but averages it before the weights, which then cancel.
    Source: TianBaoGe/DS-TransUNet ``train_kvasir.py``, ``structure_loss``; PraNet has the same.
    """
    probabilities, truth = logits.sigmoid(), labels.to(logits.dtype)
    local_mean = F.avg_pool2d(truth[:, None], EDGE_WINDOW, 1, EDGE_WINDOW // 2)[:, 0]
    weight = 1 + EDGE_WEIGHT * (local_mean - truth).abs()
    both = (weight * probabilities * truth).sum((1, 2))
    either = (weight * (probabilities + truth)).sum((1, 2))
    iou = 1 - (both + 1) / (either - both + 1)
    shard = shard or unsharded(len(logits))
    return shard.mean(F.binary_cross_entropy_with_logits(logits, truth) + iou.mean())
