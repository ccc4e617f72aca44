"""The published forward passes of U-Net, Swin-UNet and DS-TransUNet, written once more under the authors' own names.

An oracle: nothing of ``medseg_trt.train`` is used. Written from what the layers compute, as functions of a state dict,
in evaluation mode. Windows are not cut out: every token attends to all tokens of the map, and those of other windows
get a score of minus infinity. ``Details`` are the details that are easy to get wrong; its defaults are the published
ones.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

State = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Details:
    """What the published networks do, detail by detail."""

    layer_norm_eps: float = 1e-5
    gelu: str = "none"  # or "tanh"
    merge_order: tuple[tuple[int, int], ...] = ((0, 0), (1, 0), (0, 1), (1, 1))  # (row, column) of the four neighbours
    expands_rows_first: bool = True
    masks_shifts: bool = True
    masks_padding: bool = False
    query_minus_key: bool = True
    skip_first: bool = True  # in a concatenation; Swin-UNet has it last
    norms_stages: bool = True  # norm0 … norm3 of DS-TransUNet
    upsampling: str = "nearest"
    encoder_head_width: int = 32
    decoder_head_width: int = 64


@dataclass(frozen=True, kw_only=True)
class Net:
    """A state dict with the details of the network it is of."""

    state: State
    details: Details

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"))

    def conv(self, name: str, x: Tensor, padding: int = 0, stride: int = 1) -> Tensor:
        return F.conv2d(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"), stride, padding)

    def layer_norm(self, name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1, keepdim=True) + self.details.layer_norm_eps).sqrt()
        return centred / deviation * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def batch_norm(self, name: str, x: Tensor) -> Tensor:
        mean, variance, weight, bias = (
            self.state[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (variance + 1e-5).sqrt() * weight + bias

    def group_norm(self, name: str, x: Tensor, groups: int) -> Tensor:
        grouped = x.reshape(len(x), groups, -1)
        centred = grouped - grouped.mean(-1, keepdim=True)
        unit = (centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()).reshape(x.shape)
        return unit * self.state[f"{name}.weight"][:, None, None] + self.state[f"{name}.bias"][:, None, None]

    def upsample(self, x: Tensor) -> Tensor:
        if self.details.upsampling == "nearest":
            return x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)

    def join(self, skip: Tensor, x: Tensor) -> Tensor:
        return torch.cat([skip, x] if self.details.skip_first else [x, skip], 1)


def unet_logits(state: State, image: Tensor, details: Details | None = None) -> Tensor:
    """Return the logits of LeeJunHyun's U-Net."""
    net = Net(state=state, details=details or Details())

    def double(name: str, x: Tensor) -> Tensor:
        for number in (0, 3):
            x = F.relu(net.batch_norm(f"{name}.{number + 1}", net.conv(f"{name}.{number}", x, padding=1)))
        return x

    maps = [double("Conv1.conv", image)]
    for number in range(2, 6):
        maps.append(double(f"Conv{number}.conv", F.max_pool2d(maps[-1], 2)))
    x = maps[-1]
    for number in range(5, 1, -1):
        up = net.conv(f"Up{number}.up.1", net.upsample(x), padding=1)
        up = F.relu(net.batch_norm(f"Up{number}.up.2", up))
        x = double(f"Up_conv{number}.conv", net.join(maps[number - 2], up))
    return net.conv("Conv_1x1", x)


def unet_t_logits(state: State, image: Tensor, details: Details | None = None) -> Tensor:
    """Return the logits of milesial's U-Net with transposed convolutions."""
    net = Net(state=state, details=details or Details())

    def double(name: str, x: Tensor) -> Tensor:
        for number in (0, 3):
            x = F.relu(net.batch_norm(f"{name}.{number + 1}", net.conv(f"{name}.{number}", x, padding=1)))
        return x

    maps = [double("inc.double_conv", image)]
    for number in range(1, 5):
        maps.append(double(f"down{number}.maxpool_conv.1.double_conv", F.max_pool2d(maps[-1], 2)))
    x = maps[-1]
    for number in range(1, 5):
        weight, bias = state[f"up{number}.up.weight"], state[f"up{number}.up.bias"]  # (in, out, 2, 2)
        small = torch.einsum("bchw,cors->bohrws", x, weight)
        up = small.flatten(4, 5).flatten(2, 3) + bias[:, None, None]
        skip = maps[4 - number]
        wide = torch.zeros(*up.shape[:2], *skip.shape[2:], dtype=up.dtype)
        top, left = (skip.shape[2] - up.shape[2]) // 2, (skip.shape[3] - up.shape[3]) // 2
        wide[:, :, top : top + up.shape[2], left : left + up.shape[3]] = up
        x = double(f"up{number}.conv.double_conv", net.join(skip, wide))
    return net.conv("outc.conv", x)


