"""TransUNet against the published table of shapes and counts, and its parts against plain NumPy."""

import numpy as np
import pytest
import torch
from torch import nn

from medseg_trt.network_spec import ModelSpec
from medseg_trt.train.models.presets import transunet, transunet_tiny
from medseg_trt.train.models.transunet import Bottleneck, StdConv2d, TransUNet

# Parameters of each part at 256 x 256 and 1 class, derived by hand from the layer table of the published R50-ViT-B/16.
PARTS = {
    "resnet.root": 9_536,
    "resnet.block1": 215_808,
    "resnet.block2": 1_219_584,
    "resnet.block3": 10_449_920,
    "patch_embedding": 787_200,
    "layers": 85_054_464,
    "encoder_norm": 1_536,
    "bridge": 3_539_968,
    "decoder.0": 2_950_144,
    "decoder.1": 737_792,
    "decoder.2": 147_712,
    "decoder.3": 11_584,
    "head": 145,
}


def test_every_part_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = TransUNet(transunet((256, 256), 1))
    counted = {name: sum(p.numel() for p in model.get_submodule(name).parameters()) for name in PARTS}
    assert counted == PARTS


@pytest.mark.parametrize("size", [(224, 224), (256, 256), (512, 512), (256, 192)])
def test_every_stage_has_the_published_shape(size):
    with torch.device("meta"):
        model = TransUNet(transunet(size, 9)).eval()
        shapes: dict[str, tuple[int, ...]] = {}
        for name in (
            "resnet.root",
            "resnet.block1",
            "resnet.block2",
            "resnet.block3",
            "encoder_norm",
            "bridge",
            "decoder.0",
            "decoder.1",
            "decoder.2",
            "decoder.3",
        ):

            def note(_module: nn.Module, _inputs: object, output: torch.Tensor, name: str = name) -> None:
                shapes[name] = tuple(output.shape)

            model.get_submodule(name).register_forward_hook(note)
        logits = model(torch.empty(2, 3, *size))
    h, w = size
    assert logits.shape == (2, 9, h, w)
    assert shapes == {
        "resnet.root": (2, 64, h // 2, w // 2),
        "resnet.block1": (2, 256, h // 4 - 1, w // 4 - 1),  # the pool has no padding
        "resnet.block2": (2, 512, h // 8, w // 8),
        "resnet.block3": (2, 1024, h // 16, w // 16),
        "encoder_norm": (2, h // 16 * (w // 16), 768),
        "bridge": (2, 512, h // 16, w // 16),
        "decoder.0": (2, 256, h // 8, w // 8),
        "decoder.1": (2, 128, h // 4, w // 4),
        "decoder.2": (2, 64, h // 2, w // 2),
        "decoder.3": (2, 16, h, w),
    }


def test_a_wrong_image_size_names_sizes_that_work():
    with pytest.raises(ValueError, match=r"250 pixels.*try 240 or 256"):
        ModelSpec(image_size=(256, 250), num_classes=2)


def test_a_grey_image_counts_as_three_equal_channels():
    torch.manual_seed(0)
    model = TransUNet(transunet_tiny((32, 48), 3)).eval()
    grey = torch.randn(2, 1, 32, 48)
    assert torch.equal(model(grey), model(grey.repeat(1, 3, 1, 1)))


def test_tokens_keep_their_place_in_a_picture_that_is_not_square():
    """What changes in the picture's top right corner must change the answer there most."""
    torch.manual_seed(0)
    model = TransUNet(transunet_tiny((64, 128), 2)).eval()
    image = torch.randn(1, 3, 64, 128)
    touched = image.clone()
    touched[..., :16, 112:] += 5
    with torch.no_grad():
        change = (model(touched) - model(image)).abs().sum((0, 1))
    tokens = change.unflatten(0, (4, 16)).unflatten(2, (8, 16)).mean((1, 3))  # (64, 128) -> (4, 8) tokens
    assert divmod(int(tokens.argmax()), 8) == (0, 7)


def test_the_standardised_kernel_is_the_formula_in_numpy():
    torch.manual_seed(0)
    conv = StdConv2d(3, 5, 3, bias=False).double()
    weight = conv.weight.detach().numpy()
    mean, variance = weight.mean((1, 2, 3), keepdims=True), weight.var((1, 2, 3), keepdims=True)
    expected = (weight - mean) / np.sqrt(variance + 1e-5)
    # float64 throughout: 1e-12 leaves room for the order of summation only.
    np.testing.assert_allclose(conv.standardised().detach().numpy(), expected, rtol=0, atol=1e-12)
    unbiased = (weight - mean) / np.sqrt(weight.var((1, 2, 3), keepdims=True, ddof=1) + 1e-5)
    assert np.abs(unbiased - expected).max() > 1e-3  # the fault that the limit above must catch


def test_the_shortcut_is_normalised_per_channel():
    projection = Bottleneck(64, 32, stride=2).shortcut
    assert isinstance(projection, nn.Sequential)
    norm = projection[1]
    assert isinstance(norm, nn.GroupNorm)
    assert (norm.num_groups, norm.eps) == (128, 1e-5)


def test_building_another_model_does_not_change_an_existing_one():
    torch.manual_seed(0)
    first = TransUNet(transunet_tiny((32, 32), 2)).eval()
    image = torch.randn(1, 3, 32, 32)
    before = first(image)
    TransUNet(transunet_tiny((64, 32), 5))
    with torch.device("meta"):
        TransUNet(transunet((224, 224), 9))
        again = sum(p.numel() for p in TransUNet(transunet((256, 256), 1)).parameters())
    assert torch.equal(first(image), before)
    assert again == 105_322_001
