"""Every variant of the language insert: in NumPy, in ONNX, in a checkpoint, and what training changes of it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, product
from math import erf
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from tiny import SIZE, TWO_ORGANS, tiny_recipe, write_block, write_pictures

from medseg_trt.errors import UsageError
from medseg_trt.export.fold.fold import fold
from medseg_trt.export.graph.save import save_graphs
from medseg_trt.export.graph.trace import trace
from medseg_trt.spec import BlockSpec, InsertSpec, ModelSpec, Preprocessing, from_dict, to_dict
from medseg_trt.train.block.blocks import FrozenBlock, extract_last, random_block, save_block
from medseg_trt.train.block.gguf_file import open_gguf
from medseg_trt.train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, trained_weights
from medseg_trt.train.datasets.folder import open_folder
from medseg_trt.train.loop import make_optimizer, train
from medseg_trt.train.models.frozen import FROZEN_DTYPES, keep_frozen_in
from medseg_trt.train.models.model import (
    TINY_LLAMA,
    LanguageInsert,
    build_model,
    count_parameters,
    frozen_names,
    model_spec,
)
from medseg_trt.train.models.transunet import TransUNet
from medseg_trt.train.models.variants import layer_weights
from medseg_trt.train.recipes.recipes import recipe
from medseg_trt.train.recipes.training_spec import TrainSpec

TOKENS = (48, 32)  # an image of 3 x 2 tokens
# Sums of at most 96 products of size 1, each rounded at 1.1e-16, through some ten stages; 4e-15 is the most measured.
FLOAT64 = 1e-10
# The rotary angles are float32: off by 6e-8 of at most 5 radians. 6e-8 is the most that was measured.
FLOAT32_ANGLES = 1e-6


@dataclass(frozen=True, kw_only=True)
class Variant:
    insert: InsertSpec = field(default_factory=InsertSpec)
    rotary: bool = False
    causal: bool = False

    def spec(self, size: tuple[int, int] = SIZE) -> ModelSpec:
        return model_spec("llm-transunet-tiny", size, 3, self.insert, rotary=self.rotary, causal=self.causal)


def variant(*, rotary: bool = False, causal: bool = False, **insert: Any) -> Variant:
    return Variant(insert=InsertSpec(**insert), rotary=rotary, causal=causal)


VARIANTS: Mapping[str, Variant] = {
    "published": variant(),
    "residual in": variant(residual="in"),
    "residual out": variant(residual="out"),
    "residual both": variant(residual="both"),
    "pretrained norm": variant(norm="pretrained"),
    "no norm": variant(norm="none", residual="out"),
    "after encoder_norm": variant(placement="after_norm"),
    "after layer 1": variant(placement=1),
    "attention alone": variant(parts="attention"),
    "MLP alone": variant(parts="mlp"),
    "two layers": variant(num_layers=2),
    "random": variant(weights="random"),
    "two random layers": variant(weights="random", num_layers=2, seed=4),
    "shuffled": variant(weights="shuffled"),
    "maps and norm": variant(weights="none", residual="out"),
    "maps alone": variant(weights="none", norm="none"),
    "maps alone, residual out": variant(weights="none", norm="none", residual="out"),
    "trained": variant(trainable=True),
    "trained from random": variant(trainable=True, weights="random", parts="mlp"),
    "small maps": variant(mapper_init="trunc02"),
    "rotary": variant(rotary=True),
    "causal": variant(causal=True),
    "several": variant(
        residual="both",
        norm="pretrained",
        placement=1,
        parts="attention",
        num_layers=2,
        weights="shuffled",
        causal=True,
    ),
}
SAME_FUNCTION = {"trained": "published", "small maps": "published"}  # but for what they start from or train


def language_model(num_layers: int = 2) -> tuple[FrozenBlock, ...]:
    """Return the last layers of a generated language model; nothing in them is one, and each carries the final norm."""
    blocks: list[FrozenBlock] = []
    norm = 1 + 0.3 * torch.randn(TINY_LLAMA.hidden_size, generator=torch.Generator().manual_seed(9))
    for number in range(num_layers):
        block = random_block(TINY_LLAMA, seed=number, std=0.15)
        noise = torch.Generator().manual_seed(number)
        tensors = {
            name: tensor + 0.3 * torch.randn(tensor.shape, generator=noise) if "norm" in name else tensor
            for name, tensor in block.tensors.items()
        }
        blocks.append(replace(block, tensors={**tensors, "norm.weight": norm.clone()}))
    return tuple(blocks)


def needed_blocks(insert: InsertSpec) -> tuple[FrozenBlock, ...]:
    return language_model(insert.num_layers) if insert.needs_block_file else ()


def make_model(chosen: Variant, size: tuple[int, int] = SIZE) -> TransUNet:
    """Build a variant whose tokens differ from place to place, and whose trained weights are those of all others."""
    model = build_model(chosen.spec(size), needed_blocks(chosen.insert))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name == "position_embedding":
                weight.normal_(generator=generator)
            elif weight.dim() > 1 and not name.startswith("insert.block."):
                gain = 2 if name.startswith(("bridge", "decoder")) else 1  # against the tokens' share fading
                weight.normal_(std=gain * weight[0].numel() ** -0.5, generator=generator)
            elif name.endswith("bias"):
                weight.normal_(std=0.1, generator=generator)
    return model.eval()


def encoder(model: TransUNet) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens that enter the transformer and those that reach the decoder, in float64."""
    seen: dict[str, np.ndarray] = {}
    hooks = [
        model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.update(into=inputs[0].numpy())),
        model.bridge.register_forward_pre_hook(lambda _, inputs: seen.update(out=inputs[0].numpy())),
    ]
    image = torch.randn(2, 3, *TOKENS, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        model.double()(image)
    for hook in hooks:
        hook.remove()
    return seen["into"], seen["out"].reshape(*seen["out"].shape[:2], -1).swapaxes(1, 2)  # (2, 48, 3, 2) -> (2, 6, 48)


# The variants once more, in NumPy.

Weights = Mapping[str, np.ndarray]


def linear(x: np.ndarray, weights: Weights, name: str) -> np.ndarray:
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)