def swin_unet_logits(state: State, image: Tensor, details: Details | None = None) -> Tensor:
    """Return the logits of Swin-UNet, whose windows have a 32nd of the shorter side."""
    net = Net(state=state, details=details or Details())
    window = min(image.shape[2:]) // 32

    def blocks(name: str, pixels: Tensor) -> Tensor:
        one_window = min(pixels.shape[1:3]) <= window
        return swin_blocks(net, name, pixels, window, 0 if one_window else window // 2, net.details.encoder_head_width)

    pixels = net.layer_norm("patch_embed.norm", net.conv("patch_embed.proj", image, stride=4).permute(0, 2, 3, 1))
    skips = []
    for stage in range(4):
        skips.append(pixels)
        pixels = blocks(f"layers.{stage}", pixels)
        if stage < 3:
            pixels = _merge(net, f"layers.{stage}.downsample", pixels)
    pixels = _expand(net, "layers_up.0", net.layer_norm("norm", pixels), 2)
    for stage in range(1, 4):
        skip = skips[3 - stage]
        joined = [pixels, skip] if net.details.skip_first else [skip, pixels]
        pixels = blocks(f"layers_up.{stage}", net.linear(f"concat_back_dim.{stage}", torch.cat(joined, -1)))
        if stage < 3:
            pixels = _expand(net, f"layers_up.{stage}.upsample", pixels, 2)
    pixels = _expand(net, "up", net.layer_norm("norm_up", pixels), 4)
    return net.conv("output", pixels.permute(0, 3, 1, 2))


def ds_transunet_logits(
    state: State, image: Tensor, details: Details | None = None, *, groups: int = 32
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logits of DS-TransUNet and those of its two auxiliary heads."""
    net = Net(state=state, details=details or Details())

    def double(name: str, x: Tensor, first: int = 0) -> Tensor:
        for number in (first, first + 3):
            x = F.relu(
                net.group_norm(f"{name}.conv.{number + 1}", net.conv(f"{name}.conv.{number}", x, padding=1), groups)
            )
        return x

    def up(name: str, x: Tensor) -> Tensor:
        return F.relu(net.group_norm(f"{name}.2", net.conv(f"{name}.1", net.upsample(x), padding=1), groups))

    fused = []
    encoders = zip(_encoder(net, "encoder", image, 4), _encoder(net, "encoder2", image, 8), strict=True)
    for number, (fine, coarse) in enumerate(encoders, 1):
        fine, coarse = _cross(net, f"cross_att_{number}", fine, coarse)
        fused.append(
            double(f"change{number}", torch.cat([fine, coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)], 1))
        )
    x = fused[3]
    first = F.relu(net.conv("loss1.0", x))
    for number in (1, 2, 3):
        name = f"layer{number}"
        pixels = up(f"{name}.up.up.up", x).permute(0, 2, 3, 1)
        pixels = swin_blocks(net, f"{name}.up.layer", pixels, 7, 3, net.details.decoder_head_width)
        rising = F.relu(net.conv(f"{name}.up.conv_relu.0", pixels.permute(0, 3, 1, 2)))
        skip = F.relu(net.conv(f"{name}.conv2.0", fused[3 - number]))
        x = F.relu(net.conv(f"{name}.conv_relu.0", net.join(skip, rising), padding=1))
    second = F.relu(net.conv("loss2.0", x))
    whole = net.conv("down1", image)
    for name, skip in (("layer4", double("down2", F.max_pool2d(whole, 2), 1)), ("layer5", whole)):
        x = F.relu(net.conv(f"{name}.conv_relu.0", net.join(skip, up(f"{name}.up.up", x)), padding=1))
    size = image.shape[2:]
    return net.conv("final", x), F.interpolate(first, size=size), F.interpolate(second, size=size)


def swin_blocks(net: Net, name: str, pixels: Tensor, window: int, shift: int, head_width: int) -> Tensor:
    """Return a map (batch, rows, columns, width) after the blocks of a stage, every second one shifted."""
    count = len({match[1] for key in net.state if (match := re.match(rf"{re.escape(name)}\.blocks\.(\d+)\.", key))})
    for number in range(count):
        block = f"{name}.blocks.{number}"
        normed = net.layer_norm(f"{block}.norm1", pixels)
        pixels = pixels + _attend(net, f"{block}.attn", normed, window, shift * (number % 2), head_width)
        hidden = net.linear(f"{block}.mlp.fc1", net.layer_norm(f"{block}.norm2", pixels))
        pixels = pixels + net.linear(f"{block}.mlp.fc2", F.gelu(hidden, approximate=net.details.gelu))
    return pixels


def _attend(net: Net, name: str, pixels: Tensor, window: int, shift: int, head_width: int) -> Tensor:
    details = net.details
    batch, rows, columns, width = pixels.shape
    height, breadth = math.ceil(rows / window) * window, math.ceil(columns / window) * window
    padded = torch.zeros(batch, height, breadth, width, dtype=pixels.dtype)
    padded[:, :rows, :columns] = pixels
    query, key, value = net.linear(f"{name}.qkv", padded).reshape(batch, height * breadth, 3, -1, head_width).unbind(2)
    row, column = (
        axis.flatten() for axis in torch.meshgrid(torch.arange(height), torch.arange(breadth), indexing="ij")
    )
    is_padding = (row >= rows) | (column >= columns)
    row, column = (row - shift) % height, (column - shift) % breadth  # where the shift takes them
    same_window = _equal(row // window) & _equal(column // window)
    offsets = [
        _difference(axis % window) * (1 if details.query_minus_key else -1) + window - 1 for axis in (row, column)
    ]
    table = net.state[f"{name}.relative_position_bias_table"]
    offset_index = (offsets[0] * (2 * window - 1) + offsets[1]).clamp(0, len(table) - 1)  # of other windows: not used
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(head_width) + table[offset_index].permute(2, 0, 1)
    if shift and details.masks_shifts:
        regions = [
            (axis >= size - window).long() + (axis >= size - shift).long()
            for axis, size in ((row, height), (column, breadth))
        ]
        scores = torch.where(_equal(regions[0]) & _equal(regions[1]), scores, scores - 100)
    if details.masks_padding:
        scores = scores.masked_fill(is_padding[None, :] & ~is_padding[:, None], -math.inf)
    weights = scores.masked_fill(~same_window, -math.inf).softmax(-1)
    collected = torch.einsum("bhqk,bkhd->bqhd", weights, value).reshape(batch, height, breadth, -1)
    return net.linear(f"{name}.proj", collected)[:, :rows, :columns]


def _equal(labels: Tensor) -> Tensor:
    return labels[:, None] == labels[None]


def _difference(positions: Tensor) -> Tensor:
    return positions[:, None] - positions[None]


def _merge(net: Net, name: str, pixels: Tensor) -> Tensor:
    neighbours = [pixels[:, row::2, column::2] for row, column in net.details.merge_order]
    return net.linear(f"{name}.reduction", net.layer_norm(f"{name}.norm", torch.cat(neighbours, -1)))


def _expand(net: Net, name: str, pixels: Tensor, factor: int) -> Tensor:
    wide = net.linear(f"{name}.expand", pixels)
    batch, rows, columns, width = wide.shape
    out = torch.empty(batch, rows * factor, columns * factor, width // factor**2, dtype=wide.dtype)
    for number, share in enumerate(wide.chunk(factor**2, -1)):
        row, column = divmod(number, factor)
        if not net.details.expands_rows_first:
            row, column = column, row
        out[:, row::factor, column::factor] = share
    return net.layer_norm(f"{name}.norm", out)


def _encoder(net: Net, name: str, image: Tensor, patch: int) -> list[Tensor]:
    pixels = net.conv(f"{name}.patch_embed.proj", image, stride=patch).permute(0, 2, 3, 1)
    pixels, maps = net.layer_norm(f"{name}.patch_embed.norm", pixels), []
    for stage in range(4):
        pixels = swin_blocks(net, f"{name}.layers.{stage}", pixels, 7, 3, net.details.encoder_head_width)
        normed = net.layer_norm(f"{name}.norm{stage}", pixels) if net.details.norms_stages else pixels
        maps.append(normed.permute(0, 3, 1, 2))
        if stage < 3:
            pixels = _merge(net, f"{name}.layers.{stage}.downsample", pixels)
    return maps


def _cross(net: Net, name: str, fine: Tensor, coarse: Tensor) -> tuple[Tensor, Tensor]:
    tokens = [features.flatten(2).transpose(1, 2) for features in (fine, coarse)]
    of_fine = net.linear(f"{name}.linear_l", net.layer_norm(f"{name}.norm_l", tokens[0]).mean(1))[:, None]
    of_coarse = net.linear(f"{name}.linear_s", net.layer_norm(f"{name}.norm_s", tokens[1]).mean(1))[:, None]
    new_coarse = _transformer(net, f"{name}.transformer_s.layers.0", torch.cat([of_fine, tokens[1]], 1), 32)
    new_fine = _transformer(net, f"{name}.transformer_l.layers.0", torch.cat([of_coarse, tokens[0]], 1), 64)
    return (
        new_fine[:, 1:].transpose(1, 2).reshape(fine.shape),
        new_coarse[:, 1:].transpose(1, 2).reshape(coarse.shape),
    )


def _transformer(net: Net, name: str, tokens: Tensor, head_width: int) -> Tensor:
    normed = net.layer_norm(f"{name}.0.norm", tokens)
    query, key, value = (
        part.unflatten(-1, (-1, head_width)) for part in net.linear(f"{name}.0.fn.to_qkv", normed).chunk(3, -1)
    )
    weights = (torch.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(head_width)).softmax(-1)
    collected = torch.einsum("bhqk,bkhd->bqhd", weights, value).flatten(2)
    tokens = tokens + net.linear(f"{name}.0.fn.to_out.0", collected)
    hidden = net.linear(f"{name}.1.fn.net.0", net.layer_norm(f"{name}.1.norm", tokens))
    return tokens + net.linear(f"{name}.1.fn.net.3", F.gelu(hidden, approximate=net.details.gelu))
