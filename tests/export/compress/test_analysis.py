"""The figures of the block analysis, on generated tokens of which each is known."""

import pytest
import torch
from generated_block import GEOMETRY, TOKENS, common_direction, generated_insert, generated_tokens

from medseg_trt.export.compress.analysis import (
    analyse_block,
    attention_uniformity,
    attention_weights,
    common_energy,
    effective_rank,
)
from medseg_trt.export.compress.tokens import BlockTokens
from medseg_trt.spec import BlockSpec


def test_the_common_energy_of_one_direction_is_all_and_of_noise_none() -> None:
    one = common_direction().expand(2, 3, -1) * torch.tensor([1.0, 2.0, 3.0])[:, None]
    assert common_energy(one) == pytest.approx(1)
    opposite = torch.stack([one[0, 0], -one[0, 0]])[None]
    assert common_energy(opposite) == pytest.approx(0)
    # Tokens of unit noise beside a common direction of length L (in RMS) have the share L^2 / (L^2 + 1), about.
    length = float(common_direction().square().mean()) ** 0.5 * 4
    assert common_energy(generated_tokens()) == pytest.approx(length**2 / (length**2 + 1), abs=0.02)


def test_the_effective_rank_counts_equal_directions() -> None:
    assert effective_rank(torch.diag(torch.tensor([2.0] * 5 + [0.0] * 4, dtype=torch.float64))) == pytest.approx(5)
    assert effective_rank(torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))) == pytest.approx(1)


def test_attention_without_queries_is_uniform_and_sharp_attention_is_not() -> None:
    block, tokens = generated_insert(), generated_tokens()
    attention = block.layers[0].self_attn
    with torch.no_grad():
        attention.q_proj.weight *= 20
        sharp = attention_uniformity(block, tokens)
        attention.q_proj.weight.zero_()
        assert attention_uniformity(block, tokens) == pytest.approx(1)
    assert sharp < 0.5


@pytest.mark.parametrize("causal", [False, True])
def test_the_weights_are_those_that_the_block_uses(causal: bool) -> None:
    spec = BlockSpec(hidden_size=32, intermediate_size=48, num_heads=4, num_kv_heads=2, head_dim=8, causal=causal)
    attention, tokens = generated_insert(spec).layers[0].self_attn, generated_tokens(width=32)[:1]
    with torch.no_grad():
        values = attention.v_proj(tokens).unflatten(-1, (-1, 8)).transpose(1, 2).repeat_interleave(2, 1)
        collected = (attention_weights(attention, tokens) @ values).transpose(1, 2).flatten(2)
        assert torch.allclose(attention.o_proj(collected), attention(tokens), atol=1e-12)


def test_the_analysis_of_a_block_counts_its_tokens_and_knows_its_width() -> None:
    tokens = BlockTokens(fitted=generated_tokens(), held_out=generated_tokens(seed=1)[:4])
    analysis = analyse_block(generated_insert(), tokens)
    assert analysis.tokens == 12 * TOKENS
    assert analysis.held_out_tokens == 4 * TOKENS
    assert analysis.language_width == GEOMETRY.hidden_size
    assert 1 < analysis.effective_rank < GEOMETRY.hidden_size
    assert 0 < analysis.affine.relative < 1
