"""Variants of the language insert, each as a small network whose every part matters."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from tiny import SIZE

from medseg_trt.network_spec import ModelSpec
from medseg_trt.spec import InsertSpec
from medseg_trt.train.block.blocks import FrozenBlock, random_block
from medseg_trt.train.models.model import (
    TINY_LLAMA,
    build_model,
    model_spec,
)
from medseg_trt.train.models.transunet import TransUNet

Weights = Mapping[str, np.ndarray]
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
        spec = model_spec("llm-transunet-tiny", size, 3, self.insert, rotary=self.rotary, causal=self.causal)
        assert isinstance(spec, ModelSpec)
        return spec


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
    assert isinstance(model, TransUNet)
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


def in_numpy(tensors: Mapping[str, torch.Tensor]) -> Weights:
    return {name: tensor.double().numpy() for name, tensor in tensors.items()}
