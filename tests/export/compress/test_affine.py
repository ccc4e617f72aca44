"""The affine rung, on generated tokens of a block that is affine, and the error that judges it."""

import pytest
import torch
from generated_block import WIDTH, PermutedNoise, common_direction, generated_insert, generated_tokens
from torch import Tensor, nn

from medseg_trt.export.compress.affine import fit_affine
from medseg_trt.export.compress.held_out import HeldOutError, held_out_error
from medseg_trt.export.compress.ridge import RIDGE, Moments

# The ridge shrinks the slope by RIDGE in every direction of these tokens, of which the normalisation undoes the scale.
LIMIT = 2 * RIDGE


def test_an_affine_block_is_reproduced() -> None:
    block, tokens = PermutedNoise(), generated_tokens()
    replacement = fit_affine(block, tokens)
    wanted = torch.eye(WIDTH, dtype=torch.float64)[block.permutation]
    # Tokens of mean 0 say nothing of the direction of ones: there the ridge leaves the slope at 0.
    flat = torch.eye(WIDTH, dtype=torch.float64) - 1 / WIDTH
    assert torch.allclose(replacement.weight, wanted @ flat, rtol=0, atol=1e-3)
    held_out = held_out_error(replacement, block, generated_tokens(seed=1))
    assert held_out.relative < LIMIT
    assert held_out.unexplained < LIMIT**2


def test_uncentred_affine_fit_exceeds_the_held_out_error_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, block = generated_tokens(offset=300.0), PermutedNoise(offset=300.0)
    assert held_out_error(fit_affine(block, tokens), block, generated_tokens(1, offset=300.0)).within(0.05, 0.05)
    monkeypatch.setattr(Moments, "centred", _uncentred)
    error = held_out_error(fit_affine(block, tokens), block, generated_tokens(1, offset=300.0))
    assert not error.within(0.05, 0.05)


def test_a_constant_output_explains_nothing_however_small_its_relative_error() -> None:
    tokens = generated_tokens()
    block = _AddsCommonDirection()
    constant = _Constant(block(tokens).mean((0, 1)))
    error = held_out_error(constant, block, tokens)
    assert error.relative < 0.05
    assert error.unexplained == pytest.approx(1, abs=0.02)  # the mean of the normalised tokens differs a little
    assert not error.within(0.05, 0.05)


def test_held_out_error_passes_only_if_both_error_measures_are_within_limits() -> None:
    assert not HeldOutError(relative=0.06, unexplained=0.01).within(0.05, 0.05)
    assert not HeldOutError(relative=0.01, unexplained=0.06).within(0.05, 0.05)
    assert not HeldOutError(relative=float("nan"), unexplained=0.01).within(0.05, 0.05)
    assert HeldOutError(relative=0.05, unexplained=0.05).within(0.05, 0.05)


def test_the_scale_of_a_token_does_not_count() -> None:
    tokens, block = generated_tokens(), generated_insert()
    assert held_out_error(nn.Sequential(block, _Scaled()), block, tokens).relative < 1e-12


class _Scaled(nn.Module):
    def forward(self, tokens: Tensor) -> Tensor:
        """Multiply every token by its own factor and shift it by its own mean, which a LayerNorm undoes."""
        return tokens * (2 + tokens[..., :1].abs()) + tokens[..., 1:2]


class _AddsCommonDirection(nn.Module):
    def forward(self, tokens: Tensor) -> Tensor:
        """Return tokens of which 99.9 % of the energy is common to all."""
        return tokens + 300 * common_direction()


class _Constant(nn.Module):
    def __init__(self, token: Tensor) -> None:
        super().__init__()
        self.token = token

    def forward(self, tokens: Tensor) -> Tensor:
        """Return one token, whatever came in."""
        return self.token.expand_as(tokens)


def _uncentred(moments: Moments) -> tuple[Tensor, Tensor]:
    """Return the sums of products about zero."""
    (x, y), rows = moments.means, moments.rows
    inner, outer = moments._inner, moments._outer  # pyright: ignore[reportPrivateUsage]
    sums_x, sums_y = moments._sums  # pyright: ignore[reportPrivateUsage]
    centred = inner - torch.outer(sums_x, sums_x) / rows, outer - torch.outer(sums_y, sums_x) / rows
    return centred[0] + rows * torch.outer(x, x), centred[1] + rows * torch.outer(y, x)
