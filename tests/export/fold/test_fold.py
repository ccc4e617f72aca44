import copy
import json
from itertools import chain

import pytest
import torch
from tiny import make_checkpoint
from torch import nn

from medseg_trt.export.fold import fold as fold_module
from medseg_trt.export.fold.fold import RULES, fold, plain_report
from medseg_trt.export.fold.fold_rule import FoldResult
from medseg_trt.train.checkpoint import load_checkpoint
from medseg_trt.train.models.segmentation_model import SegmentationModel
from medseg_trt.train.models.transunet import Attention, ConvNormReLU, StdConv2d

OWN_RULES = ("standardised_convolutions", "batch_norms", "transformer_projections")  # the others have their own tests
# Kernels are folded in float64 and rounded once to float32 (6e-8), and logits of order 1 pass about 30 layers; the
# largest difference seen is 5e-7. The faults below miss the limit by a factor of 50 and more.
LOGITS_TOLERANCE = 5e-6


@pytest.fixture
def model(tmp_path) -> SegmentationModel:
    return load_checkpoint(make_checkpoint(tmp_path)).model()


def error(folded: nn.Module, model: nn.Module) -> float:
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return float((folded(images) - model(images)).abs().max())


def test_the_folded_network_computes_the_same_logits(model):
    folded, _ = fold(model)
    assert error(folded, model) < LOGITS_TOLERANCE


def test_every_layer_is_folded_and_counted(model):
    folded, report = fold(model)
    kinds = dict(zip(OWN_RULES, (StdConv2d, nn.BatchNorm2d, Attention), strict=True))
    for rule, kind in kinds.items():
        assert report[rule].count == sum(isinstance(layer, kind) for layer in model.modules()) > 0
        assert not any(isinstance(layer, kind) for layer in folded.modules())


def test_fold_report_is_json_serialisable_with_counts_and_reasons(model):
    report = plain_report(fold(model)[1])
    assert report["batch_norms"] == {"count": 9, "reason": ""}
    assert report["rotary_tables"] == {"count": 0, "reason": "rotary=false: queries and keys are not rotated"}
    assert json.loads(json.dumps(report)) == report


@pytest.mark.parametrize(("count", "reason"), [(0, ""), (1, "there is none"), (-1, "fewer than none")])
def test_a_result_has_either_a_count_or_a_reason(count, reason):
    with pytest.raises(ValueError, match="cannot give"):
        FoldResult(count=count, reason=reason)


@pytest.mark.parametrize("rule", OWN_RULES)
def test_each_rule_alone_is_exact(model, rule):
    changed = copy.deepcopy(model)
    assert RULES[rule](changed).count > 0
    assert error(changed, model) < LOGITS_TOLERANCE


def test_folding_does_not_change_the_network_and_shares_tensors_that_it_does_not_replace(model):
    before = copy.deepcopy(model.state_dict())
    folded, _ = fold(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert any(isinstance(layer, ConvNormReLU) for layer in model.modules())
    shared = {tensor.data_ptr() for tensor in chain(model.parameters(), model.buffers())}
    kept = {name for name, value in folded.named_parameters() if value.data_ptr() in shared}
    assert kept > {"insert.branches.0.project_out.weight", "layers.0.fc1.weight", "patch_embedding.weight"}


def without_eps(model: nn.Module) -> FoldResult:
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps = 0.1
    return fold_module.fold_batch_norm(model)


def without_running_mean(model: nn.Module) -> FoldResult:
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None:
            layer.running_mean.zero_()
    return fold_module.fold_batch_norm(model)


def without_the_kernel_mean(model: nn.Module) -> FoldResult:
    """Scale the kernels and leave their mean in; GroupNorm does not undo that, as it would undo a wrong scale."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StdConv2d, "standardised", lambda layer: layer.weight / layer.weight.std((1, 2, 3), keepdim=True))
        return fold_module.fold_standardisation(model)


def with_a_bias_forgotten(model: nn.Module) -> FoldResult:
    for layer in model.modules():
        if isinstance(layer, Attention):
            nn.init.zeros_(layer.value.bias)
    return fold_module.merge_transformer_projections(model)


def with_a_transposed_query(model: nn.Module) -> FoldResult:
    for layer in model.modules():
        if isinstance(layer, Attention):
            layer.query.weight = nn.Parameter(layer.query.weight.T.clone())
    return fold_module.merge_transformer_projections(model)


FAULTS = (
    without_eps,
    without_running_mean,
    without_the_kernel_mean,
    with_a_bias_forgotten,
    with_a_transposed_query,
)


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_fold_exceeds_the_logits_tolerance(model, fault):
    broken = copy.deepcopy(model)
    assert fault(broken).count > 0
    assert error(broken.eval(), model) > 50 * LOGITS_TOLERANCE


def test_independent_fold_rules_give_equal_weights_in_any_order(model):
    forwards, backwards = copy.deepcopy(model), copy.deepcopy(model)
    for rule, opposite in zip(OWN_RULES, reversed(OWN_RULES), strict=True):
        RULES[rule](forwards)
        RULES[opposite](backwards)
    for first, second in zip(forwards.parameters(), backwards.parameters(), strict=True):
        assert torch.equal(first, second)
