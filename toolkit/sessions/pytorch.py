"""Run a checkpoint with PyTorch, eagerly and in float32: the reference for every other session."""

from pathlib import Path

import torch
from jaxtyping import Float32
from numpy import ndarray

from medseg_trt.sessions.base import Session
from medseg_trt.train.checkpoint import Checkpoint, load_checkpoint
from medseg_trt.train.models.model import runner
from medseg_trt.train.models.transunet import TransUNet


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


def open_graph(path: Path, precision: str, threads: int | None, compute: str) -> PyTorchSession:
    """Open a checkpoint as the other modules open a graph, so that a child process can hold it, too.

    Args:
        path: the checkpoint.
        precision: fp32; the reference has no other.
        threads: CPU threads; None leaves it to PyTorch.
        compute: fp32.

    Raises:
        ArtefactError: the checkpoint cannot be used.
    """
    assert precision == compute == "fp32"
    if threads is not None:
        torch.set_num_threads(threads)
    return PyTorchSession(load_checkpoint(path).model())


def open_reference(checkpoint: Checkpoint) -> Session:
    """Open the checkpoint's own PyTorch network, in float32 on the CPU: what everything else is compared with."""
    return PyTorchSession(checkpoint.model())
