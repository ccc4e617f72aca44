"""Fit affine maps by ridge regression from streamed moments, in float64.

The inputs and outputs are centred before they are multiplied, so that the ridge shrinks the slope and never the mean:
``y = W x + c`` with ``W = Cyx (Cxx + l d I)^-1``, ``d`` the mean of the diagonal of ``Cxx``, and ``c = my - W mx``.
Source: Hoerl & Kennard 1970, "Ridge regression: biased estimation for nonorthogonal problems".
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from medseg_trt.errors import UsageError

RIDGE = 1e-5  # of the mean diagonal: enough for directions that no token has, too little to see in the output
TOKENS_PER_UNKNOWN = 2  # with as many tokens as unknowns, the fit would reproduce their noise


@dataclass(frozen=True, kw_only=True, slots=True)
class AffineMap:
    """``y = weight x + bias``."""

    weight: Float64[Tensor, "outputs inputs"]
    bias: Float64[Tensor, " outputs"]

    def __call__(self, inputs: Float64[Tensor, "*rows inputs"]) -> Float64[Tensor, "*rows outputs"]:
        """Return the outputs."""
        return inputs @ self.weight.T + self.bias


class Moments:
    """Sums over rows of inputs and outputs; memory does not depend on the number of rows."""

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        self.rows = 0
        self._origin: tuple[Tensor, Tensor] | None = None  # subtracted from all rows, so that squares stay small
        self._sums = torch.zeros(num_inputs, dtype=torch.float64), torch.zeros(num_outputs, dtype=torch.float64)
        self._inner = torch.zeros(num_inputs, num_inputs, dtype=torch.float64)
        self._outer = torch.zeros(num_outputs, num_inputs, dtype=torch.float64)

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Add rows: (…, inputs) and (…, outputs) of any float type."""
        x, y = (rows.detach().double().flatten(0, -2) for rows in (inputs, outputs))
        if self._origin is None:
            self._origin = x.mean(0), y.mean(0)
        x, y = x - self._origin[0], y - self._origin[1]
        self.rows += len(x)
        self._sums = self._sums[0] + x.sum(0), self._sums[1] + y.sum(0)
        self._inner += x.T @ x
        self._outer += y.T @ x

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """The mean of the inputs and of the outputs."""
        assert self._origin is not None  # rows were added
        return self._origin[0] + self._sums[0] / self.rows, self._origin[1] + self._sums[1] / self.rows

    def centred(self) -> tuple[Float64[Tensor, "inputs inputs"], Float64[Tensor, "outputs inputs"]]:
        """Return the sums of products of the centred inputs, and of the centred outputs with them."""
        x, y = self._sums
        return self._inner - torch.outer(x, x) / self.rows, self._outer - torch.outer(y, x) / self.rows


def fit_ridge(moments: Moments, ridge: float = RIDGE) -> AffineMap:
    """Return the affine map with the least squared error and penalty.

    Raises:
        UsageError: there are too few rows for the number of unknowns.
    """
    inner, outer = moments.centred()
    check_tokens(moments.rows, len(inner) + 1)
    penalty = ridge * inner.diagonal().mean() * torch.eye(len(inner), dtype=torch.float64)
    weight = torch.linalg.solve(inner + penalty, outer.T).T
    mean_input, mean_output = moments.means
    return AffineMap(weight=weight, bias=mean_output - weight @ mean_input)


def check_tokens(tokens: int, unknowns: int) -> None:
    """Require enough tokens for the unknowns of one output.

    Raises:
        UsageError: there are too few.
    """
    needed = TOKENS_PER_UNKNOWN * unknowns
    if tokens < needed:
        raise UsageError(
            f"{tokens} tokens are too few to fit {unknowns} unknowns of the block's replacement: it needs {needed}, so "
            "give more training images: --data DIR, or choose --block exact"
        )
