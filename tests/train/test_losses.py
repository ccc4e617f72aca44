"""The losses against their formulas, written out a second time in NumPy."""

import numpy as np
import pytest
import torch

from medseg_trt.train.losses import bce_dice, ce_dice, segmentation_loss, structure
from medseg_trt.train.recipes.loss_spec import LossSpec

EPS = 1e-5


def softmax(logits):
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True)


def ce_dice_reference(logits, labels):
    probabilities = softmax(logits)
    truth = np.eye(logits.shape[1])[labels].transpose(0, 3, 1, 2)
    cross_entropy = -np.log((probabilities * truth).sum(1)).mean()
    dice = [
        1
        - (2 * (probabilities[:, c] * truth[:, c]).sum() + EPS)
        / ((probabilities[:, c] ** 2).sum() + truth[:, c].sum() + EPS)
        for c in range(logits.shape[1])
    ]
    return 0.5 * cross_entropy + 0.5 * np.mean(dice)


def bce_dice_reference(logits, labels):
    p = 1 / (1 + np.exp(-logits))
    bce = -(labels * np.log(p) + (1 - labels) * np.log(1 - p)).mean()
    dice = [1 - (2 * (q * y).sum() + EPS) / (q.sum() + y.sum() + EPS) for q, y in zip(p, labels, strict=True)]
    return 0.5 * bce + np.mean(dice)


def test_ce_dice_loss_equals_the_numpy_reference():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(3, 4, 5, 7)), rng.integers(0, 4, (3, 5, 7))
    loss = ce_dice(torch.from_numpy(logits), torch.from_numpy(labels)).item()
    # float64: only the order of summation differs. Dice per image instead of per batch is off by 1e-2 here.
    assert abs(loss - ce_dice_reference(logits, labels)) < 1e-12
    per_image = np.mean([ce_dice_reference(logits[i : i + 1], labels[i : i + 1]) for i in range(3)])
    assert abs(loss - per_image) > 1e-4


def test_bce_dice_loss_equals_the_numpy_reference():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(3, 5, 7)), rng.integers(0, 2, (3, 5, 7))
    labels[1] = 0  # an image without a lesion
    loss = bce_dice(torch.from_numpy(logits), torch.from_numpy(labels)).item()
    assert abs(loss - bce_dice_reference(logits, labels)) < 1e-12


def test_segmentation_loss_is_bce_for_one_logit_and_ce_for_several():
    logits, labels = torch.randn(2, 1, 4, 4), torch.randint(0, 2, (2, 4, 4))
    assert segmentation_loss(logits, labels) == bce_dice(logits[:, 0], labels)
    logits = torch.randn(2, 3, 4, 4)
    assert segmentation_loss(logits, labels) == ce_dice(logits, labels)


def structure_reference(logits, labels):
    """Compute DS-TransUNet's loss pixel by pixel; padding counts as neighbours of label 0."""
    losses = []
    for logit, truth in zip(logits, labels, strict=True):
        padded = np.pad(truth, 15)
        local = np.array(
            [[padded[y : y + 31, x : x + 31].mean() for x in range(truth.shape[1])] for y in range(truth.shape[0])]
        )
        weight = 1 + 5 * np.abs(local - truth)
        p = 1 / (1 + np.exp(-logit))
        both, either = (weight * p * truth).sum(), (weight * (p + truth)).sum()
        losses.append(1 - (both + 1) / (either - both + 1))
    p = 1 / (1 + np.exp(-logits))
    return -(labels * np.log(p) + (1 - labels) * np.log(1 - p)).mean() + np.mean(losses)


def test_structure_loss_equals_the_numpy_reference():
    random = np.random.default_rng(0)
    logits, labels = random.normal(size=(2, 20, 24)), random.integers(0, 2, (2, 20, 24))
    labels[0, :, :12] = 1
    expected = structure_reference(logits, labels)
    loss = structure(torch.from_numpy(logits), torch.from_numpy(labels))
    np.testing.assert_allclose(loss, expected, rtol=1e-12)  # float64: the order of summation
    ours = segmentation_loss(
        torch.from_numpy(logits)[:, None], torch.from_numpy(labels), None, LossSpec(binary="structure")
    )
    np.testing.assert_allclose(ours, expected, rtol=1e-12)


def test_auxiliary_heads_and_the_share_of_the_cross_entropy_are_weighted():
    random = np.random.default_rng(0)
    outputs = tuple(torch.from_numpy(random.normal(size=(2, 3, 8, 8))).float() for _ in range(3))
    labels = torch.from_numpy(random.integers(0, 3, (2, 8, 8)))
    single = [ce_dice(logits, labels) for logits in outputs]
    loss = segmentation_loss(outputs, labels, None, LossSpec(auxiliary=0.2))
    torch.testing.assert_close(loss, 0.6 * single[0] + 0.2 * single[1] + 0.2 * single[2])
    entropy = torch.nn.functional.cross_entropy(outputs[0], labels)
    swin = segmentation_loss(outputs[0], labels, None, LossSpec(cross_entropy=0.4))
    torch.testing.assert_close(swin, 0.4 * entropy + 0.6 * (2 * single[0] - entropy))
    with pytest.raises(ValueError, match="loss"):
        LossSpec(cross_entropy=1.1)
    with pytest.raises(ValueError, match="loss"):
        LossSpec(auxiliary=0.5)
