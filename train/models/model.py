"""The architectures by name, and the model that a ModelSpec describes.

LLM-TransUNet is TransUNet with a frozen LLaMA layer between the transformer and ``encoder_norm``: two trained linear
maps without bias take the tokens to the layer's width and back. As published, there is no residual around them, no
activation, and no norm but LLaMA's final RMSNorm, whose weight is left at one; ``InsertSpec`` names the variants.

Source: Jiang & Liu, MIDL 2024, and their code, ``networks/vit_seg_modeling.py`` of LLM4MedSeg.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from medseg_trt.errors import UsageError
from medseg_trt.imaging.segment import Run
from medseg_trt.spec import BlockSpec, InsertSpec, ModelSpec
from medseg_trt.train.block.blocks import FrozenBlock
from medseg_trt.train.models.llama import LlamaBlock, RMSNorm
from medseg_trt.train.models.transunet import TransUNet
from medseg_trt.train.models.variants import final_norm, layer_weights

LLAMA_7B = BlockSpec()
SMOLLM2_135M = BlockSpec(
    hidden_size=576, intermediate_size=1536, num_heads=9, num_kv_heads=3, head_dim=64, rms_norm_eps=1e-5, rope_theta=1e5
)
TINY_LLAMA = BlockSpec(hidden_size=64, intermediate_size=96, num_heads=4, num_kv_heads=2, head_dim=16)

MAX_DRAWN = 1 << 20  # random numbers at once
MAPPER_STD = 0.02  # of mapper_init=trunc02

Preset = Callable[[tuple[int, int], int], ModelSpec]


def transunet(image_size: tuple[int, int], num_classes: int) -> ModelSpec:
    """R50-ViT-B/16 as published: 105 million parameters."""
    return ModelSpec(architecture="transunet", image_size=image_size, num_classes=num_classes)


def transunet_small(image_size: tuple[int, int], num_classes: int) -> ModelSpec:
    """A TransUNet that a laptop's CPU trains in minutes."""
    return ModelSpec(
        architecture="transunet-small",
        image_size=image_size,
        num_classes=num_classes,
        resnet_width=32,
        resnet_units=(2, 2, 2),
        hidden_size=192,
        num_layers=4,
        num_heads=6,
        mlp_size=384,
        dropout=0.1,
        bridge_channels=128,
        decoder_channels=(96, 64, 32, 16),
    )


def transunet_tiny(image_size: tuple[int, int], num_classes: int) -> ModelSpec:
    """A TransUNet for tests, which runs in milliseconds."""
    return ModelSpec(
        architecture="transunet-tiny",
        image_size=image_size,
        num_classes=num_classes,
        resnet_width=32,
        resnet_units=(1, 1, 1),
        hidden_size=48,
        num_layers=2,
        num_heads=4,
        mlp_size=64,
        bridge_channels=32,
        decoder_channels=(32, 16, 16, 16),
    )


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


def model_spec(
    architecture: str,
    image_size: tuple[int, int],
    num_classes: int,
    insert: InsertSpec | None = None,
    *,
    rotary: bool = False,
    causal: bool = False,
) -> ModelSpec:
    """Return the named architecture for an image size (height, width) and a number of classes.

    Args:
        architecture: a key of ``MODELS``.
        image_size: height and width in pixels.
        num_classes: channels of the answer.
        insert: another use of the language block than the published one.
        rotary: switch the block's rotary embedding on, which the published model leaves out.
        causal: switch the block's causal mask on, which the published model leaves out.

    Raises:
        UsageError: no such architecture, the image size is not a multiple of 16, or the insert does not fit.
    """
    if architecture not in MODELS:
        raise UsageError(f"no architecture is called {architecture!r}; choose one of: {', '.join(MODELS)}")
    try:
        spec = MODELS[architecture](image_size, num_classes)
        if spec.block is None and (rotary or causal):
            raise ValueError(f"{architecture} has no language block to change; choose an llm- architecture")
        block = spec.block and replace(spec.block, rotary=rotary, causal=causal)
        return replace(spec, block=block, insert=insert or spec.insert)
    except ValueError as error:
        raise UsageError(str(error)) from error


class LanguageInsert(nn.Module):
    """Two trained linear maps with the language layers and their final norm between them; see ``InsertSpec``.

    The layers are frozen unless ``insert.trainable``, the final norm always.
    """

    def __init__(self, hidden_size: int, spec: BlockSpec, insert: InsertSpec | None = None) -> None:
        super().__init__()
        insert = insert or InsertSpec()
        self.inner_residual = insert.residual in ("in", "both")
        self.outer_residual = insert.residual in ("out", "both")
        num_layers = 0 if insert.weights == "none" else insert.num_layers
        self.mapper1 = nn.Linear(hidden_size, spec.hidden_size, bias=False)
        layers = [LlamaBlock(spec, insert.parts) for _ in range(num_layers)]
        self.block = layers[0] if len(layers) == 1 else nn.Sequential(*layers)
        self.final_norm = nn.Identity() if insert.norm == "none" else RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.mapper2 = nn.Linear(spec.hidden_size, hidden_size, bias=False)
        self.block.requires_grad_(insert.trainable)
        self.final_norm.requires_grad_(False)

    @property
    def layers(self) -> list[LlamaBlock]:
        """The language layers, in the order in which the tokens pass them."""
        return [layer for layer in self.block.modules() if isinstance(layer, LlamaBlock)]

    def forward(self, tokens: Float[Tensor, "batch tokens hidden"]) -> Float[Tensor, "batch tokens hidden"]:
        """Return the tokens after the detour through the language model."""
        mapped = self.mapper1(tokens)
        layers_type = next((weight.dtype for weight in self.block.parameters()), mapped.dtype)
        answer = self.final_norm(self.block(mapped.to(layers_type)).to(mapped.dtype)).to(tokens.dtype)
        if self.inner_residual:
            answer = answer + mapped
        answer = self.mapper2(answer)
        return tokens + answer if self.outer_residual else answer


