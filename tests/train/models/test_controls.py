"""The controls without language layers, and the block that only the training has."""

from math import erf
from typing import Any

import numpy as np
import pytest
import torch
from insert_variants import language_model
from tiny import SIZE

from medseg_trt.export.fold.fold import fold
from medseg_trt.spec import InsertSpec
from medseg_trt.train.models.model import build_model, model_spec

ROUNDING = 1e-5  # float32 sums of 96 products of size 1
ARCHITECTURE = "llm-transunet-tiny"


def made(insert: InsertSpec, seed: int = 0) -> Any:
    spec = model_spec(ARCHITECTURE, SIZE, 3, insert)
    torch.manual_seed(seed)
    return build_model(spec, language_model(1) if insert.needs_block_file else ())


def tokens() -> torch.Tensor:
    return torch.randn(4, 4, 48, generator=torch.Generator().manual_seed(3))


def test_gelu_control_insert_equals_mapper_gelu_norm_mapper():
    insert = made(InsertSpec(weights="gelu")).insert
    first, second = (getattr(insert, name).weight.detach().double().numpy() for name in ("mapper1", "mapper2"))
    x = tokens().double().numpy() @ first.T
    x = x / 2 * (1 + np.vectorize(erf)(x / 2**0.5))
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + insert.final_norm.eps)
    np.testing.assert_allclose(insert(tokens()).detach().numpy(), x @ second.T, atol=ROUNDING)


def test_affine_is_one_map():
    insert = made(InsertSpec(weights="affine", residual="out")).insert
    expected = tokens() + tokens() @ insert.map.weight.T + insert.map.bias
    torch.testing.assert_close(insert(tokens()), expected, atol=ROUNDING, rtol=0)


def test_affine_insert_of_llm_transunet_has_590592_parameters():
    with torch.device("meta"):
        model = build_model(model_spec("llm-transunet", (224, 224), 9, InsertSpec(weights="affine")))
    assert model.insert is not None
    assert sum(weight.numel() for weight in model.insert.parameters()) == 590_592


def test_an_mlp_trains_as_many_parameters_as_the_published_block():
    def trained(insert: InsertSpec) -> int:
        return sum(weight.numel() for weight in made(insert).parameters() if weight.requires_grad)

    assert trained(InsertSpec(weights="gelu")) == trained(InsertSpec()) == trained(InsertSpec(weights="none"))


@pytest.mark.parametrize(
    "insert",
    [
        InsertSpec(weights="gelu"),
        InsertSpec(weights="affine"),
        InsertSpec(weights="none"),
        InsertSpec(weights="random"),
        InsertSpec(weights="shuffled"),
        InsertSpec(trainable=True),
        InsertSpec(residual="out", train_only=True),
    ],
    ids=str,
)
def test_all_start_from_the_same_weights_outside(insert):
    def outside(model) -> dict[str, torch.Tensor]:
        return {name: value for name, value in model.state_dict().items() if not name.startswith("insert.")}

    torch.manual_seed(5)
    plain = outside(build_model(model_spec("transunet-tiny", SIZE, 3)))
    other = outside(made(insert, seed=5))
    assert plain.keys() == other.keys()
    assert all(torch.equal(plain[name], other[name]) for name in plain)


def test_a_block_for_training_alone_is_in_half_of_a_batch_and_in_no_result():
    model = made(InsertSpec(residual="out", train_only=True))
    always = made(InsertSpec(residual="out")).insert
    through = model.insert.train()(tokens())
    torch.testing.assert_close(through[:2], always(tokens())[:2])
    torch.testing.assert_close(through[2:], tokens()[2:])
    assert torch.equal(model.insert.eval()(tokens()), tokens())
    assert torch.equal(model.insert.train()(tokens()[:1]), always(tokens()[:1]))  # a batch of one has the block


@pytest.mark.parametrize(
    ("insert", "reason"),
    [
        (InsertSpec(weights="gelu"), "weights=gelu: an activation stands between the maps"),
        (InsertSpec(weights="affine"), "the network has no language block"),
        (InsertSpec(residual="out", train_only=True), "train_only=true: the block is dropped after the training"),
    ],
    ids=str,
)
def test_folding_control_inserts_preserves_logits_and_reports_the_reason(insert, reason):
    model = made(insert).double().eval()
    image = torch.randn(2, 3, *SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        folded, report = fold(model)
        torch.testing.assert_close(folded(image), model(image), atol=1e-9, rtol=0)
    assert report["language_projections"].reason == reason
    assert (folded.insert is None) == insert.train_only


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "gelu", "trainable": True}, "weights=gelu leaves the language layers out"),
        ({"weights": "affine", "norm": "none"}, "weights=affine is one map"),
        ({"weights": "affine", "residual": "in"}, "weights=affine is one map"),
        ({"train_only": True}, "residual must be out"),
    ],
)
def test_what_contradicts_itself_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        InsertSpec(**options)
