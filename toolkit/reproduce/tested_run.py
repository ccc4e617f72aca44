"""Test a finished run once: its scores are stored beside the digest of the checkpoint that they are of."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg_trt.devices import AUTO
from medseg_trt.errors import UsageError
from medseg_trt.files import sha256, write_json
from medseg_trt.imaging.segment import Run

if TYPE_CHECKING:
    from medseg_trt.train.checkpoint import Checkpoint

BATCH = 8  # of the paper's validation and test of lesions; unext_batch depends on it


def stored_scores(path: Path, best: Path, test: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the stored scores of a checkpoint, after testing it where there are none.

    Args:
        path: of the scores.
        best: the checkpoint.
        test: returns the scores as plain data.

    Raises:
        UsageError: the stored scores are of another checkpoint.
    """
    if not path.is_file():
        write_json(path, {"checkpoint": sha256(best), **test()})
    stored = json.loads(path.read_text(encoding="utf-8"))
    if stored["checkpoint"] != sha256(best):
        raise UsageError(f"{path} is of another {best.name}; remove it, and type the same command again")
    return stored


def tested_network(best: Path) -> "tuple[Checkpoint, Run]":
    """Return a checkpoint, and its network on the GPU that PyTorch has, else on the CPU."""
    from medseg_trt.train.checkpoint import load_checkpoint
    from medseg_trt.train.models.model import runner
    from medseg_trt.train.torch_device import torch_device

    checkpoint = load_checkpoint(best)
    return checkpoint, runner(checkpoint.model().to(torch_device(AUTO)))
