"""U-Net with BatchNorm, upsampled by transposed convolutions: ``unet-t``.

Source: Ronneberger et al. 2015, in the form of milesial/Pytorch-UNet ``unet_model.py``, ``UNet(bilinear=False)``.
Modules have the names that they have there.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from medseg_trt.networks import UNetSpec
from medseg_trt.train.models.global_batch import BatchNorm2d
from medseg_trt.train.models.segmentation_model import SegmentationModel, pass_pixels, three_channels


class DoubleConv(nn.Module):
    """Twice a 3x3 convolution without bias, BatchNorm and ReLU."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.double_conv = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
            BatchNorm2d(channels_out),
            nn.ReLU(),
            nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False),
            BatchNorm2d(channels_out),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.double_conv(x)


class Down(nn.Module):
    """Halve the height and width, and double the channels."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.maxpool_conv = nn.Sequential(nn.MaxPool2d(2), DoubleConv(channels_in, channels_out))

    def forward(self, x: Tensor) -> Tensor:
        return self.maxpool_conv(x)


class Up(nn.Module):
    """Double the height and width, pad to the skip connection's, join it, and convolve twice."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(channels_in, channels_out, 2, stride=2)
        self.conv = DoubleConv(channels_in, channels_out)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.up(x)
        rows, columns = skip.shape[2] - x.shape[2], skip.shape[3] - x.shape[3]  # 1 where the skip's size is odd
        if rows or columns:
            x = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        return self.conv(torch.cat([skip, x], dim=1))


class Head(nn.Module):
    """A 1x1 convolution."""

    def __init__(self, channels_in: int, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class UNetT(SegmentationModel):
    """U-Net; a language block stands between the deepest convolutions and the first upsampling."""

    def __init__(self, spec: UNetSpec, insert: nn.Module | None = None) -> None:
        super().__init__(spec)
        width = spec.width
        self.inc = DoubleConv(3, width)
        self.down1 = Down(width, 2 * width)
        self.down2 = Down(2 * width, 4 * width)
        self.down3 = Down(4 * width, 8 * width)
        self.down4 = Down(8 * width, 16 * width)
        self.insert = insert
        self.up1 = Up(16 * width, 8 * width)
        self.up2 = Up(8 * width, 4 * width)
        self.up3 = Up(4 * width, 2 * width)
        self.up4 = Up(2 * width, width)
        self.outc = Head(width, spec.num_classes)

    def forward(
        self, image: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch classes height width"]:
        """Return the logits."""
        whole = self.inc(three_channels(image))  # (b, 64, 256, 256)
        half = self.down1(whole)
        quarter = self.down2(half)
        eighth = self.down3(quarter)
        x = pass_pixels(self.insert, self.down4(eighth))  # (b, 1024, 16, 16)
        for up, skip in ((self.up1, eighth), (self.up2, quarter), (self.up3, half), (self.up4, whole)):
            x = up(x, skip)
        return self.outc(x)
