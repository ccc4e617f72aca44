"""The layer of the narrow rungs: a LLaMA layer in a few directions of the language model's space.

With ``t`` a token, ``D`` the language model's width and ``r`` the layer's, the layer computes

- ``q, k, v = sqrt(D) W t / |R t|``, with ``|R t| = |M1 t|``, so that the first norm needs no vector of width ``D``
- ``h = P t + O attention(q, k, v) + b``, the block's sum after attention in ``r`` directions
- ``z = h / rms(h)``, ``s = silu(G z) * U z``, and ``A z + B s + c``
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from medseg_trt.export.fold.layers import Attend, InverseRMS, SwiGLU, WeightedRMSNorm


class NarrowLayer(nn.Module):
    """A LLaMA layer between the network's tokens and their normalised output.

    Args:
        project_in: one matrix for ``[P t | R t | W t]``.
        inverse_rms: of ``R t``.
        attend: attention over the kept heads.
        heads_out: ``O`` and ``b``.
        norm: of ``h``.
        gate_up: ``[G | U]``.
        hidden_out: ``A`` and ``c``.
        neurons_out: ``B``.
    """

    def __init__(
        self,
        *,
        project_in: nn.Linear,
        inverse_rms: InverseRMS,
        attend: Attend,
        heads_out: nn.Linear,
        norm: WeightedRMSNorm,
        gate_up: nn.Linear,
        hidden_out: nn.Linear,
        neurons_out: nn.Linear,
    ) -> None:
        super().__init__()
        self.project_in = project_in
        self.inverse_rms = inverse_rms
        self.attend = attend
        self.heads_out = heads_out
        self.norm = norm
        self.gate_up = gate_up
        self.swiglu = SwiGLU()
        self.hidden_out = hidden_out
        self.neurons_out = neurons_out
        self.widths = heads_out.out_features, project_in.in_features  # of P t and R t

    def forward(self, tokens: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens width"]:
        """Return the tokens after the layer, up to their scale."""
        z, s = self.features(tokens)
        return self.hidden_out(z) + self.neurons_out(s)

    def features(
        self, tokens: Float[Tensor, "batch tokens width"]
    ) -> tuple[Float[Tensor, "batch tokens directions"], Float[Tensor, "batch tokens neurons"]]:
        """Return ``z`` and ``s``, of which the output is a linear function."""
        heads = self.project_in.out_features - sum(self.widths)
        projected, rooted, qkv = self.project_in(tokens).split([*self.widths, heads], dim=-1)
        hidden = projected + self.heads_out(self.attend(qkv * self.inverse_rms(rooted)))
        z = self.norm(hidden)
        return z, self.swiglu(self.gate_up(z))


def scaled_rms_norm(width: int, language_width: int, eps: float, dtype: torch.dtype) -> WeightedRMSNorm:
    """Return the norm of ``width`` directions of a wider space, outside of which a vector has nothing.

    It divides by the root mean square over ``width`` instead of over ``language_width``, which is
    ``rms_scale(width, language_width)`` times smaller than the wider norm's result; readers multiply by that.
    """
    ones = nn.Parameter(torch.ones(width, dtype=dtype), requires_grad=False)
    return WeightedRMSNorm(ones, eps * language_width / width)


def rms_scale(width: int, language_width: int) -> float:
    """Return what a vector normalised over ``width`` is multiplied by to be normalised over ``language_width``."""
    return (language_width / width) ** 0.5