def softmax(scores: np.ndarray) -> np.ndarray:
    exponentials = np.exp(scores - scores.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def rms_norm(x: np.ndarray, weight: np.ndarray | float, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def turned(head: np.ndarray, theta: float) -> np.ndarray:
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
            q, k = turned(q, spec.rope_theta), turned(k, spec.rope_theta)
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
    answer = x
    for weights in layers:
        answer = llama_layer(answer, weights, spec.block, insert.parts)
    if insert.norm != "none":
        answer = rms_norm(answer, norm if insert.norm == "pretrained" else 1.0, eps)
    if insert.residual in ("in", "both"):
        answer = answer + x
    answer = linear(answer, maps, "insert.mapper2")
    return tokens + answer if insert.residual in ("out", "both") else answer


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

    def inserted(tokens: np.ndarray, place: str | int) -> np.ndarray:
        here = spec.insert.placement == place
        return numpy_insert(tokens, weights, layers, norm, spec) if here else tokens

    for number in range(spec.num_layers):
        tokens = inserted(transformer_layer(tokens, weights, f"layers.{number}", spec.num_heads), number + 1)
    return inserted(layer_norm(inserted(tokens, "before_norm"), weights, "encoder_norm"), "after_norm")


def own_layers(model: TransUNet, insert: InsertSpec) -> list[Weights]:
    """Return the layers' weights: the language model's where they are meant to be, otherwise what the model holds."""
    assert isinstance(model.insert, LanguageInsert)
    if insert.weights == "pretrained":
        return [in_numpy(block.tensors) for block in language_model(insert.num_layers)]
    return [in_numpy(layer.state_dict()) for layer in model.insert.layers]


def in_numpy(tensors: Mapping[str, torch.Tensor]) -> Weights:
    return {name: tensor.double().numpy() for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_its_formula_in_numpy(name):
    chosen = VARIANTS[name]
    model = make_model(chosen, TOKENS)
    into, out = encoder(model)
    expected = numpy_encoder(into, model, chosen.spec(TOKENS), own_layers(model, chosen.insert))
    assert np.abs(out - expected).max() < (FLOAT32_ANGLES if chosen.rotary else FLOAT64)


def test_no_two_variants_are_the_same_function():
    """With equal weights where they have the same ones, so that a switch without an effect is found."""
    answers = {name: encoder(make_model(chosen, TOKENS))[1] for name, chosen in VARIANTS.items()}
    for one, other in combinations(answers, 2):
        apart = np.abs(answers[one] - answers[other]).max()
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
def test_the_tolerance_catches(fault):
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


def test_encoder_norm_undoes_the_unit_norm_where_nothing_stands_between():
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

BLOCK, FINAL_NORM, TRANSUNET_AND_MAPS = 202_383_360, 4_096, 111_613_457  # LLaMA-7B, at 256 x 256 and 1 class
ATTENTION, MLP = 4 * 4096**2 + 4096, 3 * 4096 * 11008 + 4096  # each with its norm


@pytest.mark.parametrize(
    ("insert", "trainable", "frozen"),
    [
        ({}, 0, BLOCK + FINAL_NORM),
        ({"residual": "both", "placement": "after_norm"}, 0, BLOCK + FINAL_NORM),
        ({"norm": "pretrained"}, 0, BLOCK + FINAL_NORM),
        ({"norm": "none"}, 0, BLOCK),
        ({"weights": "random"}, 0, BLOCK + FINAL_NORM),
        ({"weights": "shuffled"}, 0, BLOCK + FINAL_NORM),
        ({"weights": "none"}, 0, FINAL_NORM),
        ({"weights": "none", "norm": "none"}, 0, 0),
        ({"parts": "attention"}, 0, ATTENTION + FINAL_NORM),
        ({"parts": "mlp"}, 0, MLP + FINAL_NORM),
        ({"num_layers": 3}, 0, 3 * BLOCK + FINAL_NORM),
        ({"trainable": True}, BLOCK, FINAL_NORM),
        ({"trainable": True, "weights": "random", "parts": "mlp", "num_layers": 2}, 2 * MLP, FINAL_NORM),
    ],
)
def test_what_is_trained_and_what_is_frozen_to_the_unit(insert, trainable, frozen):
    with torch.device("meta"):
        counts = count_parameters(build_model(model_spec("llm-transunet", (256, 256), 1, InsertSpec(**insert))))
    assert (counts["trainable"], counts["frozen"]) == (TRANSUNET_AND_MAPS + trainable, frozen)


@pytest.mark.parametrize("dtype", FROZEN_DTYPES)
@pytest.mark.parametrize("name", VARIANTS)
def test_a_step_changes_all_that_is_trained_and_nothing_that_is_frozen(name, dtype):
    model = make_model(VARIANTS[name]).train()
    keep_frozen_in(model, dtype)
    before = {key: value.clone() for key, value in model.named_parameters()}
    optimizer = make_optimizer(model, TrainSpec(optimizer="sgd", learning_rate=1.0, weight_decay=0.0))
    model(torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(0))).square().mean().backward()
    optimizer.step()
    changed = {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
    assert changed.isdisjoint(frozen_names(model))
    assert all((value.grad is None) == (key in frozen_names(model)) for key, value in model.named_parameters())
    layers = {key for key in before if key.startswith("insert.block.")}
    assert layers <= changed if VARIANTS[name].insert.trainable else layers <= frozen_names(model)
    assert {"insert.mapper1.weight", "insert.mapper2.weight", "patch_embedding.weight"} <= changed
    assert ("insert.final_norm.weight" in before) == (VARIANTS[name].insert.norm != "none")


def test_maps_of_pang_et_al_are_narrow_and_cut_off_and_change_nothing_else():
    spec = model_spec("llm-transunet-small", SIZE, 3, InsertSpec(mapper_init="trunc02", weights="random"))
    maps: list[torch.Tensor] = []
    for chosen in (spec, replace(spec, insert=replace(spec.insert, mapper_init="default"))):
        torch.manual_seed(3)
        state = build_model(chosen).state_dict()
        maps += [state["insert.mapper1.weight"], state["insert.mapper2.weight"]]
    # 110 592 numbers: the deviation of their deviation is 0.02 / sqrt(2 n) = 4e-5, of their mean 6e-5; five of each.
    for drawn in maps[:2]:
        assert drawn.std().item() == pytest.approx(0.02, abs=2e-4)
        assert abs(drawn.mean().item()) < 3e-4
    assert not torch.equal(maps[0], maps[1].T)
    for usual in maps[2:]:  # U(-1, 1) / sqrt(fan in) has 1 / sqrt(3 fan in): 0.042 of 192 columns, 0.024 of 576
        assert usual.std().item() == pytest.approx((3 * usual.shape[1]) ** -0.5, rel=0.02)
        assert abs(usual.std().item() - 0.02) > 2e-3


def outside(spec: ModelSpec, blocks: Sequence[FrozenBlock] = (), seed: int = 3) -> dict[str, torch.Tensor]:
    """Return the weights outside the insert with which a model of this seed starts."""
    torch.manual_seed(seed)
    state = build_model(spec, blocks).state_dict()
    return {name: value for name, value in state.items() if not name.startswith("insert.")}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_arm_of_one_seed_starts_from_the_same_weights_outside_the_insert(name):
    """TransUNet without a language block is the arm that all are compared with."""
    baseline = outside(model_spec("transunet-tiny", SIZE, 3))
    found = outside(VARIANTS[name].spec(), needed_blocks(VARIANTS[name].insert))
    assert found.keys() == baseline.keys()
    assert all(torch.equal(found[key], value) for key, value in baseline.items())
    other = outside(VARIANTS[name].spec(), needed_blocks(VARIANTS[name].insert), seed=4)
    assert not torch.equal(other["head.weight"], baseline["head.weight"])


def test_a_block_of_another_width_changes_nothing_outside_the_insert():
    wider = replace(TINY_LLAMA, intermediate_size=160)
    spec = replace(VARIANTS["published"].spec(), block=wider)
    found = outside(spec, (random_block(wider, seed=0),))
    assert torch.equal(found["head.weight"], outside(VARIANTS["published"].spec(), language_model(1))["head.weight"])


def test_the_published_model_starts_where_it_always_started():
    """Its insert drawn first, then all else, as runs of earlier versions began."""
    spec = VARIANTS["published"].spec()
    assert spec.block is not None
    torch.manual_seed(3)
    insert = LanguageInsert(spec.hidden_size, spec.block)
    expected = TransUNet(spec, insert).state_dict()
    torch.manual_seed(3)
    found = build_model(spec, language_model(1)).state_dict()
    for name, value in expected.items():
        assert name.startswith(("insert.block.", "insert.final_norm.")) or torch.equal(found[name], value), name


# Random and shuffled weights follow from the spec and the block.


def weights_of(insert: InsertSpec, blocks: Sequence[FrozenBlock] = ()) -> list[Weights]:
    return [in_numpy(tensors) for tensors in layer_weights(insert, TINY_LLAMA, blocks)]


@pytest.mark.parametrize("kind", ["random", "shuffled"])
def test_the_seed_and_the_place_decide_the_weights_and_nothing_else_does(kind):
    insert = InsertSpec(weights=kind, num_layers=2, seed=5)
    blocks = language_model()
    first = weights_of(insert, blocks)
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002  # the state that must not matter
    again = weights_of(replace(insert, residual="out", trainable=True), blocks)
    other = weights_of(replace(insert, seed=6), blocks)
    for layer in range(2):
        for name in random_block(TINY_LLAMA, seed=0).tensors:
            np.testing.assert_array_equal(first[layer][name], again[layer][name])
            is_constant = kind == "random" and "norm" in name
            assert np.array_equal(first[layer][name], other[layer][name]) == is_constant
    query = "self_attn.q_proj.weight"
    assert not np.array_equal(first[0][query], first[1][query])
    assert not np.array_equal(first[1][query], other[0][query])  # the layers of one seed are not the next one's


def test_shuffling_keeps_the_values_of_every_tensor_and_their_type_and_no_place():
    source = language_model(1)[0]
    block = replace(source, tensors={name: tensor.bfloat16() for name, tensor in source.tensors.items()})
    (found,) = layer_weights(InsertSpec(weights="shuffled"), TINY_LLAMA, [block])
    for name, tensor in block.tensors.items():
        assert found[name].dtype == torch.bfloat16
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].flatten().sort().values, tensor.flatten().sort().values)
        same_place = (found[name] == tensor).double().mean()
        by_chance = (tensor.flatten()[:, None] == tensor.flatten()).double().mean() if tensor.dim() == 1 else 0.02
        assert same_place < by_chance + 0.1  # bfloat16 has few values, so that some fall on their like


def test_shuffling_does_not_depend_on_the_order_of_the_tensors_or_on_what_else_is_there():
    """A file keeps its tensors in another order than the reader, and may carry the final norm or not."""
    (block,) = language_model(1)
    backwards = dict(reversed(list(block.tensors.items())))
    del backwards["norm.weight"]
    insert = InsertSpec(weights="shuffled")
    (first,), (second,) = weights_of(insert, [block]), weights_of(insert, [replace(block, tensors=backwards)])
    for name in backwards:
        np.testing.assert_array_equal(first[name], second[name])


def test_numpy_draws_the_numbers_that_stored_models_were_made_with():
    """NumPy does not promise its streams for ever; where one changes, stored random and shuffled models would too."""
    (block,) = language_model(1)
    ramp = torch.arange(64.0)
    block = replace(block, tensors={**block.tensors, "input_layernorm.weight": ramp})
    (shuffled,) = weights_of(InsertSpec(weights="shuffled", seed=1), [block])
    (random,) = weights_of(InsertSpec(weights="random", seed=1))
    assert shuffled["input_layernorm.weight"][:8].tolist() == [43, 49, 27, 63, 25, 8, 33, 61]
    normals = [0.00450199796, -0.00618989347, -0.0223820377, 0.00132335746]
    np.testing.assert_allclose(random["mlp.up_proj.weight"][0, :4], normals, rtol=1e-7)  # printed with nine digits


def test_random_weights_have_the_spread_that_the_spec_says():
    (found,) = weights_of(InsertSpec(weights="random", seed=2))
    for name, values in found.items():
        if "norm" in name:
            assert (values == 1).all()
        else:  # the spread of n numbers is known to one part in sqrt(2 n): 2048 numbers or more, six times that
            assert abs(values.std() / 0.02 - 1) < 0.1
            assert abs(values.mean()) < 6 * 0.02 / values.size**0.5


# ONNX.


@pytest.mark.parametrize(
    "chosen",
    [
        variant(residual="both", norm="pretrained", parts="attention", placement=1, rotary=True, causal=True),
        variant(residual="in", norm="none", parts="mlp", placement="after_norm", weights="shuffled"),
        variant(residual="out", weights="random", num_layers=2, trainable=True),
    ],
    ids=["attention, rotary, causal, residual both", "MLP after encoder_norm", "two layers"],
)
def test_onnx_runtime_agrees_with_pytorch(chosen, tmp_path):
    model = make_model(chosen)
    save_graphs({"model.onnx": trace(fold(model)[0])}, tmp_path, "weights.bin")
    images = np.random.default_rng(0).random((2, 3, *SIZE), dtype=np.float32)
    published = make_model(VARIANTS["published"])
    with torch.inference_mode():
        expected, other = (network(torch.from_numpy(images)).numpy() for network in (model, published))
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"pixel_values": images})
    # Some fifty roundings of 6e-8 each; 3e-6 is the most that was measured, and the published model is a tenth away.
    largest = np.abs(expected).max()
    assert np.abs(np.asarray(logits) - expected).max() < 2e-5 * largest
    assert np.abs(expected - other).max() > 0.1 * largest


