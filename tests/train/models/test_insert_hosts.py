"""The language block in every network: where it stands, what it reads and gives, and what folding makes of it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medseg_trt.errors import UsageError
from medseg_trt.export.fold.fold import fold
from medseg_trt.spec import InsertSpec
from medseg_trt.train.block.blocks import random_block
from medseg_trt.train.models.model import LanguageInsert, build_model, model_spec
from medseg_trt.train.models.presets import TINY_LLAMA
from medseg_trt.train.models.segmentation_model import SegmentationModel

SIZE = (64, 128)
# float64: folding is exact but for the order of sums and the eps of a LayerNorm, which fold.language bounds at 1e-5.
FOLDED = 1e-5

HOSTS = [  # network, placement, tokens, width, whether a LayerNorm takes what the insert returns
    ("swin-unet-tiny", "before_norm", 2 * 4, 64, True),
    ("swin-unet-tiny", "after_norm", 2 * 4, 64, False),
    ("ds-transunet-tiny", "before_norm", 2 * 4, 128, False),
    ("ds-transunet-tiny", "encoder", 2 * 4, 64, True),
    ("unet-tiny", "before_norm", 4 * 8, 64, False),
    ("unet-t-tiny", "before_norm", 4 * 8, 64, False),
]


def host(architecture: str, **insert: Any) -> SegmentationModel:
    torch.manual_seed(0)
    spec = model_spec(f"llm-{architecture}", SIZE, 3, InsertSpec(**insert))
    blocks = random_block(TINY_LLAMA, seed=0, std=0.3) if spec.insert.needs_block_file else ()
    model = build_model(spec, blocks).double().eval()
    for weight in model.parameters():
        if weight.dim() == 4:
            nn.init.kaiming_normal_(weight)  # as drawn, the deepest map's share fades from stage to stage
    assert isinstance(model.insert, LanguageInsert)
    with torch.no_grad():
        model.insert.mapper2.weight.mul_(4)  # as drawn, the eps of a LayerNorm is too much of the variance to fold
    return model


def image() -> Tensor:
    return torch.randn(2, 3, *SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("architecture", "placement", "tokens", "width", "has_norm"), HOSTS)
def test_the_tokens_pass_the_block_at_the_place_that_is_named(architecture, placement, tokens, width, has_norm):
    model = host(architecture, placement=placement)
    assert isinstance(model.insert, LanguageInsert)
    seen: list[Tensor] = []
    model.insert.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    with torch.no_grad():
        logits = model(image())
    assert [tuple(tensor.shape) for tensor in seen] == [(2, tokens, width)]
    assert (model.spec.token_width, model.spec.grid[0] * model.spec.grid[1]) == (width, tokens)
    assert (model.norm_after_insert is not None) == has_norm
    model.insert = nn.Identity()
    with torch.no_grad():
        assert (model(image()) - logits).abs().max() > 1e-3, "the answer depends on the block"
    if model.norm_after_insert is not None:
        norm, inputs = model.get_submodule(model.norm_after_insert), list[Tensor]()
        norm.register_forward_hook(lambda _module, given, _output: inputs.append(given[0]))
        with torch.no_grad():
            model(image())
        assert torch.equal(inputs[0], seen[0]), "with nothing in between, the norm reads the same tokens"


@pytest.mark.parametrize("architecture", ["unet-tiny", "unet-t-tiny", "ds-transunet-tiny"])
def test_tokens_of_a_map_are_its_pixels_row_by_row(architecture):
    """An insert that adds each token's number shifts the pixels of the map by their raster index."""
    model = host(architecture)

    class Number(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            return torch.arange(tokens.shape[1], dtype=tokens.dtype)[:, None].expand_as(tokens)

    model.insert = Number()
    name = {"unet-tiny": "Up5", "unet-t-tiny": "up1", "ds-transunet-tiny": "layer1"}[architecture]
    maps: list[Tensor] = []
    model.get_submodule(name).register_forward_hook(lambda _module, inputs, _output: maps.append(inputs[0]))
    with torch.no_grad():
        model(image())
    rows, columns = model.spec.grid
    assert torch.equal(maps[0][0, 0], torch.arange(rows * columns, dtype=torch.float64).reshape(rows, columns))


def test_the_first_auxiliary_head_of_ds_transunet_reads_what_the_block_returns():
    model = host("ds-transunet-tiny").train()
    read: list[Tensor] = []
    model.get_submodule("loss1").register_forward_hook(lambda _module, inputs, _output: read.append(inputs[0]))
    model.get_submodule("layer1").register_forward_hook(lambda _module, inputs, _output: read.append(inputs[0]))
    assert len(model(image())) == 3
    assert torch.equal(read[0], read[1])


@pytest.mark.parametrize(
    ("architecture", "placement", "choices"),
    [
        ("llm-swin-unet", 1, "before_norm, after_norm"),
        ("llm-swin-unet", "encoder", "before_norm, after_norm"),
        ("llm-ds-transunet-b", "after_norm", "before_norm, encoder"),
        ("llm-unet", "after_norm", "before_norm"),
        ("llm-unet-t", 3, "before_norm"),
    ],
)
def test_a_place_that_a_network_does_not_have_is_refused(architecture, placement, choices):
    with pytest.raises(
        UsageError, match=f"placement={placement} is no place in {architecture}; choose one of: {choices}"
    ):
        model_spec(architecture, (256, 256), 1, InsertSpec(placement=placement))


def test_the_place_in_the_encoder_is_for_ds_transunet_alone():
    with pytest.raises(UsageError, match="placement=encoder is for ds-transunet"):
        model_spec("llm-transunet", (256, 256), 1, InsertSpec(placement="encoder"))


@pytest.mark.parametrize("options", [{}, {"residual": "out"}, {"weights": "random"}, {"parts": "mlp"}], ids=str)
@pytest.mark.parametrize(("architecture", "placement", "tokens", "width", "has_norm"), HOSTS)
def test_folding_keeps_the_function_of_every_host(architecture, placement, tokens, width, has_norm, options):
    model = host(architecture, placement=placement, **options)
    with torch.no_grad():
        expected = model(image())
        folded, report = fold(model)
        assert (folded(image()) - expected).abs().max() < FOLDED * max(1.0, float(expected.abs().max()))
    assert (report["window_biases"].count == 0) == architecture.startswith("unet")
    assert report["language_projections"].count > 0
    cancels = has_norm and "residual" not in options
    assert (report["final_norm"].count == 1) == cancels
    if not has_norm and "residual" not in options:
        assert "no LayerNorm follows" in report["final_norm"].reason


@pytest.mark.parametrize("architecture", ["unet-tiny", "unet-t-tiny"])
def test_batch_norms_go_into_the_convolutions(architecture):
    torch.manual_seed(0)
    model = build_model(model_spec(architecture, SIZE, 3)).double().eval()
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.5)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    with torch.no_grad():
        expected = model(image())
        folded, report = fold(model)
        torch.testing.assert_close(folded(image()), expected, rtol=1e-10, atol=1e-10)  # float64
    assert report["batch_norms"].count == {"unet-tiny": 22, "unet-t-tiny": 18}[architecture]
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded.modules())
