"""Let the maps of two encoders exchange what they hold: DS-TransUNet's "Transformer Interactive Fusion".

Source: Lin et al. 2022, "DS-TransUNet"; TianBaoGe/DS-TransUNet ``lib/DS_TransUNet.py``, class ``Cross_Att``.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

COARSE_HEADS, COARSE_HEAD_DIM, COARSE_HIDDEN = 3, 32, 128
FINE_HEADS, FINE_HEAD_DIM, FINE_HIDDEN = 1, 64, 256


class Attention(nn.Module):
    """Global attention; queries, keys and values are one product without bias."""

    def __init__(self, width: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_qkv = nn.Linear(width, 3 * num_heads * head_dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(num_heads * head_dim, width))

    def forward(self, tokens: Tensor) -> Tensor:
        qkv = self.to_qkv(tokens).unflatten(2, (3, self.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # 3 of (b, heads, tokens, head_dim)
        return self.to_out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Transform every token on its own."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Identity(), nn.Linear(hidden, width))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.net(tokens)


class PreNorm(nn.Module):
    """A function of the normalised tokens, added to the tokens."""

    def __init__(self, width: int, function: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fn = function

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.fn(self.norm(tokens))


class Transformer(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, width: int, num_heads: int, head_dim: int, hidden: int) -> None:
        super().__init__()
        attention = PreNorm(width, Attention(width, num_heads, head_dim))
        self.layers = nn.ModuleList([nn.ModuleList([attention, PreNorm(width, FeedForward(width, hidden))])])

    def forward(self, tokens: Tensor) -> Tensor:
        for layer in self.layers:
            for branch in layer.children():
                tokens = branch(tokens)
        return tokens


class CrossScale(nn.Module):
    """Give each of two maps one token with the mean of the other, and a transformer layer over all its tokens."""

    def __init__(self, fine: int, coarse: int) -> None:
        super().__init__()
        self.transformer_s = Transformer(coarse, COARSE_HEADS, COARSE_HEAD_DIM, COARSE_HIDDEN)
        self.transformer_l = Transformer(fine, FINE_HEADS, FINE_HEAD_DIM, FINE_HIDDEN)
        self.norm_s, self.norm_l = nn.LayerNorm(coarse), nn.LayerNorm(fine)
        self.linear_s, self.linear_l = nn.Linear(coarse, fine), nn.Linear(fine, coarse)

    def forward(
        self, fine: Float[Tensor, "batch fine rows columns"], coarse: Float[Tensor, "batch coarse fewer narrower"]
    ) -> tuple[Float[Tensor, "batch fine rows columns"], Float[Tensor, "batch coarse fewer narrower"]]:
        """Return both maps after the exchange."""
        fine_tokens, coarse_tokens = (features.flatten(2).transpose(1, 2) for features in (fine, coarse))
        of_fine = self.linear_l(self.norm_l(fine_tokens).mean(1, keepdim=True))
        of_coarse = self.linear_s(self.norm_s(coarse_tokens).mean(1, keepdim=True))
        coarse_tokens = self.transformer_s(torch.cat([of_fine, coarse_tokens], dim=1))[:, 1:]
        fine_tokens = self.transformer_l(torch.cat([of_coarse, fine_tokens], dim=1))[:, 1:]
        return (
            fine_tokens.transpose(1, 2).unflatten(2, fine.shape[2:]),
            coarse_tokens.transpose(1, 2).unflatten(2, coarse.shape[2:]),
        )
