"""Put a replacement in the place of the block of a folded network."""

import copy
from itertools import chain

from torch import nn

from medseg_trt.export.fold.language import tabulate_rotary
from medseg_trt.train.models.segmentation_model import SegmentationModel


def with_replacement(folded: SegmentationModel, replacement: nn.Module) -> SegmentationModel:
    """Return a copy of a folded network with a replacement of its block; it shares the tensors of both.

    The replacement's output has a variance of 1, beside which the eps of ``encoder_norm`` is nothing.
    """
    shared: dict[int, object] = {id(tensor): tensor for tensor in chain(folded.parameters(), folded.buffers())}
    shared[id(folded.insert)] = replacement
    network = copy.deepcopy(folded, shared).eval()
    tabulate_rotary(network)
    return network
