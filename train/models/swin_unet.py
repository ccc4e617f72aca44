"""Swin-UNet: a Swin-T encoder of two blocks a stage, and a decoder of the same blocks that expands patches.

Source: Cao et al. 2022, "Swin-Unet"; layer by layer as HuCaoFighting/Swin-Unet
``swin_transformer_unet_skip_expand_decoder_sys.py``. Modules have the names that they have there, without
``swin_unet.`` in front.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from medseg_trt.networks import SwinUNetSpec
from medseg_trt.train.models.segmentation_model import SegmentationModel, three_channels
from medseg_trt.train.models.swin import PatchEmbed, PatchMerging, drop_path_stages, init_linear, swin_blocks

PATCH = 4  # pixels


class PatchExpand(nn.Module):
    """Split every token into ``factor`` x ``factor`` neighbours.

    Args:
        width: of a token.
        grid: rows and columns of tokens.
        factor: 2 halves the width; 4 keeps it.
    """

    def __init__(self, width: int, grid: tuple[int, int], factor: int) -> None:
        super().__init__()
        self.grid, self.factor = grid, factor
        width_out = width // 2 if factor == 2 else width
        self.expand = nn.Linear(width, factor**2 * width_out, bias=False)
        self.norm = nn.LayerNorm(width_out)

    def forward(self, tokens: Float[Tensor, "batch tokens hidden"]) -> Float[Tensor, "batch more narrower"]:
        """Return the neighbours, row by row."""
        split = self.expand(tokens).unflatten(2, (self.factor, self.factor, -1)).unflatten(1, self.grid)
        return self.norm(split.transpose(2, 3).flatten(1, 4))  # (b, rows, columns, factor, factor, width)


class EncoderStage(nn.Module):
    """Swin blocks, then merging, which the last stage has not."""

    def __init__(self, blocks: nn.ModuleList, downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = blocks
        self.downsample = downsample

    def forward(self, tokens: Tensor) -> Tensor:
        for block in self.blocks:
            tokens = block(tokens)
        return tokens if self.downsample is None else self.downsample(tokens)


class DecoderStage(nn.Module):
    """Swin blocks, then expansion, which the last stage has not."""

    def __init__(self, blocks: nn.ModuleList, upsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = blocks
        self.upsample = upsample

    def forward(self, tokens: Tensor) -> Tensor:
        for block in self.blocks:
            tokens = block(tokens)
        return tokens if self.upsample is None else self.upsample(tokens)


class SwinUNet(SegmentationModel):
    """Swin-UNet; a language block stands after the last encoder stage, before its norm or after it."""

    def __init__(self, spec: SwinUNetSpec, insert: nn.Module | None = None) -> None:
        super().__init__(spec)
        self.insert_position = ("before_norm", "after_norm").index(str(spec.insert.placement))
        widths = [spec.width << stage for stage in range(4)]
        grids = [spec.grid_of(stage) for stage in range(4)]
        rates = drop_path_stages(spec.drop_path, spec.depths)

        def blocks(stage: int) -> nn.ModuleList:
            window = spec.window_of(stage)
            shift = window // 2 if min(grids[stage]) > window else 0  # one window needs no shift
            return swin_blocks(widths[stage], grids[stage], spec.num_heads[stage], window, shift, rates[stage])

        self.patch_embed = PatchEmbed(PATCH, spec.width)
        self.layers = nn.ModuleList(
            EncoderStage(blocks(stage), PatchMerging(widths[stage], grids[stage]) if stage < 3 else None)
            for stage in range(4)
        )
        self.insert = insert
        self.norm = nn.LayerNorm(widths[3])
        decoder = (
            DecoderStage(blocks(stage), PatchExpand(widths[stage], grids[stage], 2) if stage else None)
            for stage in (2, 1, 0)
        )
        self.layers_up = nn.ModuleList([PatchExpand(widths[3], grids[3], 2), *decoder])
        joins = (nn.Linear(2 * widths[stage], widths[stage]) for stage in (2, 1, 0))
        self.concat_back_dim = nn.ModuleList([nn.Identity(), *joins])  # the first decoder stage joins nothing
        self.norm_up = nn.LayerNorm(spec.width)
        self.up = PatchExpand(spec.width, grids[0], PATCH)
        self.output = nn.Conv2d(spec.width, spec.num_classes, 1, bias=False)
        for part in (self.layers, self.layers_up, self.concat_back_dim, self.up):
            part.apply(init_linear)

    @property
    def norm_after_insert(self) -> str | None:
        """The name of the LayerNorm that takes what the insert returns, and nothing else; None: there is none."""
        return "norm" if self.insert_position == 0 else None

    def forward(
        self, image: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch classes height width"]:
        """Return the logits."""
        tokens, skips = self.patch_embed(three_channels(image)), list[Tensor]()  # (b, 56 * 56, 96) of 224 x 224
        for stage in self.layers:
            skips.append(tokens)
            tokens = stage(tokens)
        stages: list[nn.Module] = [self.norm]
        if self.insert is not None:
            stages.insert(self.insert_position, self.insert)
        for stage in stages:
            tokens = stage(tokens)
        for stage, join, skip in zip(self.layers_up, self.concat_back_dim, reversed(skips), strict=True):
            if isinstance(join, nn.Linear):
                tokens = join(torch.cat([tokens, skip], dim=2))
            tokens = stage(tokens)
        pixels = self.up(self.norm_up(tokens)).unflatten(1, self.spec.image_size)
        return self.output(pixels.permute(0, 3, 1, 2))
