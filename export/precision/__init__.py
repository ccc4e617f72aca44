"""Precisions: calibration, quantisation, fp16 and bf16, and the layers that stay in float."""
