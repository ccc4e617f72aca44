"""Blocks and tokens whose best replacement is known; all generated, from seeds."""

import torch
from torch import Tensor, nn

from medseg_trt.export.compress.tokens import normalised
from medseg_trt.spec import BlockSpec, InsertSpec
from medseg_trt.train.models.model import LanguageInsert

WIDTH, IMAGES, TOKENS = 24, 12, 40
GEOMETRY = BlockSpec(hidden_size=32, intermediate_size=48, num_heads=4, num_kv_heads=2, head_dim=8)


def generated_tokens(seed: int = 0, offset: float = 4.0, width: int = WIDTH) -> Tensor:
    """Return tokens (IMAGES, TOKENS, width) in float64: a common direction of length ``offset`` and unit noise."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(IMAGES, TOKENS, width, generator=generator, dtype=torch.float64)
    return normalised(noise) + offset * common_direction(width)


def common_direction(width: int = WIDTH) -> Tensor:
    """Return the direction that all generated tokens share: ones, of a mean that is not zero, and a ramp."""
    return torch.linspace(0.5, 1.5, width, dtype=torch.float64)


class PermutedNoise(nn.Module):
    """A block that is affine after normalisation: it removes the common direction and permutes the channels.

    The tokens that remain have mean 0 and variance 1, so their normalised output is the permutation itself. Every token
    is then scaled by another factor, which the normalisation undoes.
    """

    def __init__(self, offset: float = 4.0) -> None:
        super().__init__()
        self.offset = offset
        self.permutation = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(7))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the permuted noise, every token with a scale of its own."""
        noise = (tokens - self.offset * common_direction())[..., self.permutation]
        return noise * (1 + tokens[..., :1].abs())


def generated_insert(spec: BlockSpec = GEOMETRY, insert: InsertSpec | None = None, std: float = 0.2) -> LanguageInsert:
    """Return a language block of seeded random weights in float64, with norm weights that matter."""
    torch.manual_seed(3)
    block = LanguageInsert(WIDTH, spec, insert).double().eval()
    with torch.no_grad():
        for weight in block.parameters():
            if weight.dim() > 1:
                weight.normal_(0, std)
            else:
                weight.uniform_(0.5, 1.5)
    return block
