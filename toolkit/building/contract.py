"""What the graphs of a build must be: facts of the checkpoint, which no choice of images can change."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from medseg_trt.network_spec import NetworkSpec
from medseg_trt.spec import Classes, Preprocessing

if TYPE_CHECKING:
    from medseg_trt.train.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True, slots=True)
class Contract:
    """The network, how its input is made of an image, and what its labels mean."""

    model: NetworkSpec
    preprocessing: Preprocessing
    classes: Classes

    @classmethod
    def of(cls, checkpoint: "Checkpoint") -> "Contract":
        """Return the contract of a checkpoint."""
        return cls(model=checkpoint.spec, preprocessing=checkpoint.preprocessing, classes=checkpoint.classes)
