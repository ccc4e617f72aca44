"""The architectures by name, and the model that a ModelSpec describes.

LLM-TransUNet is TransUNet with a frozen LLaMA layer between the transformer and ``encoder_norm``: two trained linear
maps without bias take the tokens to the layer's width and back. There is no residual around them, no activation, and no
norm but LLaMA's final RMSNorm, whose weight the published code leaves at one.

Source: Jiang & Liu, MIDL 2024, and their code, ``networks/vit_seg_modeling.py`` of LLM4MedSeg.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from medseg_trt.errors import UsageError
from medseg_trt.segment import Run
from medseg_trt.spec import BlockSpec, ModelSpec
from medseg_trt.train.blocks import FrozenBlock
from medseg_trt.train.llama import LlamaBlock, RMSNorm
from medseg_trt.train.transunet import TransUNet

LLAMA_7B = BlockSpec()
SMOLLM2_135M = BlockSpec(
    hidden_size=576, intermediate_size=1536, num_heads=9, num_kv_heads=3, head_dim=64, rms_norm_eps=1e-5, rope_theta=1e5
)
TINY_LLAMA = BlockSpec(hidden_size=64, intermediate_size=96, num_heads=4, num_kv_heads=2, head_dim=16)

Preset = Callable[[tuple[int, int], int], ModelSpec]


def transunet(image_size: tuple[int, int], num_classes: int) -> ModelSpec:
    """R50-ViT-B/16 as published: 105 million parameters."""
    return ModelSpec(architecture="transunet", image_size=image_size, num_classes=num_classes)


def transunet_small(image_size: tuple[int, int], num_classes: int) -> ModelSpec:
    """A TransUNet that a laptop's CPU trains in minutes."""
    return ModelSpec(
        architecture="transunet-small", image_size=image_size, num_classes=num_classes, resnet_width=32,
        resnet_units=(2, 2, 2), hidden_size=192, num_layers=4, num_heads=6, mlp_size=384, dropout=0.1,
        bridge_channels=128, decoder_channels=(96, 64, 32, 16),
    )  # fmt: skip


def transunet_tiny(image_size: tuple[int, int], num_classes: int) -> ModelSpec:
    """A TransUNet for tests, which runs in milliseconds."""
    return ModelSpec(
        architecture="transunet-tiny", image_size=image_size, num_classes=num_classes, resnet_width=32,
        resnet_units=(1, 1, 1), hidden_size=48, num_layers=2, num_heads=4, mlp_size=64,
        bridge_channels=32, decoder_channels=(32, 16, 16, 16),
    )  # fmt: skip


def with_block(preset: Preset, block: BlockSpec) -> Preset:
    """Return the LLM-TransUNet of a TransUNet preset."""

    def preset_with_block(image_size: tuple[int, int], num_classes: int) -> ModelSpec:
        spec = preset(image_size, num_classes)
        return replace(spec, architecture=f"llm-{spec.architecture}", block=block)

    return preset_with_block


MODELS: Mapping[str, Preset] = {
    "transunet": transunet,
    "llm-transunet": with_block(transunet, LLAMA_7B),
    "transunet-small": transunet_small,
    "llm-transunet-small": with_block(transunet_small, SMOLLM2_135M),
    "transunet-tiny": transunet_tiny,
    "llm-transunet-tiny": with_block(transunet_tiny, TINY_LLAMA),
}


def model_spec(architecture: str, image_size: tuple[int, int], num_classes: int) -> ModelSpec:
    """Return the named architecture for an image size (height, width) and a number of classes.

    Raises:
        UsageError: no such architecture, or the image size is not a multiple of 16.
    """
    if architecture not in MODELS:
        raise UsageError(f"no architecture is called {architecture!r}; choose one of: {', '.join(MODELS)}")
    try:
        return MODELS[architecture](image_size, num_classes)
    except ValueError as error:
        raise UsageError(str(error)) from error


class LanguageInsert(nn.Module):
    """Two trained linear maps with a frozen LLaMA layer and its unit final norm between them."""

    def __init__(self, hidden_size: int, spec: BlockSpec) -> None:
        super().__init__()
        self.mapper1 = nn.Linear(hidden_size, spec.hidden_size, bias=False)
        self.block = LlamaBlock(spec)
        self.final_norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.mapper2 = nn.Linear(spec.hidden_size, hidden_size, bias=False)
        self.block.requires_grad_(False)
        self.final_norm.requires_grad_(False)

    def forward(self, tokens: Float[Tensor, "batch tokens hidden"]) -> Float[Tensor, "batch tokens hidden"]:
        """Return the tokens after the detour through the language model."""
        return self.mapper2(self.final_norm(self.block(self.mapper1(tokens))).to(tokens.dtype))


def build_model(spec: ModelSpec, block: FrozenBlock | None = None) -> TransUNet:
    """Build the network that ``spec`` describes, with fresh trainable weights.

    Args:
        spec: the architecture.
        block: the frozen layer's weights; without them an LLM-TransUNet starts from random frozen weights, which serves
            to count parameters and to load a checkpoint that carries its own block.

    Raises:
        UsageError: the block's geometry is not the one in ``spec``.
    """
    if spec.block is None:
        if block is not None:
            raise UsageError(
                f"{spec.architecture} has no language block; choose llm-{spec.architecture} or drop the block"
            )
        return TransUNet(spec)
    insert = LanguageInsert(spec.hidden_size, spec.block)
    if block is not None:
        wanted = replace(spec.block, rotary=False, causal=False)
        if block.spec != wanted:
            raise UsageError(f"the block's geometry is {block.spec}; the model asks for {wanted}")
        insert.block.load_state_dict(dict(block.tensors))
    return TransUNet(spec, insert)


def runner(model: nn.Module) -> Run:
    """Return the model, which must be in evaluation mode, as a function from NumPy to NumPy."""

    def run(batch: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(batch).to(device)).float().cpu().numpy()

    device = next(model.parameters()).device
    return run


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Return how many parameters there are: ``total``, ``trainable`` and ``frozen``."""
    total = sum(parameter.numel() for parameter in model.parameters())
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return {"total": total, "trainable": trainable, "frozen": total - trainable}
