"""The losses against their formulas, written out a second time in NumPy."""

import numpy as np
import torch

from medseg_trt.train.losses import bce_dice, ce_dice, segmentation_loss

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


def test_several_classes():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(3, 4, 5, 7)), rng.integers(0, 4, (3, 5, 7))
    found = ce_dice(torch.from_numpy(logits), torch.from_numpy(labels)).item()
    # float64: only the order of summation differs. Dice per image instead of per batch is off by 1e-2 here.
    assert abs(found - ce_dice_reference(logits, labels)) < 1e-12
    per_image = np.mean([ce_dice_reference(logits[i : i + 1], labels[i : i + 1]) for i in range(3)])
    assert abs(found - per_image) > 1e-4


def test_one_class():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(3, 5, 7)), rng.integers(0, 2, (3, 5, 7))
    labels[1] = 0  # an image without a lesion
    found = bce_dice(torch.from_numpy(logits), torch.from_numpy(labels)).item()
    assert abs(found - bce_dice_reference(logits, labels)) < 1e-12


def test_the_number_of_logits_chooses():
    logits, labels = torch.randn(2, 1, 4, 4), torch.randint(0, 2, (2, 4, 4))
    assert segmentation_loss(logits, labels) == bce_dice(logits[:, 0], labels)
    logits = torch.randn(2, 3, 4, 4)
    assert segmentation_loss(logits, labels) == ce_dice(logits, labels)
