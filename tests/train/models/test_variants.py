"""Every variant of the language insert computes its formula, written once more in NumPy."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations, product
from math import erf
from typing import Any

import numpy as np
import pytest
import torch
from insert_variants import (
    FLOAT32_ANGLES,
    FLOAT64,
    SAME_FUNCTION,
    TOKENS,
    VARIANTS,
    Weights,
    encoder,
    in_numpy,
    language_model,
    make_model,
    variant,
)

from medseg_trt.network_spec import ModelSpec
from medseg_trt.spec import BlockSpec, InsertSpec
from medseg_trt.train.models.model import (
    LanguageInsert,
)
from medseg_trt.train.models.transunet import TransUNet

# The variants once more, in NumPy.


def linear(x: np.ndarray, weights: Weights, name: str) -> np.ndarray:
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)


def softmax(scores: np.ndarray) -> np.ndarray:
    exponentials = np.exp(scores - scores.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def rms_norm(x: np.ndarray, weight: np.ndarray | float, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def rotated(head: np.ndarray, theta: float) -> np.ndarray:
    """Turn column i and column i + half, as one complex number, by the angle of the token's position."""
    half = head.shape[-1] // 2
    angles = np.arange(head.shape[-2])[:, None] * theta ** -(np.arange(half) / half)
    pairs = (head[..., :half] + 1j * head[..., half:]) * np.exp(1j * angles)
    return np.concatenate((pairs.real, pairs.imag), -1)


def llama_attention(x: np.ndarray, weights: Weights, spec: BlockSpec) -> np.ndarray:
    query, key, value = (linear(x, weights, f"self_attn.{name}_proj") for name in "qkv")
    later = np.triu(np.ones((x.shape[1], x.shape[1]), bool), 1)
    collected: list[np.ndarray] = []
    for head in range(spec.num_heads):
        shared = head * spec.num_kv_heads // spec.num_heads
        own, theirs = (slice(i * spec.head_dim, (i + 1) * spec.head_dim) for i in (head, shared))
        q, k = query[..., own], key[..., theirs]
        if spec.rotary:
            q, k = rotated(q, spec.rope_theta), rotated(k, spec.rope_theta)
        scores = q @ k.swapaxes(-1, -2) / np.sqrt(spec.head_dim)
        if spec.causal:
            scores = np.where(later, -np.inf, scores)
        collected.append(softmax(scores) @ value[..., theirs])
    return linear(np.concatenate(collected, -1), weights, "self_attn.o_proj")


def llama_mlp(x: np.ndarray, weights: Weights) -> np.ndarray:
    gate = linear(x, weights, "mlp.gate_proj")
    return linear(gate / (1 + np.exp(-gate)) * linear(x, weights, "mlp.up_proj"), weights, "mlp.down_proj")


def llama_layer(x: np.ndarray, weights: Weights, spec: BlockSpec, parts: str) -> np.ndarray:
    if parts in ("full", "attention"):
        x = x + llama_attention(rms_norm(x, weights["input_layernorm.weight"], spec.rms_norm_eps), weights, spec)
    if parts in ("full", "mlp"):
        x = x + llama_mlp(rms_norm(x, weights["post_attention_layernorm.weight"], spec.rms_norm_eps), weights)
    return x


def numpy_insert(
    tokens: np.ndarray, maps: Weights, layers: Sequence[Weights], norm: np.ndarray, spec: ModelSpec
) -> np.ndarray:
    """Return what the docstring of InsertSpec says, in its letters."""
    assert spec.block is not None
    insert, eps = spec.insert, spec.block.rms_norm_eps
    x = linear(tokens, maps, "insert.mapper1")
    output = x
    for weights in layers:
        output = llama_layer(output, weights, spec.block, insert.parts)
    if insert.norm != "none":
        output = rms_norm(output, norm if insert.norm == "pretrained" else 1.0, eps)
    if insert.residual in ("in", "both"):
        output = output + x
    output = linear(output, maps, "insert.mapper2")
    return tokens + output if insert.residual in ("out", "both") else output


