"""medseg-trt: medical image segmentation with a frozen LLaMA block, from training to a verified, portable bundle."""

__version__ = "0.1.0"