# Checkpoints and runs.


@pytest.mark.parametrize("name", VARIANTS)
def test_a_checkpoint_brings_a_variant_back_without_its_frozen_weights(name, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    chosen = VARIANTS[name]
    model = make_model(chosen)
    block_file, digest = None, None
    if blocks := needed_blocks(chosen.insert):
        block_file = tmp_path / "block.safetensors"
        digest = save_block(blocks, block_file)
    checkpoint = Checkpoint(
        weights=trained_weights(model),
        spec=chosen.spec(),
        preprocessing=Preprocessing(image_size=SIZE),
        classes=TWO_ORGANS,
        block_file=block_file,
        block_sha256=digest,
    )
    save_checkpoint(checkpoint, tmp_path / "saved" / "model.pt")
    assert len(list((tmp_path / "saved").iterdir())) == (1 if digest is None else 2)
    found = load_checkpoint(tmp_path / "saved" / "model.pt")
    assert found.spec == chosen.spec()
    assert found.weights.keys() == model.state_dict().keys() - frozen_names(model)
    assert any(key.startswith("insert.block.") for key in found.weights) == chosen.insert.trainable
    images = torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(found.model()(images), model(images))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


def test_a_recipe_chooses_the_variant_and_a_control_needs_no_block(pictures, tmp_path):
    changes = (
        "train.epochs=1",
        "insert.weights=random",
        "insert.seed=3",
        "insert.residual=out",
        "insert.placement=1",
        "rotary=true",
    )
    spec = load_checkpoint(train(tiny_recipe(*changes), open_folder(pictures), tmp_path)).spec
    assert spec.insert == InsertSpec(weights="random", seed=3, residual="out", placement=1)
    assert spec.block == replace(TINY_LLAMA, rotary=True)


def test_a_run_takes_several_layers_and_the_final_norm_from_one_file(pictures, tmp_path):
    """And resumes with them; the checkpoint says where each layer came from."""
    block = tmp_path / "block.safetensors"
    save_block(language_model(), block)
    changes = ("train.epochs=1", "insert.num_layers=2", "insert.norm=pretrained")
    best = train(tiny_recipe(*changes), open_folder(pictures), tmp_path / "run", block=block)
    checkpoint = load_checkpoint(best)
    assert [layer["seed"] for layer in checkpoint.provenance["block"]["layers"]] == [0, 1]
    insert = checkpoint.model().insert
    assert isinstance(insert, LanguageInsert)
    for layer, expected in zip(insert.layers, language_model(), strict=True):
        assert torch.equal(layer.mlp.up_proj.weight, expected.tensors["mlp.up_proj.weight"])
    assert torch.equal(insert.final_norm.get_parameter("weight"), language_model()[0].tensors["norm.weight"])
    train(tiny_recipe(*changes), open_folder(pictures), tmp_path / "run", block=block, resume=True)


@pytest.mark.network
@pytest.mark.parametrize("count", [1, 2])
def test_the_real_language_models_layers_and_norm_are_in_the_network(count, llama_gguf, pictures, tmp_path):
    blocks = extract_last(llama_gguf, count, final_norm=True)
    save_block(blocks, tmp_path / "block.safetensors")
    changes = ("train.epochs=0", f"insert.num_layers={count}", "insert.norm=pretrained")
    best = train(tiny_recipe(*changes), open_folder(pictures), tmp_path / "run", block=tmp_path / "block.safetensors")
    insert = load_checkpoint(best).model().insert
    assert isinstance(insert, LanguageInsert)
    own = open_gguf(llama_gguf).read("output_norm.weight")
    assert torch.equal(insert.final_norm.get_parameter("weight"), own)
    values = open_gguf(llama_gguf).read(f"blk.{30 - count}.ffn_up.weight")  # of the oldest of them
    assert torch.equal(insert.layers[0].mlp.up_proj.weight, values)


def test_a_trained_block_starts_from_the_file_and_leaves_it(pictures, tmp_path):
    block = write_block(tmp_path)
    changes = ("train.epochs=1", "insert.trainable=true", "causal=true")
    best = load_checkpoint(train(tiny_recipe(*changes), open_folder(pictures), tmp_path / "run", block=block))
    assert best.spec.block == replace(TINY_LLAMA, causal=True)
    start = random_block(TINY_LLAMA, seed=0).tensors["mlp.up_proj.weight"]
    moved = (best.weights["insert.block.mlp.up_proj.weight"] - start).abs().max()
    assert 0 < moved < start.abs().max()


def test_a_run_that_was_begun_before_there_were_variants_goes_on(pictures, tmp_path):
    block = write_block(tmp_path)
    train(tiny_recipe("train.epochs=1"), open_folder(pictures), tmp_path / "run", block=block)
    last = tmp_path / "run" / "last.pt"
    content = torch.load(last, weights_only=True)
    for name in ("insert", "rotary", "causal"):
        del content["medseg_trt"]["provenance"]["recipe"][name]
    del content["medseg_trt"]["spec"]["insert"]
    torch.save(content, last)
    data = open_folder(pictures)
    train(tiny_recipe("train.epochs=1"), data, tmp_path / "run", block=block, resume=True)
    with pytest.raises(UsageError, match="started with another recipe"):
        train(tiny_recipe("train.epochs=1", "rotary=true"), data, tmp_path / "run", block=block, resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["insert.placement=3"], "after layer 3; llm-transunet-tiny has 2"),
        (["architecture=transunet-tiny", "insert.residual=in"], "no language block"),
        (["architecture=transunet-tiny", "causal=true"], "no language block"),
        (["insert.num_layers=2"], "num_layers is 2, but the block holds 1 layer.*--layers 2"),
        (["insert.norm=pretrained"], r"no norm\.weight.*Extract the block again.*--final-norm"),
        (["insert.parts=mlp", "causal=true"], "this insert has none"),
    ],
)
def test_a_run_of_an_impossible_variant_does_not_begin(changes, message, pictures, tmp_path):
    block = None if "architecture=transunet-tiny" in changes else write_block(tmp_path)
    with pytest.raises(UsageError, match=message):
        train(tiny_recipe(*changes), open_folder(pictures), tmp_path / "run", block=block)
    assert not (tmp_path / "run" / "last.pt").exists()