def layer_norm(x: np.ndarray, weights: Weights, name: str) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def transformer_layer(x: np.ndarray, weights: Weights, name: str, heads: int) -> np.ndarray:
    normed = layer_norm(x, weights, f"{name}.attention_norm")
    query, key, value = (
        np.stack(np.split(linear(normed, weights, f"{name}.attention.{part}"), heads, -1))
        for part in ("query", "key", "value")
    )
    collected = softmax(query @ key.swapaxes(-1, -2) / np.sqrt(query.shape[-1])) @ value
    x = x + linear(np.concatenate(list(collected), -1), weights, f"{name}.attention.out")
    hidden = linear(layer_norm(x, weights, f"{name}.mlp_norm"), weights, f"{name}.fc1")
    return x + linear(hidden * (1 + np.vectorize(erf)(hidden / np.sqrt(2))) / 2, weights, f"{name}.fc2")


def numpy_encoder(tokens: np.ndarray, model: TransUNet, spec: ModelSpec, layers: Sequence[Weights]) -> np.ndarray:
    """Compute the tokens that reach the decoder, with the insert where ``spec.insert.placement`` wants it."""
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    norm = language_model()[0].tensors["norm.weight"].double().numpy()

    def inserted(tokens: np.ndarray, placement: str | int) -> np.ndarray:
        is_placed = spec.insert.placement == placement
        return numpy_insert(tokens, weights, layers, norm, spec) if is_placed else tokens

    for number in range(spec.num_layers):
        tokens = inserted(transformer_layer(tokens, weights, f"layers.{number}", spec.num_heads), number + 1)
    return inserted(layer_norm(inserted(tokens, "before_norm"), weights, "encoder_norm"), "after_norm")


def own_layers(model: TransUNet, insert: InsertSpec) -> list[Weights]:
    """Return the layers' weights: the language model's where they are meant to be, otherwise what the model holds."""
    assert isinstance(model.insert, LanguageInsert)
    if insert.weights == "pretrained":
        return [in_numpy(block.tensors) for block in language_model(insert.num_layers)]
    return [in_numpy(layer.state_dict()) for layer in model.insert.layers]


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_its_formula_in_numpy(name):
    chosen = VARIANTS[name]
    model = make_model(chosen, TOKENS)
    into, out = encoder(model)
    expected = numpy_encoder(into, model, chosen.spec(TOKENS), own_layers(model, chosen.insert))
    assert np.abs(out - expected).max() < (FLOAT32_ANGLES if chosen.rotary else FLOAT64)


def test_no_two_variants_are_the_same_function():
    """With equal weights where they have the same ones, so that a switch without an effect is found."""
    outputs = {name: encoder(make_model(chosen, TOKENS))[1] for name, chosen in VARIANTS.items()}
    for one, other in combinations(outputs, 2):
        apart = np.abs(outputs[one] - outputs[other]).max()
        if SAME_FUNCTION.get(other, other) == SAME_FUNCTION.get(one, one):
            assert apart == 0
        else:
            assert apart > 1e-3, (one, other)


FAULTS: Mapping[str, tuple[str, Any]] = {  # a variant, and what is wrong in the reference it is compared with
    "the residual is left out": ("residual in", {"residual": "none"}),
    "the residual goes round the maps": ("residual in", {"residual": "out"}),
    "the residual goes round the layers": ("residual out", {"residual": "in"}),
    "only the inner residual": ("residual both", {"residual": "in"}),
    "only the outer residual": ("residual both", {"residual": "out"}),
    "a residual that nobody asked for": ("published", {"residual": "out"}),
    "the norm's weight is one": ("pretrained norm", {"norm": "ones"}),
    "the norm's weight is the language model's": ("published", {"norm": "pretrained"}),
    "a norm that nobody asked for": ("no norm", {"norm": "ones"}),
    "no norm": ("maps and norm", {"norm": "none"}),
    "before encoder_norm": ("after encoder_norm", {"placement": "before_norm"}),
    "one layer too late": ("after layer 1", {"placement": 2}),
    "the MLP too": ("attention alone", {"parts": "full"}),
    "the attention too": ("MLP alone", {"parts": "full"}),
    "the other half": ("MLP alone", {"parts": "attention"}),
    "the first layer alone": ("two layers", lambda layers: layers[:1]),
    "the layers the wrong way round": ("two layers", lambda layers: layers[::-1]),
    "random layers the wrong way round": ("two random layers", lambda layers: layers[::-1]),
    "one random layer twice": ("two random layers", lambda layers: [layers[0], layers[0]]),
    "not shuffled": ("shuffled", lambda layers: [in_numpy(language_model(1)[0].tensors)]),
    "a layer after all": ("maps alone", lambda layers: [in_numpy(language_model(1)[0].tensors)]),
    "a norm that is not shuffled": (
        "shuffled",
        lambda layers: [{**layers[0], "input_layernorm.weight": own_norm("input_layernorm.weight")}],
    ),
}