def build_model(spec: ModelSpec, block: FrozenBlock | Sequence[FrozenBlock] | None = None) -> TransUNet:
    """Build the network that ``spec`` describes, with fresh trainable weights.

    All that lies outside the insert is drawn from one place of PyTorch's stream of random numbers: with one seed an
    architecture, its LLM counterpart and every variant of that start from the same weights there.

    Args:
        spec: the architecture.
        block: the language layers' weights, one block a layer in the language model's order. Without a block that
            ``spec.insert`` needs, an LLM-TransUNet starts from random frozen weights, which serves to count parameters.

    Raises:
        UsageError: the block's geometry is not the one in ``spec``, or it lacks layers or a norm that ``spec`` wants.
    """
    blocks = (block,) if isinstance(block, FrozenBlock) else tuple(block or ())
    if spec.block is None:
        if blocks:
            raise UsageError(
                f"{spec.architecture} has no language block; choose llm-{spec.architecture} or drop the block"
            )
        _draw_like_published(spec, None, torch.get_rng_state())
        return TransUNet(spec)
    _check_blocks(spec.block, blocks)
    start = torch.get_rng_state()
    insert = LanguageInsert(spec.hidden_size, spec.block, spec.insert)
    if blocks or not spec.insert.needs_block_file:
        _fill(insert, spec.insert, spec.block, blocks)
    if spec.insert.mapper_init == "trunc02" and not insert.mapper1.weight.is_meta:
        _draw_maps(insert, start)
    _draw_like_published(spec, insert, start)
    return TransUNet(spec, insert)


def frozen_names(model: nn.Module) -> set[str]:
    """Return the names of the parameters that no training changes, and that no checkpoint therefore holds."""
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def _draw_like_published(spec: ModelSpec, insert: LanguageInsert | None, start: Tensor) -> None:
    """Bring PyTorch's stream to where drawing the published insert of this architecture takes it from ``start``.

    What is drawn next are then the weights with which the published model has always begun.
    """
    preset = MODELS.get(f"llm-{spec.architecture.removeprefix('llm-')}")
    block = preset(spec.image_size, spec.num_classes).block if preset is not None else None
    if block is None:
        return
    with torch.device("meta"):
        left = _numbers_drawn(LanguageInsert(spec.hidden_size, block))
    if insert is not None and _numbers_drawn(insert) == left:
        return
    torch.set_rng_state(start)
    while left > 0:  # in parts, since LLaMA-7B's layer has 200 million; parts draw what the whole would
        left -= torch.rand(min(left, MAX_DRAWN)).numel()


def _draw_maps(insert: LanguageInsert, start: Tensor) -> None:
    """Draw the two maps as Pang et al. do, with the numbers from ``start`` on, where PyTorch's own draw of them was.

    What is drawn next is what it would have been.
    """
    end = torch.get_rng_state()
    torch.set_rng_state(start)
    for linear in (insert.mapper1, insert.mapper2):
        nn.init.trunc_normal_(linear.weight, std=MAPPER_STD)
    torch.set_rng_state(end)


def _numbers_drawn(insert: LanguageInsert) -> int:
    return sum(weight.numel() for weight in insert.parameters() if weight.dim() > 1)  # norms start from ones


def _check_blocks(spec: BlockSpec, blocks: Sequence[FrozenBlock]) -> None:
    wanted = replace(spec, rotary=False, causal=False)
    for block in blocks:
        if block.spec != wanted:
            raise UsageError(f"the block's geometry is {block.spec}; the model asks for {wanted}")
        if spec.rotary and (scaling := block.provenance.get("rope_scaling")):
            raise UsageError(
                f"the block was trained with {scaling!r} rotary scaling, which is not supported; leave rotary off"
            )


def _fill(insert: LanguageInsert, spec: InsertSpec, geometry: BlockSpec, blocks: Sequence[FrozenBlock]) -> None:
    """Give the language layers and the final norm the weights that the spec names."""
    if insert.mapper1.weight.is_meta:  # there are shapes alone, and drawing millions of numbers would serve nobody
        return
    for layer, weights in zip(insert.layers, layer_weights(spec, geometry, blocks), strict=True):
        layer.load_state_dict({name: weights[name] for name in layer.state_dict()})
    if spec.norm == "pretrained":
        insert.final_norm.load_state_dict({"weight": final_norm(blocks)})


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