@pytest.mark.parametrize(
    "changes", [[], ["insert.weights=shuffled"], ["insert.weights=none", "insert.norm=pretrained"]]
)
def test_a_variant_that_takes_from_the_language_model_asks_for_the_block(changes, pictures, tmp_path):
    with pytest.raises(UsageError, match="needs a frozen block: --block FILE"):
        train(tiny_recipe(*changes), open_folder(pictures), tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("insert.residual=sideways", "'none', 'in', 'out' or 'both'"),
        ("insert.residuals=in", "choose one of: residual, norm, placement"),
        ("insert.weights=none insert.trainable=true", "must be unset"),
        ("insert.seed=-1", "seed 0 or more"),
    ],
)
def test_a_wrong_change_is_explained(change, message):
    with pytest.raises(UsageError, match=message):
        recipe("folder", change.split())


def test_weights_of_scaled_rotary_angles_are_refused_where_the_angles_matter():
    block = replace(random_block(TINY_LLAMA, seed=0), provenance={"rope_scaling": "llama3"})
    assert build_model(variant().spec(), block).insert is not None
    with pytest.raises(UsageError, match="'llama3' rotary scaling"):
        build_model(variant(rotary=True).spec(), block)


def test_a_spec_of_before_there_were_variants_is_the_published_model():
    data = json.loads(json.dumps(to_dict(variant().spec())))
    del data["insert"]
    assert from_dict(ModelSpec, data, "model.pt") == variant().spec()
