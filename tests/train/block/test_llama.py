"""The LLaMA layer: with rotary embedding and mask that of transformers, without them that of the paper, in NumPy."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from medseg_trt.spec import BlockSpec
from medseg_trt.train.block import llama
from medseg_trt.train.block.llama import LlamaBlock, RMSNorm

GEOMETRIES = {
    "multi-head": BlockSpec(hidden_size=64, intermediate_size=96, num_heads=4, num_kv_heads=4, head_dim=16),
    "grouped-query": BlockSpec(
        hidden_size=96,
        intermediate_size=160,
        num_heads=6,
        num_kv_heads=2,
        head_dim=16,
        rms_norm_eps=1e-5,
        rope_theta=1e5,
    ),
    "wide heads": BlockSpec(hidden_size=48, intermediate_size=64, num_heads=4, num_kv_heads=1, head_dim=32),
}
# Everything is of size 1 and rounded to float32 some ten times; 2.5e-6 is the most that was measured.
FLOAT32 = 1e-5
# Sums of at most 160 products of size 1, each rounded at 1.1e-16; 5e-15 is the most that was measured.
FLOAT64 = 1e-10


def random_layer(spec: BlockSpec) -> LlamaBlock:
    """Return a layer whose weights leave everything at size 1, and whose norms are not ones."""
    generator = torch.Generator().manual_seed(7)
    layer = LlamaBlock(spec).requires_grad_(False)
    for name, weight in layer.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        weight.copy_(1 + 0.2 * noise if "norm" in name else noise / weight.shape[1] ** 0.5)
    return layer.eval()


def random_tokens(spec: BlockSpec, count: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(2, count, spec.hidden_size, generator=torch.Generator().manual_seed(count))


def transformers_answer(layer: LlamaBlock, tokens: torch.Tensor) -> torch.Tensor:
    """Return what transformers' model of one LlamaDecoderLayer makes of the tokens, before its final norm."""
    spec = layer.spec
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        rms_norm_eps=spec.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": spec.rope_theta},
    )
    model = LlamaModel(config).eval()
    model.set_attn_implementation("eager")
    setattr(model, "norm", torch.nn.Identity())  # noqa: B010  # pyright knows only the type that it had
    model.layers[0].load_state_dict(layer.state_dict())
    with torch.inference_mode():
        return model(inputs_embeds=tokens, use_cache=False).last_hidden_state


