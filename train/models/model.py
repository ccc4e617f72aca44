"""The model that a spec describes, with the language block inside where it has one.

LLM-TransUNet is TransUNet with a frozen LLaMA layer between the transformer and ``encoder_norm``: two trained linear
maps without bias take the tokens to the layer's width and back. As published, there is no residual around them, no
activation, and no norm but LLaMA's final RMSNorm, whose weight is left at one; ``InsertSpec`` names the variants.

Source: Jiang & Liu, MIDL 2024, and their code, ``networks/vit_seg_modeling.py`` of LLM4MedSeg.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from medseg_trt.errors import UsageError
from medseg_trt.external_spec import ExternalSpec
from medseg_trt.imaging.segment import Run
from medseg_trt.network_spec import ModelSpec, NetworkSpec
from medseg_trt.networks import DSTransUNetSpec, SwinUNetSpec, UNetSpec
from medseg_trt.spec import BlockSpec, InsertSpec
from medseg_trt.train.block.blocks import FrozenBlock
from medseg_trt.train.block.llama import LlamaBlock, RMSNorm
from medseg_trt.train.models.ds_transunet import DSTransUNet
from medseg_trt.train.models.external import ExternalNetwork, external_spec, is_external
from medseg_trt.train.models.presets import LLAMA_7B as LLAMA_7B
from medseg_trt.train.models.presets import MODELS
from medseg_trt.train.models.presets import SMOLLM2_135M as SMOLLM2_135M
from medseg_trt.train.models.presets import TINY_LLAMA as TINY_LLAMA
from medseg_trt.train.models.segmentation_model import SegmentationModel
from medseg_trt.train.models.swin_unet import SwinUNet
from medseg_trt.train.models.transunet import TransUNet
from medseg_trt.train.models.unet import UNet
from medseg_trt.train.models.unet_t import UNetT
from medseg_trt.train.models.variants import final_norm, layer_weights

MAX_DRAWN = 1 << 20  # random numbers at once
MAPPER_STD = 0.02  # of mapper_init=trunc02


def model_spec(
    architecture: str,
    image_size: tuple[int, int],
    num_classes: int,
    insert: InsertSpec | None = None,
    *,
    rotary: bool = False,
    causal: bool = False,
) -> NetworkSpec:
    """Return the named architecture for an image size (height, width) and a number of classes.

    Args:
        architecture: a key of ``MODELS``, or a network from elsewhere as in ``external``.
        image_size: height and width in pixels.
        num_classes: channels of the answer.
        insert: another use of the language block than the published one.
        rotary: switch the block's rotary embedding on, which the published model leaves out.
        causal: switch the block's causal mask on, which the published model leaves out.

    Raises:
        UsageError: no such architecture, it cannot have the image size, or the insert does not fit.
    """
    if architecture not in MODELS and not is_external(architecture):
        raise UsageError(f"no architecture is called {architecture!r}; choose one of: {', '.join(MODELS)}")
    try:
        if is_external(architecture):
            return _external(architecture, image_size, num_classes, insert, rotary=rotary, causal=causal)
        spec = MODELS[architecture](image_size, num_classes)
        if spec.block is None and (rotary or causal):
            raise ValueError(f"{architecture} has no language block to change; choose an llm- architecture")
        block = spec.block and replace(spec.block, rotary=rotary, causal=causal)
        return replace(spec, block=block, insert=insert or spec.insert)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _external(
    architecture: str,
    image_size: tuple[int, int],
    num_classes: int,
    insert: InsertSpec | None,
    *,
    rotary: bool,
    causal: bool,
) -> NetworkSpec:
    if rotary or causal or insert not in (None, InsertSpec()):
        raise ValueError(f"{architecture} has no token map that this version knows, so it can have no language block")
    return external_spec(architecture, image_size, num_classes)


class LanguageInsert(nn.Module):
    """Two trained linear maps with the language layers and their final norm between them; see ``InsertSpec``.

    The layers are frozen unless ``insert.trainable``, the final norm always.
    """

    def __init__(self, hidden_size: int, spec: BlockSpec, insert: InsertSpec | None = None) -> None:
        super().__init__()
        insert = insert or InsertSpec()
        self.inner_residual = insert.residual in ("in", "both")
        self.outer_residual = insert.residual in ("out", "both")
        self.train_only = insert.train_only
        num_layers = insert.num_layers if insert.has_layers else 0
        self.mapper1 = nn.Linear(hidden_size, spec.hidden_size, bias=False)
        layers = [LlamaBlock(spec, insert.parts) for _ in range(num_layers)]
        between = [nn.GELU()] if insert.weights == "gelu" else layers
        self.block = between[0] if len(between) == 1 else nn.Sequential(*between)
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
        if self.train_only:
            if not self.training:
                return tokens
            through = -(-len(tokens) // 2)
            return torch.cat([self._detour(tokens[:through]), tokens[through:]])
        return self._detour(tokens)

    def _detour(self, tokens: Float[Tensor, "batch tokens hidden"]) -> Float[Tensor, "batch tokens hidden"]:
        mapped = self.mapper1(tokens)
        layers_type = next((weight.dtype for weight in self.block.parameters()), mapped.dtype)
        answer = self.final_norm(self.block(mapped.to(layers_type)).to(mapped.dtype)).to(tokens.dtype)
        if self.inner_residual:
            answer = answer + mapped
        answer = self.mapper2(answer)
        return tokens + answer if self.outer_residual else answer


class AffineInsert(nn.Module):
    """One trained affine map in the place of the language block and its two maps: ``insert.weights=affine``."""

    def __init__(self, hidden_size: int, insert: InsertSpec) -> None:
        super().__init__()
        self.outer_residual = insert.residual == "out"
        self.map = nn.Linear(hidden_size, hidden_size)

    def forward(self, tokens: Float[Tensor, "batch tokens hidden"]) -> Float[Tensor, "batch tokens hidden"]:
        """Return the mapped tokens."""
        mapped = self.map(tokens)
        return tokens + mapped if self.outer_residual else mapped


def build_model(spec: NetworkSpec, block: FrozenBlock | Sequence[FrozenBlock] | None = None) -> SegmentationModel:
    """Build the network that ``spec`` describes, with fresh trainable weights.

    All that lies outside the insert is drawn from one place of PyTorch's stream of random numbers: with one seed an
    architecture, its LLM counterpart and every variant of that start from the same weights there.

    Args:
        spec: the architecture.
        block: the language layers' weights, one block a layer in the language model's order. Without a block that
            ``spec.insert`` needs, the network starts from random frozen weights, which serves to count parameters.

    Raises:
        UsageError: the block's geometry is not the one in ``spec``, or it lacks layers or a norm that ``spec`` wants.
    """
    blocks = (block,) if isinstance(block, FrozenBlock) else tuple(block or ())
    if spec.block is None:
        if blocks:
            counterpart = f"llm-{spec.architecture}"
            choice = f"choose {counterpart} or drop the block" if counterpart in MODELS else "drop the block"
            raise UsageError(f"{spec.architecture} has no language block; {choice}")
        _draw_like_published(spec, None, torch.get_rng_state())
        return _network(spec, None)
    _check_blocks(spec.block, blocks)
    start = torch.get_rng_state()
    if spec.insert.weights == "affine":
        affine = AffineInsert(spec.token_width, spec.insert)
        _draw_like_published(spec, affine, start)
        return _network(spec, affine)
    insert = LanguageInsert(spec.token_width, spec.block, spec.insert)
    if blocks or not spec.insert.needs_block_file:
        _fill(insert, spec.insert, spec.block, blocks)
    if spec.insert.mapper_init == "trunc02" and not insert.mapper1.weight.is_meta:
        _draw_maps(insert, start)
    _draw_like_published(spec, insert, start)
    return _network(spec, insert)


def _unet(spec: UNetSpec, insert: nn.Module | None) -> SegmentationModel:
    return {"nearest": UNet, "transposed": UNetT}[spec.upsampling](spec, insert)


CONSTRUCTORS: Mapping[type[NetworkSpec], Callable[[Any, nn.Module | None], SegmentationModel]] = {
    ModelSpec: TransUNet,
    SwinUNetSpec: SwinUNet,
    DSTransUNetSpec: DSTransUNet,
    UNetSpec: _unet,
    ExternalSpec: ExternalNetwork,
}


def _network(spec: NetworkSpec, insert: nn.Module | None) -> SegmentationModel:
    return CONSTRUCTORS[type(spec)](spec, insert)


def frozen_names(model: nn.Module) -> set[str]:
    """Return the names of the parameters that no training changes, and that no checkpoint therefore holds."""
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def _draw_like_published(spec: NetworkSpec, insert: nn.Module | None, start: Tensor) -> None:
    """Bring PyTorch's stream to where drawing the published insert of this architecture takes it from ``start``.

    What is drawn next are then the weights with which the published model has always begun.
    """
    preset = MODELS.get(f"llm-{spec.architecture.removeprefix('llm-')}")
    published = preset(spec.image_size, spec.num_classes) if preset is not None else None
    if published is None or published.block is None:
        return
    with torch.device("meta"):
        left = _numbers_drawn(LanguageInsert(published.token_width, published.block))
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


def _numbers_drawn(insert: nn.Module) -> int:
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
