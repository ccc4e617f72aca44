"""DS-TransUNet: two Swin encoders of coarse and fine patches, fused by attention, and a decoder with Swin blocks.

Source: Lin et al. 2022, "DS-TransUNet"; layer by layer as TianBaoGe/DS-TransUNet ``lib/DS_TransUNet.py``. Modules have
the names that they have there. ``ds-transunet-l`` is not in that code: it is the same with Swin-L as first encoder.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from medseg_trt.networks import DSTransUNetSpec, Four
from medseg_trt.train.models.cross_scale import CrossScale
from medseg_trt.train.models.segmentation_model import SegmentationModel, pass_pixels, three_channels
from medseg_trt.train.models.swin import PatchEmbed, PatchMerging, drop_path_stages, init_linear, swin_blocks

FINE_PATCH, COARSE_PATCH = 4, 8  # pixels


class SwinStage(nn.Module):
    """Swin blocks, every second one shifted; merging, if there is any, is called by itself."""

    def __init__(self, blocks: nn.ModuleList, downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.blocks = blocks
        if downsample is not None:
            self.downsample = downsample

    def forward(self, tokens: Tensor) -> Tensor:
        for block in self.blocks:
            tokens = block(tokens)
        return tokens


class SwinEncoder(nn.Module):
    """A Swin transformer that returns the map of each of its four stages, each with a norm of its own.

    Args:
        spec: for the image size and the window.
        patch: pixels of a side.
        width: of the first stage's tokens.
        depths: blocks of every stage.
        num_heads: of every stage.
        drop_path: of the last block.
    """

    def __init__(
        self, spec: DSTransUNetSpec, patch: int, width: int, depths: Four, num_heads: Four, drop_path: float
    ) -> None:
        super().__init__()
        rates = drop_path_stages(drop_path, depths)
        self.grids = [tuple(side // patch >> stage for side in spec.image_size) for stage in range(4)]
        self.patch_embed = PatchEmbed(patch, width)
        stages: list[nn.Module] = []
        for stage, (rows, columns) in enumerate(self.grids):
            grid, wide = (rows, columns), width << stage
            blocks = swin_blocks(wide, grid, num_heads[stage], spec.window, spec.window // 2, rates[stage])
            stages.append(SwinStage(blocks, PatchMerging(wide, grid) if stage < 3 else None))
        self.layers = nn.ModuleList(stages)
        for stage in range(4):
            self.add_module(f"norm{stage}", nn.LayerNorm(width << stage))
        self.apply(init_linear)

    def forward(self, image: Tensor, insert: nn.Module | None = None) -> list[Tensor]:
        """Return the maps, the largest first.

        Args:
            image: of three channels.
            insert: what the last stage's tokens pass before their norm.
        """
        tokens, maps = self.patch_embed(image), list[Tensor]()
        for number, (stage, grid) in enumerate(zip(self.layers, self.grids, strict=True)):
            tokens = stage(tokens)
            passed = insert(tokens) if insert is not None and number == 3 else tokens
            normed = self.get_submodule(f"norm{number}")(passed)
            maps.append(normed.transpose(1, 2).unflatten(2, grid))
            if number < 3:
                tokens = stage.get_submodule("downsample")(tokens)  # of the tokens before the norm
        return maps


class ConvBlock(nn.Module):
    """Twice a 3x3 convolution, GroupNorm and ReLU, after a pooling where ``pools``."""

    def __init__(self, channels_in: int, channels_out: int, groups: int, *, pools: bool = False) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            *([nn.MaxPool2d(2)] if pools else []),
            nn.Conv2d(channels_in, channels_out, 3, padding=1),
            nn.GroupNorm(groups, channels_out),
            nn.ReLU(),
            nn.Conv2d(channels_out, channels_out, 3, padding=1),
            nn.GroupNorm(groups, channels_out),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Up(nn.Module):
    """Double the height and width by the nearest pixel, and halve the channels."""

    def __init__(self, channels_in: int, groups: int) -> None:
        super().__init__()
        self.up = nn.Sequential(
            nn.Upsample(scale_factor=2),
            nn.Conv2d(channels_in, channels_in // 2, 3, padding=1),
            nn.GroupNorm(groups, channels_in // 2),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x)


class UpSwin(nn.Module):
    """Upsample, two Swin blocks without a norm after them, and half the channels again."""

    def __init__(self, spec: DSTransUNetSpec, channels_in: int, grid: tuple[int, int]) -> None:
        super().__init__()
        width = channels_in // 2
        heads, rates = width // spec.decoder_head_width, (0.0, spec.decoder_drop_path)
        self.grid = grid
        self.up = Up(channels_in, spec.groups)
        self.layer = SwinStage(swin_blocks(width, grid, heads, spec.window, spec.window // 2, rates))
        self.conv_relu = nn.Sequential(nn.Conv2d(width, width // 2, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.layer(self.up(x).flatten(2).transpose(1, 2))
        return self.conv_relu(tokens.transpose(1, 2).unflatten(2, self.grid))


class SwinDecoder(nn.Module):
    """A decoder stage with Swin blocks; half of what it joins is the skip connection."""

    def __init__(self, spec: DSTransUNetSpec, channels_in: int, grid: tuple[int, int]) -> None:
        super().__init__()
        width = channels_in // 2
        self.up = UpSwin(spec, channels_in, grid)
        self.conv2 = nn.Sequential(nn.Conv2d(width, width // 2, 1), nn.ReLU())
        self.conv_relu = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU())

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.conv_relu(torch.cat([self.conv2(skip), self.up(x)], dim=1))


class ConvDecoder(nn.Module):
    """A decoder stage of convolutions alone; the last convolution has no norm."""

    def __init__(self, channels_in: int, groups: int) -> None:
        super().__init__()
        self.up = Up(channels_in, groups)
        self.conv_relu = nn.Sequential(nn.Conv2d(channels_in, channels_in // 2, 3, padding=1), nn.ReLU())

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.conv_relu(torch.cat([skip, self.up(x)], dim=1))


class DSTransUNet(SegmentationModel):
    """DS-TransUNet; a language block stands at the deepest map, of both encoders fused or of the first one alone."""

    def __init__(self, spec: DSTransUNetSpec, insert: nn.Module | None = None) -> None:
        super().__init__(spec)
        self.inserts_into_encoder = spec.insert.placement == "encoder"
        self.has_auxiliary_relu = spec.auxiliary_relu
        width, groups, classes = spec.decoder_width, spec.groups, spec.num_classes
        self.encoder = SwinEncoder(spec, FINE_PATCH, spec.width, spec.depths, spec.num_heads, spec.drop_path)
        self.encoder2 = SwinEncoder(
            spec, COARSE_PATCH, spec.coarse_width, spec.coarse_depths, spec.coarse_num_heads, spec.coarse_drop_path
        )
        for stage in range(4):
            fine, coarse = spec.width << stage, spec.coarse_width << stage
            self.add_module(f"cross_att_{stage + 1}", CrossScale(fine, coarse))
            self.add_module(f"change{stage + 1}", ConvBlock(fine + coarse, width << stage, groups))
        self.insert = insert
        grids = [(spec.image_size[0] // stride, spec.image_size[1] // stride) for stride in (16, 8, 4)]
        self.layer1 = SwinDecoder(spec, 8 * width, grids[0])
        self.layer2 = SwinDecoder(spec, 4 * width, grids[1])
        self.layer3 = SwinDecoder(spec, 2 * width, grids[2])
        self.layer4 = ConvDecoder(width, groups)
        self.layer5 = ConvDecoder(width // 2, groups)
        self.down1 = nn.Conv2d(3, width // 4, 1)
        self.down2 = ConvBlock(width // 4, width // 2, groups, pools=True)
        self.final = nn.Conv2d(width // 4, classes, 1)
        if spec.deep_supervision:
            self.loss1 = nn.Sequential(nn.Conv2d(8 * width, classes, 1))
            self.loss2 = nn.Sequential(nn.Conv2d(width, classes, 1))

    @property
    def norm_after_insert(self) -> str | None:
        """The name of the LayerNorm that takes what the insert returns, and nothing else; None: there is none."""
        return "encoder.norm3" if self.inserts_into_encoder else None

    def forward(self, image: Float[Tensor, "batch channels height width"]) -> Tensor | tuple[Tensor, ...]:
        """Return the logits; in training with deep supervision a tuple of them and of the two auxiliary ones."""
        image = three_channels(image)
        whole = self.down1(image)  # (b, 32, 256, 256)
        half = self.down2(whole)
        fourth, eighth, sixteenth, deepest = self._fused(image)  # (b, 128, 64, 64) … (b, 1024, 8, 8)
        x = self.layer1(deepest, sixteenth)
        x = self.layer2(x, eighth)
        quarter = self.layer3(x, fourth)
        logits = self.final(self.layer5(self.layer4(quarter, half), whole))
        if not self.training or not hasattr(self, "loss1"):
            return logits
        return logits, self._auxiliary(self.loss1(deepest), logits), self._auxiliary(self.loss2(quarter), logits)

    def _fused(self, image: Tensor) -> list[Tensor]:
        """Return the maps of both encoders as one each, the largest first."""
        fine_maps = self.encoder(image, self.insert if self.inserts_into_encoder else None)
        fused: list[Tensor] = []
        for number, (fine, coarse) in enumerate(zip(fine_maps, self.encoder2(image), strict=True), 1):
            fine, coarse = self.get_submodule(f"cross_att_{number}")(fine, coarse)
            joined = torch.cat([fine, F.interpolate(coarse, scale_factor=2.0)], dim=1)
            fused.append(self.get_submodule(f"change{number}")(joined))
        if not self.inserts_into_encoder:
            fused[3] = pass_pixels(self.insert, fused[3])
        return fused

    def _auxiliary(self, logits: Tensor, like: Tensor) -> Tensor:
        """Return auxiliary logits in the size of the others."""
        logits = F.relu(logits) if self.has_auxiliary_relu else logits
        return F.interpolate(logits, size=like.shape[2:])
