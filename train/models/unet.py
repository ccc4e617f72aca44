"""U-Net with BatchNorm, upsampled by the nearest pixel and a convolution: ``unet``.

Source: Ronneberger et al. 2015, in the form of LeeJunHyun/Image_Segmentation ``network.py``, class ``U_Net``, and
bigmb/Nest-of-Unets, which the authors of Swin-UNet compare with. Modules have the names that they have there.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from medseg_trt.networks import UNetSpec
from medseg_trt.train.models.global_batch import BatchNorm2d
from medseg_trt.train.models.segmentation_model import SegmentationModel, pass_pixels, three_channels


class DoubleConv(nn.Module):
    """Twice a 3x3 convolution, BatchNorm and ReLU."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 3, padding=1),
            BatchNorm2d(channels_out),
            nn.ReLU(),
            nn.Conv2d(channels_out, channels_out, 3, padding=1),
            BatchNorm2d(channels_out),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class UpConv(nn.Module):
    """Double the height and width, and halve the channels."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.up = nn.Sequential(
            nn.Upsample(scale_factor=2),
            nn.Conv2d(channels_in, channels_out, 3, padding=1),
            BatchNorm2d(channels_out),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x)


class UNet(SegmentationModel):
    """U-Net; a language block stands between the deepest convolutions and the first upsampling."""

    def __init__(self, spec: UNetSpec, insert: nn.Module | None = None) -> None:
        super().__init__(spec)
        width = spec.width
        self.pool = nn.MaxPool2d(2)
        self.Conv1 = DoubleConv(3, width)
        self.Conv2 = DoubleConv(width, 2 * width)
        self.Conv3 = DoubleConv(2 * width, 4 * width)
        self.Conv4 = DoubleConv(4 * width, 8 * width)
        self.Conv5 = DoubleConv(8 * width, 16 * width)
        self.insert = insert
        self.Up5 = UpConv(16 * width, 8 * width)
        self.Up_conv5 = DoubleConv(16 * width, 8 * width)
        self.Up4 = UpConv(8 * width, 4 * width)
        self.Up_conv4 = DoubleConv(8 * width, 4 * width)
        self.Up3 = UpConv(4 * width, 2 * width)
        self.Up_conv3 = DoubleConv(4 * width, 2 * width)
        self.Up2 = UpConv(2 * width, width)
        self.Up_conv2 = DoubleConv(2 * width, width)
        self.Conv_1x1 = nn.Conv2d(width, spec.num_classes, 1)

    def forward(
        self, image: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch classes height width"]:
        """Return the logits."""
        whole = self.Conv1(three_channels(image))  # (b, 64, 256, 256)
        half = self.Conv2(self.pool(whole))
        quarter = self.Conv3(self.pool(half))
        eighth = self.Conv4(self.pool(quarter))
        x = pass_pixels(self.insert, self.Conv5(self.pool(eighth)))  # (b, 1024, 16, 16)
        x = self.Up_conv5(torch.cat([eighth, self.Up5(x)], dim=1))
        x = self.Up_conv4(torch.cat([quarter, self.Up4(x)], dim=1))
        x = self.Up_conv3(torch.cat([half, self.Up3(x)], dim=1))
        x = self.Up_conv2(torch.cat([whole, self.Up2(x)], dim=1))
        return self.Conv_1x1(x)
