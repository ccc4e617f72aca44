"""Seeded random weights with which logits depend on the image, and are of one size, for every architecture.

With PyTorch's default initialisation, activations of the decoders shrink from layer to layer, and the logits have a
spread of only 0.003, too small for judging rounding. Here every convolution preserves the variance of its input (He et
al. 2015), and the logits have a spread of ``LOGIT_SPREAD``, centred where the last layer has a bias. Besides:

- TransUNet: the branches of the residual units are small compared with their inputs, as in trained networks (Goyal et
  al. 2017, §5.1, initialise them with zero)
- U-Net: BatchNorm has the statistics of images. Without them, what all pixels have in common grows from layer to layer,
  and the logits of one image are almost those of another.
- Swin-UNet: the LayerNorms after the encoder and after the decoder are centred over the tokens of images, for the same
  reason
- DS-TransUNet: nothing; its GroupNorms divide by the spread of every image
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from medseg_trt.train.models.ds_transunet import DSTransUNet
from medseg_trt.train.models.segmentation_model import SegmentationModel
from medseg_trt.train.models.swin_unet import SwinUNet
from medseg_trt.train.models.transunet import StdConv2d, TransUNet
from medseg_trt.train.models.unet import UNet

POSITION_STD = 0.02  # of the position embedding, as ViT starts
LOGIT_SPREAD = 1.0  # standard deviation over the pixels of real images; at 3, float32 itself is off by more than 1e-4
RESIDUAL_SCALE = 0.1  # of the last norm of a residual unit


@dataclass(frozen=True, kw_only=True, slots=True)
class Initialisation:
    """What a network needs besides convolutions that preserve the variance."""

    last_layer: str  # the convolution that makes the logits
    adjust: Callable[[SegmentationModel, Tensor], None] = lambda model, images: None  # before the last layer is scaled


def initialise(model: SegmentationModel, images: Tensor) -> None:
    """Give a network weights with which numbers keep their size from the first layer to the last.

    Args:
        model: of one of ``INITIALISATIONS``, in the state in which it was made; it is in evaluation mode afterwards.
        images: (batch, 3, height, width), on which statistics are taken and the last layer is set up.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and not isinstance(module, StdConv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    chosen = INITIALISATIONS[type(model)]
    last = model.get_submodule(chosen.last_layer)
    assert isinstance(last, nn.Conv2d)
    with torch.no_grad():
        chosen.adjust(model.eval(), images)
        last.weight *= LOGIT_SPREAD / model(images).std()
        if last.bias is not None:
            last.bias -= model(images).median()


def _small_branches(model: SegmentationModel, images: Tensor) -> None:
    assert isinstance(model, TransUNet)
    for name, module in model.named_modules():
        if isinstance(module, nn.GroupNorm) and name.endswith(".gn3"):
            nn.init.constant_(module.weight, RESIDUAL_SCALE)
    nn.init.normal_(model.position_embedding, std=POSITION_STD)


def _statistics_of_images(model: SegmentationModel, images: Tensor) -> None:
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momentum = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = None  # the mean over all batches, of which there is one
    model(images)
    for norm, value in zip(norms, momentum, strict=True):
        norm.eval().momentum = value


def _centred_tokens(model: SegmentationModel, images: Tensor) -> None:
    for name in ("norm", "norm_up"):
        norm = model.get_submodule(name)
        assert isinstance(norm, nn.LayerNorm)
        tokens: list[Tensor] = []
        with norm.register_forward_hook(lambda module, taken, given, tokens=tokens: tokens.append(given)):
            model(images)
        norm.bias.sub_(tokens[0].mean(dim=(0, 1)))


INITIALISATIONS: Mapping[type[SegmentationModel], Initialisation] = {
    TransUNet: Initialisation(last_layer="head", adjust=_small_branches),
    UNet: Initialisation(last_layer="Conv_1x1", adjust=_statistics_of_images),
    SwinUNet: Initialisation(last_layer="output", adjust=_centred_tokens),
    DSTransUNet: Initialisation(last_layer="final"),
}