def own_norm(name: str) -> np.ndarray:
    return in_numpy(language_model(1)[0].tensors)[name]


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_insert_variant_exceeds_the_tolerance(fault):
    name, change = FAULTS[fault]
    model = make_model(VARIANTS[name], TOKENS)
    into, out = encoder(model)
    spec, layers = VARIANTS[name].spec(TOKENS), own_layers(model, VARIANTS[name].insert)
    if isinstance(change, dict):
        spec = replace(spec, insert=replace(spec.insert, **change))
    else:
        layers = change(layers)
    assert np.abs(out - numpy_encoder(into, model, spec, layers)).max() > 1e6 * FLOAT64


@pytest.mark.parametrize(("name", "switch"), [("rotary", "rotary"), ("causal", "causal"), ("several", "causal")])
def test_the_tolerance_catches_a_switch_that_is_off(name, switch):
    model = make_model(VARIANTS[name], TOKENS)
    into, out = encoder(model)
    spec = replace(VARIANTS[name], **{switch: False}).spec(TOKENS)
    faulty = numpy_encoder(into, model, spec, own_layers(model, spec.insert))
    assert np.abs(out - faulty).max() > 1e3 * FLOAT32_ANGLES


def test_unit_final_norm_before_encoder_norm_has_no_effect_without_residual():
    """So that these two arms of an ablation are one, but for the eps of 1e-6 in encoder_norm."""
    without, with_norm = (encoder(make_model(variant(norm=norm), TOKENS))[1] for norm in ("none", "ones"))
    assert 0 < np.abs(without - with_norm).max() < 1e-4
    residuals = [encoder(make_model(variant(norm=norm, residual="in"), TOKENS))[1] for norm in ("none", "ones")]
    assert np.abs(residuals[0] - residuals[1]).max() > 0.1


def test_the_inner_residual_is_added_after_the_final_norm():
    """Before the norm would be another model, which the norm all but undoes."""
    model = make_model(VARIANTS["residual in"]).double()
    insert = model.insert
    assert isinstance(insert, LanguageInsert)
    tokens = torch.randn(1, 4, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mapped = insert.mapper1(tokens)
        after = insert.mapper2(insert.final_norm(insert.block(mapped)) + mapped)
        before = insert.mapper2(insert.final_norm(insert.block(mapped) + mapped))
        assert (insert(tokens) - after).abs().max() < FLOAT64
        assert (insert(tokens) - before).abs().max() > 0.1


# The order of the tokens.


@pytest.mark.parametrize(("rotary", "causal"), [(False, False), (True, False), (False, True)])
def test_permuted_tokens_give_the_permuted_answer_only_without_rotary_and_mask(rotary, causal):
    tokens = torch.randn(2, 16, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    for residual, norm, parts in product(
        ("none", "in", "out", "both"), ("ones", "pretrained", "none"), ("full", "attention", "mlp")
    ):
        if parts == "mlp" and (rotary or causal):
            continue  # it has no attention to change, and is refused
        model = make_model(variant(residual=residual, norm=norm, parts=parts, rotary=rotary, causal=causal))
        insert = model.insert
        assert insert is not None
        with torch.no_grad():
            change = (insert.double()(tokens[:, order]) - insert(tokens)[:, order]).abs().max()
        if rotary or causal:
            assert change > 1e-2, (residual, norm, parts)
        else:
            assert change < 1e-12, (residual, norm, parts)  # float64 rounds at 2e-16, and sums in another order


# What is trained.
