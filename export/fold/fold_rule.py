"""What every folding rule uses: its result, the layers that it applies to, and rounded constants."""

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

Layer = TypeVar("Layer", bound=nn.Module)


@dataclass(frozen=True, kw_only=True, slots=True)
class FoldResult:
    """How many layers a rule changed, or why it changed none."""

    count: int = 0
    reason: str = ""

    def __post_init__(self) -> None:
        if (self.count > 0) == bool(self.reason) or self.count < 0:
            raise ValueError(f"a rule that changed {self.count} layers cannot give {self.reason!r} as its reason")


def counted(count: int, reason: str) -> FoldResult:
    """Return the result of a rule; ``reason`` is used only where ``count`` is 0."""
    return FoldResult(count=count) if count else FoldResult(reason=reason)


def layers_of_type(model: nn.Module, kind: type[Layer]) -> list[tuple[nn.Module, str, Layer]]:
    """Return (parent, attribute, layer) for every layer of one class."""
    return [
        (parent, name, layer)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if isinstance(layer, kind)
    ]


def constant(values: Tensor, like: Tensor) -> nn.Parameter:
    """Return float64 values rounded once to the type of the original weight."""
    return nn.Parameter(values.detach().to(like.dtype), requires_grad=False)


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """Return a linear layer that shares these tensors."""
    rows, columns = weight.shape
    layer = nn.Linear(columns, rows, bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer


def stacked(*layers: nn.Linear) -> nn.Linear:
    """Return one linear layer whose output is the concatenated outputs of ``layers``; all or none have a bias."""
    weights: list[Tensor] = [layer.weight for layer in layers]
    biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
    return linear(torch.cat(weights), torch.cat(biases) if biases else None)
