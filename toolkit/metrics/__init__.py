"""Metrics of masks: Dice and IoU, Hausdorff distance, evaluation protocols, confidence intervals."""
