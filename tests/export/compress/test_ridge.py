"""Ridge regression from moments, against closed forms and NumPy's least squares of the augmented system."""

import numpy as np
import pytest
import torch
from torch import Tensor

from medseg_trt.errors import UsageError
from medseg_trt.export.compress.ridge import RIDGE, TOKENS_PER_UNKNOWN, AffineMap, Moments, check_tokens, fit_ridge

ROWS, INPUTS, OUTPUTS = 400, 6, 4
LIMIT = 1e-9  # some hundred float64 roundings of 1e-16 of values up to 1e3; the planted faults miss it by 1e4 and more


def whitened(offset: float) -> Tensor:
    """Return rows whose covariance is exactly the identity, and whose mean is ``offset``."""
    rows = torch.randn(ROWS, INPUTS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    orthogonal = torch.linalg.qr(rows - rows.mean(0)).Q * ROWS**0.5
    return orthogonal - orthogonal.mean(0) + offset


def known_map() -> AffineMap:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(OUTPUTS, INPUTS, generator=generator, dtype=torch.float64)
    return AffineMap(weight=weight, bias=torch.arange(OUTPUTS, dtype=torch.float64) - 100)


def moments_of(inputs: Tensor, outputs: Tensor, chunks: int = 5) -> Moments:
    moments = Moments(inputs.shape[1], outputs.shape[1])
    for x, y in zip(inputs.chunk(chunks), outputs.chunk(chunks), strict=True):
        moments.add(x, y)
    return moments


@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("ridge", [0.0, RIDGE, 0.5])
def test_ridge_fit_of_whitened_inputs_shrinks_weights_by_one_plus_ridge(offset: float, ridge: float) -> None:
    inputs, truth = whitened(offset), known_map()
    fitted = fit_ridge(moments_of(inputs, truth(inputs)), ridge)
    assert torch.allclose(fitted.weight, truth.weight / (1 + ridge), rtol=0, atol=LIMIT)
    assert torch.allclose(fitted(inputs.mean(0)), truth(inputs.mean(0)), rtol=0, atol=LIMIT * max(1, offset))


def test_it_is_the_least_squares_solution_of_the_augmented_system() -> None:
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(ROWS, INPUTS)) @ rng.normal(size=(INPUTS, INPUTS)) + 30
    outputs = np.sin(inputs[:, :OUTPUTS]) + rng.normal(size=(ROWS, OUTPUTS))
    diagonal = np.square(inputs - inputs.mean(0)).sum(0).mean()
    system = np.block([[inputs, np.ones((ROWS, 1))], [(0.1 * diagonal) ** 0.5 * np.eye(INPUTS), np.zeros((INPUTS, 1))]])
    solution = np.linalg.lstsq(system, np.concatenate([outputs, np.zeros((INPUTS, OUTPUTS))]), rcond=None)[0]
    fitted = fit_ridge(moments_of(torch.from_numpy(inputs), torch.from_numpy(outputs)), 0.1)
    assert np.allclose(fitted.weight.numpy(), solution[:-1].T, rtol=0, atol=LIMIT)
    assert np.allclose(fitted.bias.numpy(), solution[-1], rtol=0, atol=LIMIT * 100)


def test_uncentred_ridge_fit_differs_from_the_true_map(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, truth = whitened(1e3), known_map()
    moments = moments_of(inputs, truth(inputs))
    uncentred = inputs.T @ inputs, truth(inputs).T @ inputs
    monkeypatch.setattr(Moments, "centred", lambda _: uncentred)
    error = (fit_ridge(moments, RIDGE).weight - truth.weight).abs().max()
    assert error > 1e4 * LIMIT


def test_the_order_and_size_of_the_chunks_do_not_matter() -> None:
    inputs, truth = whitened(1e3), known_map()
    whole, parts = (fit_ridge(moments_of(inputs, truth(inputs), chunks)) for chunks in (1, 40))
    assert torch.allclose(whole.weight, parts.weight, rtol=0, atol=LIMIT)


def test_too_few_tokens_are_refused_with_the_number_needed() -> None:
    inputs = whitened(0.0)[: 2 * INPUTS]
    needed = TOKENS_PER_UNKNOWN * (INPUTS + 1)
    with pytest.raises(UsageError, match=rf"{len(inputs)} tokens are too few .* needs {needed}"):
        fit_ridge(moments_of(inputs, known_map()(inputs), 1))
    check_tokens(needed, INPUTS + 1)
