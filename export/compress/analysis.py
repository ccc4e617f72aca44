"""Describe what the frozen block does in one trained network: how far it is from one affine map, and why.

Sources: Roy & Vetterli 2007, "The effective rank", for the effective rank; Bai et al. 2025 (AAAI), "Frozen Language
Models Are Gradient Coherence Rectifiers in Vision Transformers", who find that the gain is one of the training.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from medseg_trt.export.compress.affine import fit_affine
from medseg_trt.export.compress.held_out import HeldOutError, held_out_error
from medseg_trt.export.compress.narrow import NarrowFit
from medseg_trt.export.compress.tokens import BlockTokens, Tokens
from medseg_trt.train.block.llama import LlamaAttention, rotary_angles, rotate
from medseg_trt.train.models.model import LanguageInsert


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockAnalysis:
    """What a block does to the tokens of calibration images; shares are 0 … 1."""

    tokens: int  # measured
    held_out_tokens: int  # of the affine map's error
    common_energy: float  # share of the energy of the RMS-normalised input that lies in its mean direction
    attention_uniformity: float  # mean entropy of the attention weights, relative to that of equal weights
    effective_rank: float  # of the centred normalised sum after attention: exp of its spectrum's entropy
    language_width: int  # the largest possible rank
    affine: HeldOutError  # of the best affine map in place of the block


def analyse_block(insert: LanguageInsert, tokens: BlockTokens) -> BlockAnalysis:
    """Return the analysis of a block of one LLaMA layer with attention and MLP.

    Args:
        insert: the block between its maps.
        tokens: that enter it; the affine map is fitted to the first and measured on the second half.

    Raises:
        UsageError: there are too few tokens.
    """
    affine = held_out_error(fit_affine(insert, tokens.fitted), insert, tokens.held_out)
    (layer,) = insert.layers
    with torch.no_grad():
        return BlockAnalysis(
            tokens=tokens.count,
            held_out_tokens=tokens.held_out_count,
            common_energy=common_energy(insert.mapper1(tokens.fitted).double()),
            attention_uniformity=attention_uniformity(insert, tokens.fitted),
            effective_rank=effective_rank(_covariance_after_attention(insert, tokens.fitted)),
            language_width=layer.spec.hidden_size,
            affine=affine,
        )


def common_energy(tokens: Float64[Tensor, "images tokens width"]) -> float:
    """Return the share of the energy of the RMS-normalised tokens that their mean has."""
    directions = tokens / tokens.norm(dim=-1, keepdim=True)
    return float(directions.mean((0, 1)).square().sum())


def effective_rank(covariance: Float64[Tensor, "width width"]) -> float:
    """Return the exponential of the entropy of the eigenvalues, as shares of their sum."""
    values = torch.linalg.eigvalsh(covariance).clamp(min=0)
    shares = values[values > 0] / values.sum()
    return float(torch.exp(-(shares * shares.log()).sum()))


def attention_uniformity(insert: LanguageInsert, tokens: Tokens) -> float:
    """Return the mean entropy of the attention weights over images, heads and queries, relative to equal weights.

    A query that sees one token only, as the first of a causal mask, is left out.
    """
    (layer,) = insert.layers
    entropies = list[Tensor]()
    for image in tokens:
        weights = attention_weights(layer.self_attn, layer.input_layernorm(insert.mapper1(image[None])))
        visible = (weights > 0).sum(-1)
        entropy = torch.special.entr(weights).sum(-1)
        entropies.append((entropy / visible.log())[visible > 1])
    return float(torch.cat(entropies).mean())


def attention_weights(attention: LlamaAttention, tokens: Tensor) -> Float64[Tensor, "images heads queries keys"]:
    """Return the weights with which every head of the block sums values, in float64."""
    spec, count = attention.spec, tokens.shape[1]
    query, key = (
        projection(tokens).double().unflatten(-1, (-1, spec.head_dim)).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj)
    )
    if spec.rotary:
        cos, sin = rotary_angles(count, spec, query)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    scores = query @ key.repeat_interleave(spec.num_heads // spec.num_kv_heads, 1).mT / spec.head_dim**0.5
    if spec.causal:
        scores = scores.masked_fill(torch.ones(count, count, dtype=torch.bool).triu(1), -torch.inf)
    return scores.softmax(-1)


def _covariance_after_attention(insert: LanguageInsert, tokens: Tokens) -> Float64[Tensor, "width width"]:
    fit = NarrowFit(insert, tokens)
    rows = [fit.inner_values(image).hidden for image in tokens]
    directions = torch.cat([hidden / hidden.norm(dim=-1, keepdim=True) for hidden in rows])
    return torch.cov(directions.T)
