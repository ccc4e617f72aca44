"""The parts of a Swin transformer: patches, blocks of windowed attention, and merging of patches.

A map that windows do not divide is padded with zeros on the right and at the bottom, after the norm. Padded tokens are
keys like all others; only the mask of shifted windows is computed on the padded map, as in the published code.

Source: Liu et al. 2021, "Swin Transformer"; microsoft/Swin-Transformer ``swin_transformer.py``. Modules have the names
that they have there, so that its files fit.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from medseg_trt.train.models.drop_path import DropPath

MASKED = -100.0  # added to the score of a pair of tokens that a shift has brought together
EXPANSION = 4  # the MLP's hidden layer is four times as wide as a token
INIT_STD = 0.02


class PatchEmbed(nn.Module):
    """Cut the image into square patches and map each to a token."""

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)
        self.norm = nn.LayerNorm(width)

    def forward(self, image: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch tokens hidden"]:
        """Return the tokens, row by row."""
        return self.norm(self.proj(image).flatten(2).transpose(1, 2))


class PatchMerging(nn.Module):
    """Join four neighbouring tokens to one of twice the width."""

    def __init__(self, width: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)
        self.norm = nn.LayerNorm(4 * width)

    def forward(self, tokens: Float[Tensor, "batch tokens hidden"]) -> Float[Tensor, "batch quarter double"]:
        """Return a quarter of the tokens; of four neighbours, the first column's two come first, from the top."""
        rows, columns = self.grid
        pixels = tokens.unflatten(1, (rows // 2, 2, columns // 2, 2))
        joined = pixels.permute(0, 1, 3, 4, 2, 5).flatten(3).flatten(1, 2)
        return self.reduction(self.norm(joined))


class WindowAttention(nn.Module):
    """Attention inside of windows, with a learned bias for every offset of two tokens.

    Args:
        width: of a token.
        num_heads: of the attention.
        window: side of a window in tokens.
        num_windows: of an image.
        mask: (windows, tokens, tokens), what is added to the scores of shifted windows; None: they are not shifted.
    """

    def __init__(self, width: int, num_heads: int, window: int, num_windows: int, mask: Tensor | None) -> None:
        super().__init__()
        self.num_heads, self.num_windows = num_heads, num_windows
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, num_heads))
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.register_buffer("relative_position_index", relative_positions(window), persistent=False)
        self.register_buffer("mask", mask, persistent=False)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=INIT_STD)

    def bias(self) -> Float[Tensor, "1 heads tokens tokens"]:
        """Return what is added to the scores; the heads of all windows follow one another."""
        index = self.get_buffer("relative_position_index")
        bias = self.relative_position_bias_table[index.flatten()].unflatten(0, index.shape).permute(2, 0, 1)
        if isinstance(self.mask, Tensor):
            return (bias + self.mask[:, None]).flatten(0, 1)[None]
        return bias.expand(self.num_windows, -1, -1, -1).flatten(0, 1)[None]

    def forward(self, tokens: Float[Tensor, "batch tokens hidden"]) -> Float[Tensor, "batch tokens hidden"]:
        """Return what every token collects in its window; the tokens of a window follow one another."""
        qkv = self.qkv(tokens).unflatten(1, (self.num_windows, -1)).unflatten(3, (3, self.num_heads, -1))
        query, key, value = qkv.permute(3, 0, 1, 4, 2, 5).flatten(2, 3)  # 3 of (b, windows * heads, tokens, head_dim)
        collected = F.scaled_dot_product_attention(query, key, value, attn_mask=self.bias())
        by_window = collected.unflatten(1, (self.num_windows, self.num_heads)).transpose(2, 3)
        return self.proj(by_window.flatten(3).flatten(1, 2))


