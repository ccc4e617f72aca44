"""Count what the block or its replacement costs for one image."""

from dataclasses import dataclass

from torch import nn

from medseg_trt.export.fold.layers import Attend
from medseg_trt.network_spec import NetworkSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class InsertCost:
    """The cost of what the tokens pass between the transformer and ``encoder_norm``."""

    macs: int  # multiply-accumulates of one image
    bytes: int  # of the weights in float32


def insert_cost(insert: nn.Module, model: NetworkSpec) -> InsertCost:
    """Return the cost of a folded block or of a replacement.

    Args:
        insert: made of linear layers and ``Attend``.
        model: the network that it stands in.
    """
    rows, columns = model.grid
    tokens = rows * columns
    macs = sum(layer.weight.numel() * tokens for layer in insert.modules() if isinstance(layer, nn.Linear))
    if model.block is not None:
        heads = sum(layer.num_heads for layer in insert.modules() if isinstance(layer, Attend))
        macs += 2 * heads * model.block.head_dim * tokens**2
    return InsertCost(macs=macs, bytes=4 * sum(weight.numel() for weight in insert.parameters()))
