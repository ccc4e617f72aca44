"""The layers of a folded network that replace others: fewer and wider matrix products.

A decoder layer is one or two residual branches, ``x + project_out(mix(project_in(norm(x))))``, with attention or a gate
between two matrix products. ``mapper1`` can include the projections of the first branch, and the output of the last
branch can have the network's width.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from medseg_trt.spec import BlockSpec
from medseg_trt.train.block.llama import rotary_angles, rotate
from medseg_trt.train.models.swin import WindowAttention


class WeightedRMSNorm(nn.Module):
    """The RMSNorm of ``train.block.llama`` as one operator with its weight, which is traced to one node."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps

    def forward(self, tokens: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """Return the normalised and scaled tokens."""
        return F.rms_norm(tokens, self.weight.shape, self.weight, self.eps)


class InverseRMS(nn.Module):
    """The factor by which an RMSNorm multiplies a token: ``1 / sqrt(mean(token ** 2) + eps)``."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, tokens: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch 1"]:
        """Return one factor per token."""
        return torch.rsqrt((tokens * tokens).mean(-1, keepdim=True) + self.eps)


class Rotary(nn.Module):
    """The rotary embedding; its angles are computed at every call."""

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, heads: Float[Tensor, "batch heads tokens head_dim"]) -> Tensor:
        """Return the rotated heads."""
        return rotate(heads, *rotary_angles(heads.shape[2], self.spec, heads))


class RotaryTable(nn.Module):
    """The rotary embedding for a fixed number of tokens, with cosines and sines as constants."""

    cos: Tensor  # (tokens, head_dim)
    sin: Tensor

    def __init__(self, cos: Float[Tensor, "tokens head_dim"], sin: Float[Tensor, "tokens head_dim"]) -> None:
        super().__init__()
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)

    def forward(self, heads: Float[Tensor, "batch heads tokens head_dim"]) -> Tensor:
        """Return the rotated heads."""
        return rotate(heads, self.cos, self.sin)


class Attend(nn.Module):
    """Attention over one tensor of queries, keys and values, ``[q | k | v]`` on the last axis, head by head.

    Args:
        num_heads: of the queries.
        num_kv_heads: of the keys and of the values.
        causal: a token attends only to itself and earlier tokens.
        rotary: rotates queries and keys; None: they are not rotated.
    """

    def __init__(
        self, num_heads: int, num_kv_heads: int, *, causal: bool = False, rotary: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.causal = causal
        self.rotary = rotary

    def forward(self, qkv: Float[Tensor, "batch tokens projected"]) -> Float[Tensor, "batch tokens collected"]:
        """Return the attention output, with the heads joined on the last axis."""
        counts = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        head_dim = qkv.shape[-1] // sum(counts)
        query, key, value = (
            part.unflatten(-1, (-1, head_dim)).transpose(1, 2)  # (b, 256, 4096) -> (b, 32, 256, 128)
            for part in qkv.split([count * head_dim for count in counts], dim=-1)
        )
        if self.rotary is not None:
            query, key = self.rotary(query), self.rotary(key)
        collected = F.scaled_dot_product_attention(
            query, key, value, is_causal=self.causal, enable_gqa=self.num_heads > self.num_kv_heads
        )
        return collected.transpose(1, 2).flatten(2)


class TabulatedWindowAttention(WindowAttention):
    """Attention in windows whose biases and masks are one constant."""

    def __init__(self, layer: WindowAttention) -> None:
        nn.Module.__init__(self)
        self.num_heads, self.num_windows = layer.num_heads, layer.num_windows
        self.qkv, self.proj = layer.qkv, layer.proj
        self.register_buffer("table", layer.bias().detach())

    def bias(self) -> Float[Tensor, "1 heads tokens tokens"]:
        """Return the constant."""
        return self.get_buffer("table")


class SwiGLU(nn.Module):
    """``silu(gate) * up`` of one tensor ``[gate | up]``."""

    def forward(self, gate_up: Float[Tensor, "*batch double"]) -> Float[Tensor, "*batch width"]:
        """Return the gated values, half as wide as the input."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up


class Branch(nn.Module):
    """One residual branch of a decoder layer, without the sum."""

    def __init__(self, norm: nn.Module, project_in: nn.Module, mix: nn.Module, project_out: nn.Linear) -> None:
        super().__init__()
        self.norm = norm
        self.project_in = project_in
        self.mix = mix
        self.project_out = project_out

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the addend; where ``norm`` and ``project_in`` are folded away, ``tokens`` are already projected."""
        return self.project_out(self.mix(self.project_in(self.norm(tokens))))


class FoldedInsert(nn.Module):
    """``LanguageInsert`` as residual branches between its two maps.

    The output of ``mapper1`` may be ``[mapped tokens | projections of the first branch]``; then ``inverse_rms``
    completes the norm of that branch. The output of ``last_branch`` has the network's width and is added after
    ``mapper2``.
    """

    def __init__(
        self,
        mapper1: nn.Linear,
        branches: Iterable[Branch],
        final_norm: nn.Module,
        mapper2: nn.Linear,
        *,
        inner_residual: bool,
        outer_residual: bool,
    ) -> None:
        super().__init__()
        self.language_width = mapper1.out_features
        self.mapper1 = mapper1
        self.inverse_rms: InverseRMS | None = None
        self.branches = nn.ModuleList(branches)
        self.last_branch: Branch | None = None
        self.final_norm = final_norm
        self.mapper2 = mapper2
        self.inner_residual, self.outer_residual = inner_residual, outer_residual

    def forward(self, tokens: Float[Tensor, "batch tokens hidden"]) -> Float[Tensor, "batch tokens hidden"]:
        """Return the tokens after the language model."""
        mapped = entering = self.mapper1(tokens)
        if self.inverse_rms is not None:
            widths = [self.language_width, self.mapper1.out_features - self.language_width]
            mapped, projected = mapped.split(widths, dim=-1)
            entering = projected * self.inverse_rms(mapped)
        passing = mapped
        for branch in self.branches:
            passing = entering = passing + branch(entering)
        output = self.final_norm(passing)
        if self.inner_residual:
            output = output + mapped
        output = self.mapper2(output)
        if self.last_branch is not None:
            output = output + self.last_branch(entering)
        return tokens + output if self.outer_residual else output