class Mlp(nn.Module):
    """Transform every token on its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, EXPANSION * width)
        self.fc2 = nn.Linear(EXPANSION * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(tokens)))


class SwinBlock(nn.Module):
    """Attention in windows and an MLP, each after a norm and added to what came in.

    Args:
        width: of a token.
        grid: rows and columns of tokens.
        num_heads: of the attention.
        window: side of a window in tokens.
        shift: by how many tokens the windows are shifted, up and to the left.
        drop_path: probability that a branch is left out for an image in training.
    """

    def __init__(
        self, width: int, grid: tuple[int, int], num_heads: int, window: int, shift: int, drop_path: float
    ) -> None:
        super().__init__()
        self.grid, self.window, self.shift = grid, window, shift
        self.padding = (-grid[0] % window, -grid[1] % window)
        padded = (grid[0] + self.padding[0], grid[1] + self.padding[1])
        self.windows = (padded[0] // window, padded[1] // window)
        mask = shift_mask(padded, window, shift) if shift else None
        self.norm1 = nn.LayerNorm(width)
        self.attn = WindowAttention(width, num_heads, window, self.windows[0] * self.windows[1], mask)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width)

    def forward(self, tokens: Float[Tensor, "batch tokens hidden"]) -> Float[Tensor, "batch tokens hidden"]:
        """Return the tokens after the block, row by row."""
        tokens = tokens + self.drop_path(self._joined(self.attn(self._cut(self.norm1(tokens)))))
        return tokens + self.drop_path(self.mlp(self.norm2(tokens)))

    def _cut(self, tokens: Tensor) -> Tensor:
        """Return the tokens window by window, padded and shifted."""
        pixels = tokens.unflatten(1, self.grid)  # (b, rows, columns, hidden)
        if any(self.padding):
            pixels = F.pad(pixels, (0, 0, 0, self.padding[1], 0, self.padding[0]))
        if self.shift:
            pixels = pixels.roll((-self.shift, -self.shift), (1, 2))
        cut = pixels.unflatten(2, (self.windows[1], self.window)).unflatten(1, (self.windows[0], self.window))
        return cut.transpose(2, 3).flatten(1, 4)

    def _joined(self, tokens: Tensor) -> Tensor:
        """Undo ``_cut``."""
        cut = tokens.unflatten(1, (*self.windows, self.window, self.window)).transpose(2, 3)
        pixels = cut.flatten(3, 4).flatten(1, 2)
        if self.shift:
            pixels = pixels.roll((self.shift, self.shift), (1, 2))
        if any(self.padding):
            pixels = pixels[:, : self.grid[0], : self.grid[1]]
        return pixels.flatten(1, 2)


def swin_blocks(
    width: int, grid: tuple[int, int], num_heads: int, window: int, shift: int, drop_paths: Sequence[float]
) -> nn.ModuleList:
    """Return the blocks of a stage, every second one shifted by ``shift`` tokens."""
    return nn.ModuleList(
        SwinBlock(width, grid, num_heads, window, shift if number % 2 else 0, drop_path)
        for number, drop_path in enumerate(drop_paths)
    )


def drop_path_stages(last: float, depths: Sequence[int]) -> list[list[float]]:
    """Return the drop-path probability of every block, which climbs evenly from 0 to ``last``, by stage."""
    rates = torch.linspace(0, last, sum(depths), device="cpu").tolist()
    return [rates[sum(depths[:stage]) : sum(depths[: stage + 1])] for stage in range(len(depths))]


def relative_positions(window: int) -> Int64[Tensor, "tokens tokens"]:
    """Return the row of the bias table for every query and key of a window."""
    side = torch.arange(window)
    rows, columns = (axis.flatten() for axis in torch.meshgrid(side, side, indexing="ij"))
    row_offsets, column_offsets = (axis[:, None] - axis[None] + window - 1 for axis in (rows, columns))
    return row_offsets * (2 * window - 1) + column_offsets


def shift_mask(grid: tuple[int, int], window: int, shift: int) -> Float[Tensor, "windows tokens tokens"]:
    """Return -100 for every pair of tokens that are neighbours only because the map was rolled, else 0."""
    row_labels, column_labels = (
        (axis >= size - window).long() + (axis >= size - shift).long()
        for size, axis in ((size, torch.arange(size)) for size in grid)
    )
    labels = 3 * row_labels[:, None] + column_labels
    cut = labels.unflatten(1, (-1, window)).unflatten(0, (-1, window)).transpose(1, 2).flatten(2).flatten(0, 1)
    return torch.where(cut[:, None] == cut[:, :, None], 0.0, MASKED)


def init_linear(module: nn.Module) -> None:
    """Draw a linear map as Swin does; for ``Module.apply``."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=INIT_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
