"""One LLaMA decoder layer as in LLM-TransUNet: frozen, on image tokens, by default without rotary embedding and mask.

Parameters have Hugging Face's names (``self_attn.q_proj.weight`` …), so a state dict is that of one Hugging Face
layer.
Sources: meta-llama/llama ``model.py``, class ``TransformerBlock``; Hugging Face ``modeling_llama.py``, class
``LlamaDecoderLayer``; Jiang & Liu 2024 (MIDL) for the two switches.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from medseg_trt.spec import BlockSpec, Parts


class RMSNorm(nn.Module):
    """Divide every token by its root mean square, then scale it by ``weight``.

    The mean is taken in float32 (float64 for float64 tokens), and the result is rounded to the tokens' type before it
    is scaled, as LLaMA does. ``eps`` is added to the mean square, not to the root.
    Source: Zhang & Sennrich 2019, eq. 4; meta-llama/llama ``model.py``, class ``RMSNorm``.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, tokens: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """Return the normalised tokens, in their own type."""
        return F.rms_norm(tokens, self.weight.shape, eps=self.eps) * self.weight


class LlamaAttention(nn.Module):
    """Grouped-query attention over all tokens, scaled by ``1 / sqrt(head_dim)``, without bias."""

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        self.spec = spec
        self.q_proj = nn.Linear(spec.hidden_size, spec.num_heads * spec.head_dim, bias=False)
        self.k_proj = nn.Linear(spec.hidden_size, spec.num_kv_heads * spec.head_dim, bias=False)
        self.v_proj = nn.Linear(spec.hidden_size, spec.num_kv_heads * spec.head_dim, bias=False)
        self.o_proj = nn.Linear(spec.num_heads * spec.head_dim, spec.hidden_size, bias=False)

    def forward(self, tokens: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens width"]:
        """Return the output before the residual sum."""
        query, key, value = (
            projection(tokens).unflatten(-1, (-1, self.spec.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )  # (batch, tokens, heads * head_dim) -> (batch, heads, tokens, head_dim)
        if self.spec.rotary:
            cos, sin = rotary_angles(tokens.shape[1], self.spec, query)
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        attended = F.scaled_dot_product_attention(
            query, key, value, is_causal=self.spec.causal, enable_gqa=self.spec.num_heads > self.spec.num_kv_heads
        )  # head i reads key/value head i // (num_heads / num_kv_heads); ONNX's Attention refuses it for equal numbers
        return self.o_proj(attended.transpose(1, 2).flatten(2))


class LlamaMLP(nn.Module):
    """A gated MLP per token: ``down(silu(gate(x)) * up(x))``, without bias."""

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(spec.hidden_size, spec.intermediate_size, bias=False)
        self.up_proj = nn.Linear(spec.hidden_size, spec.intermediate_size, bias=False)
        self.down_proj = nn.Linear(spec.intermediate_size, spec.hidden_size, bias=False)

    def forward(self, tokens: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens width"]:
        """Return the output before the residual sum."""
        return self.down_proj(F.silu(self.gate_proj(tokens)) * self.up_proj(tokens))


class LlamaBlock(nn.Module):
    """One pre-norm decoder layer: attention and a gated MLP, each with a residual sum.

    With ``spec.rotary`` off and ``spec.causal`` off, permuting the tokens permutes the output.

    Args:
        spec: its geometry.
        parts: "attention" or "mlp": only that half, with its norm and residual sum.
    """

    def __init__(self, spec: BlockSpec, parts: Parts = "full") -> None:
        super().__init__()
        self.spec = spec
        self.has_attention, self.has_mlp = parts != "mlp", parts != "attention"
        if self.has_attention:
            self.input_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
            self.self_attn = LlamaAttention(spec)
        if self.has_mlp:
            self.post_attention_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
            self.mlp = LlamaMLP(spec)

    def forward(self, tokens: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens width"]:
        """Return the tokens after the layer."""
        if self.has_attention:
            tokens = tokens + self.self_attn(self.input_layernorm(tokens))
        if self.has_mlp:
            tokens = tokens + self.mlp(self.post_attention_layernorm(tokens))
        return tokens


def rotary_angles(
    num_tokens: int, spec: BlockSpec, like: Tensor
) -> tuple[Float[Tensor, "tokens head_dim"], Float[Tensor, "tokens head_dim"]]:
    """Return cosine and sine of the rotary embedding for the positions 0 … ``num_tokens - 1``, in the type of ``like``.

    The angles are computed in float32, half-split: column ``i`` is paired with column ``i + head_dim / 2``.
    Source: Su et al. 2021 (RoFormer), eq. 15; Hugging Face ``modeling_llama.py``, class ``LlamaRotaryEmbedding``.
    """
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.float32, device=like.device) / spec.head_dim
    positions = torch.arange(num_tokens, dtype=torch.float32, device=like.device)
    angles = positions[:, None] / spec.rope_theta**exponents  # (tokens, head_dim / 2)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(
    heads: Float[Tensor, "batch heads tokens head_dim"],
    cos: Float[Tensor, "tokens head_dim"],
    sin: Float[Tensor, "tokens head_dim"],
) -> Float[Tensor, "batch heads tokens head_dim"]:
    """Rotate every pair of columns ``i`` and ``i + head_dim / 2`` by the token's angle."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-second, first), dim=-1) * sin
