"""LLM-TransUNet: the published counts, what is frozen, and what passes through the insert."""

from dataclasses import replace

import pytest
import torch

from medseg_trt.errors import UsageError
from medseg_trt.network_spec import ModelSpec
from medseg_trt.spec import BlockSpec
from medseg_trt.train.block.blocks import random_block
from medseg_trt.train.models.model import MODELS, TINY_LLAMA, LanguageInsert, build_model, count_parameters, model_spec


@pytest.mark.parametrize(
    ("architecture", "size", "classes", "total", "trainable"),
    [
        ("transunet", 224, 9, 105_277_081, 105_277_081),
        ("transunet", 256, 1, 105_322_001, 105_322_001),
        ("llm-transunet", 256, 1, 314_000_913, 111_613_457),
        ("llm-transunet", 224, 9, 313_955_993, 111_568_537),
    ],
)
def test_the_published_parameter_counts_to_the_unit(architecture, size, classes, total, trainable):
    with torch.device("meta"):
        counts = count_parameters(build_model(model_spec(architecture, (size, size), classes)))
    assert counts == {"total": total, "trainable": trainable, "frozen": total - trainable}


@pytest.mark.parametrize("architecture", MODELS)
def test_every_architecture_answers_in_the_size_of_its_image(architecture):
    with torch.device("meta"):
        model = build_model(model_spec(architecture, (128, 64), 3)).eval()
        assert model(torch.empty(2, 3, 128, 64)).shape == (2, 3, 128, 64)


def test_only_the_language_layer_is_frozen():
    spec = model_spec("llm-transunet-tiny", (32, 32), 2)
    model = build_model(spec, random_block(TINY_LLAMA, seed=0))
    frozen = {name.split(".")[1] for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"block", "final_norm"}
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1.0)
    before = {name: value.clone() for name, value in model.named_parameters()}
    model(torch.randn(2, 3, 32, 32)).square().mean().backward()
    optimizer.step()
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert not any(name.startswith(("insert.block.", "insert.final_norm.")) for name in changed)
    assert {"insert.mapper1.weight", "insert.mapper2.weight", "patch_embedding.weight"} <= changed


def test_the_insert_is_mapper_block_norm_mapper_and_nothing_else():
    """Computed a second time from the parts' weights, in float64."""
    spec = model_spec("llm-transunet-tiny", (32, 32), 2)
    insert = build_model(spec, random_block(TINY_LLAMA, seed=0)).insert
    assert isinstance(insert, LanguageInsert)
    insert.double()
    tokens = torch.randn(2, 4, spec.token_width, dtype=torch.float64)
    inner = insert.block(tokens @ insert.mapper1.weight.T)
    normed = inner / (inner.square().mean(-1, keepdim=True) + TINY_LLAMA.rms_norm_eps).sqrt()
    expected = normed @ insert.mapper2.weight.T
    torch.testing.assert_close(insert(tokens), expected, rtol=1e-12, atol=1e-12)  # float64 rounds at 2e-16
    with_residual = expected + tokens  # what a reader might expect, and the published code does not do
    assert (insert(tokens) - with_residual).abs().max() > 1e-2


def test_a_block_of_another_geometry_is_refused():
    spec = model_spec("llm-transunet-tiny", (32, 32), 2)
    with pytest.raises(UsageError, match="geometry"):
        build_model(spec, random_block(replace(TINY_LLAMA, intermediate_size=32), seed=0))


def test_a_block_for_a_model_without_one_is_refused():
    with pytest.raises(UsageError, match="llm-transunet-tiny"):
        build_model(model_spec("transunet-tiny", (32, 32), 2), random_block(TINY_LLAMA, seed=0))


def test_an_unknown_architecture_lists_the_known_ones():
    with pytest.raises(UsageError, match="llm-transunet-small"):
        model_spec("transnet", (32, 32), 2)


def test_inconsistent_head_counts_are_refused():
    with pytest.raises(ValueError, match="cannot share"):
        BlockSpec(num_heads=9, num_kv_heads=2)
    with pytest.raises(ValueError, match="multiple of num_heads"):
        ModelSpec(image_size=(32, 32), num_classes=1, hidden_size=50)
