"""Run a checkpoint with PyTorch, eagerly and in float32: the reference for every other session."""

import torch
from jaxtyping import Float32
from numpy import ndarray

from medseg_trt.session import Session
from medseg_trt.train.model import runner
from medseg_trt.train.transunet import TransUNet


class PyTorchSession(Session):
    """A PyTorch network in evaluation mode."""

    backend = "pytorch"

    def __init__(self, model: TransUNet) -> None:
        self._run = runner(model)
        self.device = str(next(model.parameters()).device).upper()
        self.description = f"PyTorch {torch.__version__} fp32"

    def run(self, batch: Float32[ndarray, "batch 3 height width"]) -> Float32[ndarray, "batch classes height width"]:
        """Return the logits of a batch of prepared images."""
        return self._run(batch)

    def close(self) -> None:
        """Free the network."""
        del self._run