def forward(layer: LlamaBlock, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return layer(tokens)


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()


@pytest.mark.parametrize("scale", [1.0, 1e-2])  # small tokens find a wrong eps
@pytest.mark.parametrize("count", [1, 2, 17, 49])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_with_rotary_and_mask_it_is_the_layer_of_transformers(geometry, count, scale):
    layer = random_layer(replace(GEOMETRIES[geometry], rotary=True, causal=True))
    tokens = random_tokens(layer.spec, count, scale)
    assert difference(forward(layer, tokens), transformers_answer(layer, tokens)) < FLOAT32


def rotate_neighbours(heads, cos, sin):
    """Turn columns 2i and 2i + 1 together, as Meta's and llama.cpp's weights want it."""
    cos, sin = (angles.chunk(2, dim=-1)[0].repeat_interleave(2, dim=-1) for angles in (cos, sin))
    pairs = heads.unflatten(-1, (-1, 2))
    return heads * cos + torch.stack((-pairs[..., 1], pairs[..., 0]), dim=-1).flatten(-2) * sin


def attend_to_the_wrong_group(query, key, value, **switches):
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat(1, groups, 1, 1), value.repeat(1, groups, 1, 1)  # head i reads i modulo, not i divided
    return ATTENTION(query, key, value, **{**switches, "enable_gqa": False})


ATTENTION = F.scaled_dot_product_attention
FAULTS = {  # changes of the spec, or a function of llama.py that is replaced
    "no rotary": {"rotary": False},
    "no mask": {"causal": False},
    "no eps": {"rms_norm_eps": 1e-20},
    "eps of another model": {"rms_norm_eps": 1e-6},
    "theta of another model": {"rope_theta": 1e4},
    "neighbouring pairs turned": (llama, "rotate", rotate_neighbours),
    "key/value heads in the wrong order": (F, "scaled_dot_product_attention", attend_to_the_wrong_group),
    "no scaling of the scores": (
        F,
        "scaled_dot_product_attention",
        lambda query, *rest, **switches: ATTENTION(query, *rest, **switches, scale=1.0),
    ),
    "GELU for SiLU": (F, "silu", F.gelu),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_llama_block_exceeds_the_tolerance(fault, monkeypatch):
    layer = random_layer(replace(GEOMETRIES["grouped-query"], rotary=True, causal=True))
    tokens = random_tokens(layer.spec, 17, scale=1e-2)
    expected = transformers_answer(layer, tokens)
    match FAULTS[fault]:
        case dict(changes):
            broken = LlamaBlock(replace(layer.spec, **changes))
            broken.load_state_dict(layer.state_dict())
        case module, name, function:
            monkeypatch.setattr(module, name, function)
            broken = layer
    assert difference(forward(broken, tokens), expected) > 100 * FLOAT32


def numpy_answer(layer: LlamaBlock, tokens: np.ndarray, eps: float) -> np.ndarray:
    """Compute the layer of the paper, without rotary embedding and mask, one head after the other in float64."""
    spec = layer.spec
    weights = {name: value.numpy().astype(np.float64) for name, value in layer.state_dict().items()}

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weights[f"{name}.weight"]

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T

    normed, collected = norm(tokens, "input_layernorm"), []
    query, key, value = (linear(normed, f"self_attn.{name}_proj") for name in "qkv")
    for head in range(spec.num_heads):
        shared = head * spec.num_kv_heads // spec.num_heads
        own, theirs = (slice(i * spec.head_dim, (i + 1) * spec.head_dim) for i in (head, shared))
        scores = query[..., own] @ key[..., theirs].swapaxes(-1, -2) / np.sqrt(spec.head_dim)
        exponentials = np.exp(scores - scores.max(-1, keepdims=True))
        collected.append(exponentials / exponentials.sum(-1, keepdims=True) @ value[..., theirs])
    tokens = tokens + linear(np.concatenate(collected, -1), "self_attn.o_proj")
    normed = norm(tokens, "post_attention_layernorm")
    gate = linear(normed, "mlp.gate_proj")
    return tokens + linear(gate / (1 + np.exp(-gate)) * linear(normed, "mlp.up_proj"), "mlp.down_proj")


@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize("count", [1, 4, 49])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_llama_block_without_rotary_and_mask_matches_numpy_float64(geometry, count, scale):
    layer = random_layer(GEOMETRIES[geometry]).double()
    tokens = random_tokens(layer.spec, count, scale).double()
    output = forward(layer, tokens).numpy()
    assert np.abs(output - numpy_answer(layer, tokens.numpy(), layer.spec.rms_norm_eps)).max() < FLOAT64
    assert np.abs(output - numpy_answer(layer, tokens.numpy(), eps=0.0)).max() > 1e3 * FLOAT64


@pytest.mark.parametrize(("rotary", "causal"), [(False, False), (True, False), (False, True), (True, True)])
def test_only_without_rotary_and_mask_the_order_of_the_tokens_is_nothing_to_it(rotary, causal):
    layer = random_layer(replace(GEOMETRIES["grouped-query"], rotary=rotary, causal=causal)).double()
    tokens = random_tokens(layer.spec, 16).double()
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    change = difference(forward(layer, tokens[:, order]), forward(layer, tokens)[:, order])
    if rotary or causal:
        assert change > 1e-2
    else:
        assert change < 1e-12  # float64 rounds at 2e-16, and sums in another order


def test_the_mask_hides_what_comes_later_and_nothing_else():
    tokens = random_tokens(GEOMETRIES["grouped-query"], 9)
    changed = tokens.clone()
    changed[:, 5] += 1
    for causal, untouched in ((True, 5), (False, 0)):
        layer = random_layer(replace(GEOMETRIES["grouped-query"], causal=causal))
        same = (forward(layer, tokens) == forward(layer, changed)).all(dim=(0, 2))  # (tokens,)
        assert same.tolist() == [True] * untouched + [False] * (9 - untouched)


@pytest.mark.parametrize("scale", [1e3, 1.0, 1e-3, 1e-5])  # the squares are as small as eps and smaller
@pytest.mark.parametrize("width", [1, 33, 576])
def test_rmsnorm_is_numpy_in_float64_for_small_rows_too(width, scale):
    rows = scale * np.random.default_rng(width).standard_normal((7, width))
    weight = np.random.default_rng(0).uniform(0.5, 1.5, width)

    def reference(eps: float, outside: float = 0.0) -> np.ndarray:
        return rows / (np.sqrt((rows**2).mean(-1, keepdims=True) + eps) + outside) * weight

    norm = RMSNorm(width, 1e-6)
    with torch.no_grad():
        norm.weight.copy_(torch.from_numpy(weight))
        output = norm(torch.from_numpy(rows).float()).double().numpy()
    # float32 rounds at 6e-8, four times, where rows of size 1 come out
    np.testing.assert_allclose(output, reference(1e-6), rtol=1e-6, atol=0)
    if scale <= 1e-3:  # there, no eps and eps on the root are off by a tenth and more
        for fault in (reference(0.0), reference(0.0, outside=1e-6)):
            assert (np.abs(output / fault - 1) > 1e-2).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e3, 1.0, 1e-3])  # float16's largest number is 65504: squares of 1e3 do not fit
def test_rmsnorm_rounds_half_precision_as_transformers_does(dtype, scale):
    rows = (scale * torch.randn(64, 96, generator=torch.Generator().manual_seed(0))).to(dtype)
    weight = torch.rand(96, generator=torch.Generator().manual_seed(1)).to(dtype) + 0.5
    ours, theirs = RMSNorm(96, 1e-6).to(dtype), LlamaRMSNorm(96, 1e-6).to(dtype)
    with torch.no_grad():
        ours.weight.copy_(weight)
        theirs.weight.copy_(weight)
        output = ours(rows)
        assert torch.equal(output, theirs(rows))  # to the bit: both take the mean in float32 and round before scaling
        scaled_before_rounding = F.rms_norm(rows.float(), (96,), weight.float(), 1e-6).to(dtype)
        assert not torch.equal(output, scaled_before_rounding)


@pytest.mark.parametrize(("rotary", "causal"), [(False, False), (True, True)])
def test_gradients_reach_the_tokens_through_frozen_weights(rotary, causal):
    spec = BlockSpec(
        hidden_size=8, intermediate_size=12, num_heads=4, num_kv_heads=2, head_dim=4, rotary=rotary, causal=causal
    )
    layer = random_layer(spec).double()
    tokens = random_tokens(spec, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(layer, tokens)  # against finite differences, in float64
    layer(tokens).square().sum().backward()
    assert tokens.grad is not None
    assert (tokens.grad != 0).all()
    assert all(parameter.grad is None for parameter in layer.parameters())
