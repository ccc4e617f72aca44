"""Keep the frozen language layers in another number type while a network is trained.

A frozen matrix needs no gradient and no optimiser state, but it has to be there, and its products' inputs and outputs
with it. In bfloat16 both take half the memory. It is a matter of training alone, its validations included: a checkpoint
names the block's file, and what is built or evaluated from it takes that file's values in float32. They differ by one
rounding of every weight, 2**-9 of it at most, and by those of the layers' activations.
"""

from collections.abc import Mapping

import torch

from medseg_trt.train.models.model import LanguageInsert
from medseg_trt.train.models.segmentation_model import SegmentationModel

FROZEN_DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def keep_frozen_in(model: SegmentationModel, name: str) -> None:
    """Bring the frozen layers of a network, which may have none, to the type that ``name`` is the key of."""
    if isinstance(model.insert, LanguageInsert):
        for layer in model.insert.layers:
            if not any(parameter.requires_grad for parameter in layer.parameters()):
                layer.to(FROZEN_DTYPES[name])
