"""TransUNet: an R50 stem, a vision transformer on its last feature map, and a decoder with skip connections.

Source: Chen et al. 2021, "TransUNet"; layer by layer as Beckschen/TransUNet ``networks/vit_seg_modeling.py`` and
``vit_seg_modeling_resnet_skip.py``, without their module-global configuration, and for any image size that
is a multiple of 16.

Shapes are given for a 256 x 256 image and the published widths: (batch, channels, height, width), (batch, tokens,
hidden).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from medseg_trt.network_spec import ModelSpec
from medseg_trt.train.models.global_batch import BatchNorm2d, Dropout
from medseg_trt.train.models.segmentation_model import SegmentationModel, three_channels

GROUPS = 32  # of every GroupNorm but the one in a bottleneck's shortcut
NORM_EPS = 1e-6
STANDARDISE_EPS = 1e-5
EXPANSION = 4  # a bottleneck's output is four times as wide as its middle


class StdConv2d(nn.Conv2d):
    """A convolution whose kernel is brought to zero mean and unit variance per output channel before it is used.

    Source: Qiao et al. 2019, "Weight Standardization", eq. 5; the variance is the biased one.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.standardised(), self.bias, self.stride, self.padding, self.dilation, self.groups)

    def standardised(self) -> Tensor:
        """Return the kernel that the convolution really uses."""
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True, correction=0)
        return (self.weight - mean) / torch.sqrt(variance + STANDARDISE_EPS)


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride), 1x1 convolutions, each with GroupNorm, added to a shortcut before the last ReLU."""

    def __init__(self, channels_in: int, channels_middle: int, stride: int = 1) -> None:
        super().__init__()
        channels_out = channels_middle * EXPANSION
        self.conv1 = StdConv2d(channels_in, channels_middle, 1, bias=False)
        self.gn1 = nn.GroupNorm(GROUPS, channels_middle, NORM_EPS)
        self.conv2 = StdConv2d(channels_middle, channels_middle, 3, stride, padding=1, bias=False)
        self.gn2 = nn.GroupNorm(GROUPS, channels_middle, NORM_EPS)
        self.conv3 = StdConv2d(channels_middle, channels_out, 1, bias=False)
        self.gn3 = nn.GroupNorm(GROUPS, channels_out, NORM_EPS)
        self.shortcut = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            # One group per channel and PyTorch's default eps of 1e-5, as in the published code.
            self.shortcut = nn.Sequential(
                StdConv2d(channels_in, channels_out, 1, stride, bias=False), nn.GroupNorm(channels_out, channels_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.gn1(self.conv1(x)))
        y = F.relu(self.gn2(self.conv2(y)))
        return F.relu(self.gn3(self.conv3(y)) + self.shortcut(x))


class ResNetStem(nn.Module):
    """The convolutional half of the encoder; its last feature map has 1/16 of the image's height and width."""

    def __init__(self, width: int, units: Sequence[int]) -> None:
        super().__init__()
        self.root = nn.Sequential(
            StdConv2d(3, width, 7, stride=2, padding=3, bias=False), nn.GroupNorm(GROUPS, width, NORM_EPS), nn.ReLU()
        )
        self.pool = nn.MaxPool2d(3, stride=2)  # no padding: one pixel short of a quarter of the image
        middles = (width, width * 2, width * 4)
        self.block1 = _stage(width, middles[0], units[0], stride=1)
        self.block2 = _stage(middles[0] * EXPANSION, middles[1], units[1], stride=2)
        self.block3 = _stage(middles[1] * EXPANSION, middles[2], units[2], stride=2)
        self.channels_out = middles[2] * EXPANSION
        self.skip_channels = (middles[1] * EXPANSION, middles[0] * EXPANSION, width, 0)  # the last stage has no skip

    def forward(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        half = self.root(image)  # (b, 64, 128, 128)
        quarter = self.block1(self.pool(half))  # (b, 256, 63, 63)
        eighth = self.block2(quarter)  # (b, 512, 32, 32)
        sixteenth = self.block3(eighth)  # (b, 1024, 16, 16)
        rows, columns = image.shape[2] // 4, image.shape[3] // 4
        padded = F.pad(quarter, (0, columns - quarter.shape[3], 0, rows - quarter.shape[2]))  # (b, 256, 64, 64)
        return sixteenth, [eighth, padded, half]


class Attention(nn.Module):
    """Multi-head self-attention with separate, biased query, key, value and output projections."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(hidden_size, hidden_size)
        self.value = nn.Linear(hidden_size, hidden_size)
        self.out = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            projection(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (b, 256, 768) -> (b, 12, 256, 64)
            for projection in (self.query, self.key, self.value)
        )
        return self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class EncoderLayer(nn.Module):
    """One pre-norm transformer layer of ViT-B/16."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_size: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(hidden_size, NORM_EPS)
        self.attention = Attention(hidden_size, num_heads)
        self.mlp_norm = nn.LayerNorm(hidden_size, NORM_EPS)
        self.fc1 = nn.Linear(hidden_size, mlp_size)
        self.fc2 = nn.Linear(mlp_size, hidden_size)
        self.dropout = Dropout(dropout)
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.normal_(layer.bias, std=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        hidden = self.dropout(F.gelu(self.fc1(self.mlp_norm(x))))
        return x + self.dropout(self.fc2(hidden))


class ConvNormReLU(nn.Sequential):
    """A 3x3 convolution without bias, BatchNorm, ReLU."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        conv = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
        super().__init__(conv, BatchNorm2d(channels_out), nn.ReLU())


class DecoderStage(nn.Module):
    """Double the height and width, join the skip connection, and convolve twice."""

    def __init__(self, channels_in: int, channels_skip: int, channels_out: int) -> None:
        super().__init__()
        self.upsample = nn.UpsamplingBilinear2d(scale_factor=2)  # corners aligned
        self.conv1 = ConvNormReLU(channels_in + channels_skip, channels_out)
        self.conv2 = ConvNormReLU(channels_out, channels_out)

    def forward(self, x: Tensor, skip: Tensor | None) -> Tensor:
        x = self.upsample(x)
        if skip is not None:
            x = torch.cat([x, skip], dim=1)
        return self.conv2(self.conv1(x))


class TransUNet(SegmentationModel):
    """Segment a picture: pixels in, logits of the same height and width out.

    Args:
        spec: the architecture.
        insert: what the tokens pass through at ``spec.insert_position``, which is before ``encoder_norm`` as published:
            the language block of LLM-TransUNet, or nothing.
    """

    def __init__(self, spec: ModelSpec, insert: nn.Module | None = None) -> None:
        super().__init__(spec)
        self.insert_position, self.grid = spec.insert_position, spec.grid
        self.resnet = ResNetStem(spec.resnet_width, spec.resnet_units)
        self.patch_embedding = nn.Conv2d(self.resnet.channels_out, spec.hidden_size, 1)
        rows, columns = spec.grid
        self.position_embedding = nn.Parameter(torch.zeros(1, rows * columns, spec.hidden_size))
        self.dropout = Dropout(spec.dropout)
        self.layers = nn.ModuleList(
            EncoderLayer(spec.hidden_size, spec.num_heads, spec.mlp_size, spec.dropout) for _ in range(spec.num_layers)
        )
        self.insert = insert
        self.encoder_norm = nn.LayerNorm(spec.hidden_size, NORM_EPS)
        self.bridge = ConvNormReLU(spec.hidden_size, spec.bridge_channels)
        widths = (spec.bridge_channels, *spec.decoder_channels)
        self.decoder = nn.ModuleList(
            DecoderStage(widths[stage], self.resnet.skip_channels[stage], widths[stage + 1]) for stage in range(4)
        )
        self.head = nn.Conv2d(widths[-1], spec.num_classes, 3, padding=1)

    @property
    def norm_after_insert(self) -> str | None:
        """The name of the LayerNorm that takes what the insert returns, and nothing else; None: there is none."""
        return "encoder_norm" if self.insert_position == len(self.layers) else None

    def forward(
        self, image: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch classes height width"]:
        """Return the logits.

        Args:
            image: normalised pixels with 1 or 3 channels; one channel is repeated three times.
        """
        features, skips = self.resnet(three_channels(image))
        tokens = self.patch_embedding(features).flatten(2).transpose(1, 2)  # (b, 1024, 16, 16) -> (b, 256, 768)
        tokens = self.dropout(tokens + self.position_embedding)
        stages = [*self.layers, self.encoder_norm]
        if self.insert is not None:
            stages.insert(self.insert_position, self.insert)
        for stage in stages:
            tokens = stage(tokens)
        x = self.bridge(tokens.transpose(1, 2).unflatten(2, self.grid))  # (b, 512, 16, 16)
        for decoder, skip in zip(self.decoder, [*skips, None], strict=True):
            x = decoder(x, skip)
        return self.head(x)


def _stage(channels_in: int, channels_middle: int, units: int, stride: int) -> nn.Sequential:
    first = Bottleneck(channels_in, channels_middle, stride)
    rest = (Bottleneck(channels_middle * EXPANSION, channels_middle) for _ in range(units - 1))
    return nn.Sequential(first, *rest)
