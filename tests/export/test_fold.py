import copy
from itertools import chain

import pytest
import torch
from tiny import make_checkpoint
from torch import nn

from medseg_trt.export import fold as fold_module
from medseg_trt.export.fold import RULES, fold
from medseg_trt.train.checkpoint import load_checkpoint
from medseg_trt.train.transunet import ConvNormReLU, StdConv2d, TransUNet

# Kernels are folded in float64 and rounded once to float32 (6e-8), and logits of order 1 pass about 30 layers; the
# largest difference seen is 5e-7. The faults below miss the limit by a factor of 50 and more.
LOGITS_TOLERANCE = 5e-6


@pytest.fixture
def model(tmp_path) -> TransUNet:
    return load_checkpoint(make_checkpoint(tmp_path)).model()


def error(folded: nn.Module, model: nn.Module) -> float:
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return float((folded(images) - model(images)).abs().max())


def test_the_folded_network_answers_as_the_network(model):
    folded, _ = fold(model)
    assert error(folded, model) < LOGITS_TOLERANCE


def test_every_place_is_folded_and_counted(model):
    folded, counts = fold(model)
    standardised = sum(isinstance(layer, StdConv2d) for layer in model.modules())
    norms = sum(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())
    assert counts == {"standardised_convolutions": standardised, "batch_norms": norms}
    assert min(standardised, norms) > 0
    assert not any(isinstance(layer, StdConv2d | nn.BatchNorm2d) for layer in folded.modules())


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_alone_is_exact(model, rule):
    changed = copy.deepcopy(model)
    assert RULES[rule](changed) > 0
    assert error(changed, model) < LOGITS_TOLERANCE


def test_folding_leaves_the_network_as_it_was_and_shares_what_it_does_not_replace(model):
    before = copy.deepcopy(model.state_dict())
    folded, _ = fold(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert any(isinstance(layer, ConvNormReLU) for layer in model.modules())
    shared = {tensor.data_ptr() for tensor in chain(model.parameters(), model.buffers())}
    assert model.insert is not None
    frozen = {name for name, _ in folded.named_parameters() if name.startswith("insert.block.")}
    assert frozen
    assert all(value.data_ptr() in shared for name, value in folded.named_parameters() if name in frozen)


def without_eps(model: nn.Module) -> int:
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps = 0.1
    return fold_module.fold_batch_norm(model)


def without_running_mean(model: nn.Module) -> int:
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None:
            layer.running_mean.zero_()
    return fold_module.fold_batch_norm(model)


def without_the_kernel_mean(model: nn.Module) -> int:
    """Scale the kernels and leave their mean in; GroupNorm does not undo that, as it would undo a wrong scale."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StdConv2d, "standardised", lambda layer: layer.weight / layer.weight.std((1, 2, 3), keepdim=True))
        return fold_module.fold_standardisation(model)


@pytest.mark.parametrize("fault", [without_eps, without_running_mean, without_the_kernel_mean])
def test_the_tolerance_catches(model, fault):
    broken = copy.deepcopy(model)
    assert fault(broken) > 0
    assert error(broken.eval(), model) > 50 * LOGITS_TOLERANCE


def test_the_order_of_rules_does_not_matter(model):
    backwards = copy.deepcopy(model)
    for rule in reversed(list(RULES.values())):
        rule(backwards)
    folded, _ = fold(model)
    for first, second in zip(folded.parameters(), backwards.parameters(), strict=True):
        assert torch.equal(first, second)
