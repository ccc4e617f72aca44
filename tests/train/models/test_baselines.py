"""U-Net, Swin-UNet and DS-TransUNet: published counts, names, shapes, and every value in float64."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from baseline_forward import Details, ds_transunet_logits, swin_unet_logits, unet_logits, unet_t_logits
from torch import Tensor

from medseg_trt.errors import UsageError
from medseg_trt.networks import SwinUNetSpec
from medseg_trt.train.models.cost import cost
from medseg_trt.train.models.model import MODELS, build_model, count_parameters, model_spec
from medseg_trt.train.models.segmentation_model import SegmentationModel

KEYS = Path(__file__).parents[1] / "weights" / "baseline_keys.txt"
RECOMPUTED = ("attn_mask", "relative_position_index")  # buffers that follow from the architecture
# float64 rounds at 1.1e-16; sums of up to 4608 products of size 1, through up to 150 layers. 1.3e-14 was measured.
FLOAT64 = 1e-10


@pytest.mark.parametrize(
    ("architecture", "size", "classes", "parameters", "macs"),
    [
        ("swin-unet", 224, 9, 27_168_900, 6_109_780_992),
        ("swin-unet", 256, 1, 27_175_524, 8_015_314_944),
        # The auxiliary heads, 8 * 8 * 1024 + 64 * 64 * 128 MACs a class, have parameters but work in training alone.
        ("ds-transunet-b", 256, 9, 171_450_825, 54_498_113_920 - 9 * 589_824),
        ("ds-transunet-b", 256, 1, 171_441_329, 54_476_618_112 - 589_824),
        ("ds-transunet-l", 256, 9, 287_761_253, 87_083_721_600 - 9 * 589_824),
        ("ds-transunet-l", 256, 1, 287_751_757, 87_062_225_792 - 589_824),
        ("unet", 224, 9, 34_527_561, 50_057_183_232),
        ("unet", 256, 1, 34_527_041, 65_347_256_320),
        ("unet-t", 224, 9, 31_038_153, 36_903_845_888),
        ("unet-t", 256, 1, 31_037_633, 48_167_387_136),
        ("llm-swin-unet", 224, 9, 235_847_812, 6_109_780_992 + 10_244_333_568),
        ("llm-swin-unet", 256, 1, 235_854_436, 8_015_314_944 + 13_388_218_368),
        ("llm-ds-transunet-b", 256, 1, 382_217_393, 54_476_618_112 - 589_824 + 13_522_436_096),
        ("llm-ds-transunet-l", 256, 1, 498_527_821, 87_062_225_792 - 589_824 + 13_522_436_096),
        ("llm-unet", 224, 9, 245_303_625, 50_057_183_232 + 41_624_403_968),
        ("llm-unet", 256, 1, 245_303_105, 65_347_256_320 + 54_492_397_568),
        ("llm-unet-t", 224, 9, 241_814_217, 36_903_845_888 + 41_624_403_968),
        ("llm-unet-t", 256, 1, 241_813_697, 48_167_387_136 + 54_492_397_568),
    ],
)
def test_the_published_counts_to_the_unit(architecture, size, classes, parameters, macs):
    counted = cost(model_spec(architecture, (size, size), classes))
    assert (counted.parameters["total"], counted.macs) == (parameters, macs)


@pytest.mark.parametrize(
    ("architecture", "size", "classes", "parameters"),
    [(f"swin-unet {size}", size, 1, count) for size, count in ((320, 27_193_476), (384, 27_215_652), (512, 27_272_676))]
    + [
        ("swin-unet", 224, 4, 27_168_420),
        ("swin-unet", 256, 4, 27_175_812),
        ("ds-transunet-b", 256, 4, 171_444_890),
        ("ds-transunet-l", 256, 4, 287_755_318),
        ("unet", 256, 4, 34_527_236),
        ("unet-t", 256, 4, 31_037_828),
    ],
)
def test_the_counts_of_other_sizes_and_classes(architecture, size, classes, parameters):
    with torch.device("meta"):
        model = build_model(model_spec(architecture.partition(" ")[0], (size, size), classes))
    assert count_parameters(model)["total"] == parameters


# Parameters of each part at 256 x 256 and 1 class, derived by hand from the published layer tables.
PARTS = {
    "swin-unet": {
        "patch_embed": 4_896,
        "norm": 1_536,
        "concat_back_dim": 387_744,
        "norm_up": 192,
        "up": 147_648,
        "output": 96,
    },
    "ds-transunet-b": {
        "encoder": 86_745_016,
        "encoder2": 27_534_522,
        "cross_att_1": 186_720,
        "cross_att_2": 422_208,
        "cross_att_3": 1_040_640,
        "cross_att_4": 2_867_328,
        "change1": 406_272,
        "change2": 1_623_552,
        "change3": 6_491_136,
        "change4": 25_958_400,
        "layer1": 13_650_064,
        "layer2": 3_417_160,
        "layer3": 856_612,
        "layer4": 147_712,
        "layer5": 36_992,
        "down1": 128,
        "down2": 55_680,
        "final": 33,
        "loss1": 1_025,
        "loss2": 129,
    },
    "ds-transunet-l": {"encoder": 194_998_164, "encoder2": 27_534_522},
}


@pytest.mark.parametrize("architecture", PARTS)
def test_every_part_has_the_published_number_of_parameters(architecture):
    with torch.device("meta"):
        model = build_model(model_spec(architecture, (256, 256), 1))
    parts = PARTS[architecture]
    assert {name: sum(p.numel() for p in model.get_submodule(name).parameters()) for name in parts} == parts


def published_shapes(heading: str, column: int) -> dict[str, str]:
    """Return names and shapes below a heading of the list, of the model in a column of it."""
    section = KEYS.read_text(encoding="utf-8").partition(f"[{heading}")[2].partition("\n[")[0]
    lines = [line for line in section.splitlines()[1:] if line and not line.startswith("#")]
    shapes = {}
    for name, described in (line.split(" ", 1) for line in lines):
        of_columns = described.removesuffix(" int64").split(" | ")
        shapes[name.removeprefix("swin_unet.")] = of_columns[min(column, len(of_columns) - 1)]
    return shapes


@pytest.mark.parametrize(
    ("architecture", "size", "classes", "heading", "column"),
    [
        ("swin-unet", 224, 9, "HuCaoFighting", 0),
        ("swin-unet", 256, 1, "HuCaoFighting", 1),
        ("ds-transunet-b", 256, 1, "TianBaoGe", 0),
        ("ds-transunet-l", 256, 1, "TianBaoGe", 1),
        ("unet-t", 224, 9, "milesial", 0),
        ("unet-t", 256, 1, "milesial", 1),
        ("unet", 224, 9, "LeeJunHyun", 0),
        ("unet", 256, 1, "LeeJunHyun", 1),
    ],
)
def test_names_and_shapes_are_the_authors(architecture, size, classes, heading, column):
    with torch.device("meta"):
        model = build_model(model_spec(architecture, (size, size), classes))
    ours = {name: str(list(tensor.shape)) for name, tensor in model.state_dict().items()}
    theirs = published_shapes(heading, column)
    assert len(theirs) == {"HuCaoFighting": 238, "TianBaoGe": 840, "milesial": 118, "LeeJunHyun": 156}[heading]
    assert ours == {name: shape for name, shape in theirs.items() if not name.endswith(RECOMPUTED)}


@pytest.mark.parametrize(
    ("architecture", "size", "message"),
    [
        ("swin-unet", (112, 112), "multiple of 32: try 96 or 128"),
        ("swin-unet", (252, 252), "multiple of 32: try 224 or 256"),
        ("swin-unet", (224, 352), "try 224 x 448"),
        ("ds-transunet-b", (224, 224), "multiple of 64: try 192 or 256"),
        ("ds-transunet-b", (256, 288), "width is 288 .* multiple of 64: try 256 or 320"),
        ("ds-transunet-l", (250, 256), "height is 250 .* multiple of 64: try 192 or 256"),
        ("unet", (250, 256), "multiple of 16: try 240 or 256"),
        ("unet-t", (256, 15), "15 pixels on a side; try 16"),
        ("unet", (16384, 8192), "too many for a network"),
        ("swin-unet", (2048, 2048), "take smaller images or windows"),
        ("ds-transunet-b", (8192, 8192), "take smaller images or windows"),
    ],
)
def test_an_image_size_that_cannot_be_is_refused_with_one_that_can(architecture, size, message):
    with pytest.raises(UsageError, match=message):
        model_spec(architecture, size, 1)


@pytest.mark.parametrize(("window", "size"), [(7, 448), (8, 64), (8, 128), (8, 512)])
def test_swin_unet_supports_fixed_windows_of_7_and_8(window, size):
    spec = SwinUNetSpec(image_size=(size, size), num_classes=1, window=window)
    with torch.device("meta"):
        assert build_model(spec)(torch.empty(1, 3, size, size)).shape == (1, 1, size, size)


@pytest.mark.parametrize(("window", "size"), [(7, 256), (7, 336), (8, 192), (8, 384)])
def test_a_fixed_window_that_divides_no_map_is_refused(window, size):
    with pytest.raises(ValueError, match="try "):
        SwinUNetSpec(image_size=(size, size), num_classes=1, window=window)


def drawn(architecture: str, size: tuple[int, int]) -> SegmentationModel:
    """Return a network in float64 with weights that all matter: norms off one and zero, biases off zero."""
    torch.manual_seed(0)
    model = build_model(model_spec(architecture, size, 3)).double().eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif tensor.dim() == 1:
                tensor.normal_(1.0 if name.endswith("weight") else 0.0, 0.2)
            elif name.endswith("relative_position_bias_table"):
                tensor.normal_(0, 0.5)
            elif tensor.dim() == 2:
                tensor.normal_(0, tensor.shape[1] ** -0.5)
    return model


def swin(state: dict[str, Tensor], image: Tensor, details: Details) -> Tensor:
    return swin_unet_logits(state, image, replace(details, encoder_head_width=8))


def ds(state: dict[str, Tensor], image: Tensor, details: Details) -> Tensor:
    tiny = replace(details, encoder_head_width=8, decoder_head_width=8)
    return torch.cat(ds_transunet_logits(state, image, tiny, groups=4), 1)


ORACLES: dict[str, tuple[Callable[..., Tensor], tuple[int, int]]] = {
    "unet-tiny": (unet_logits, (48, 32)),
    "unet-t-tiny": (unet_t_logits, (49, 35)),  # odd at several stages: padded
    "swin-unet-tiny": (swin, (128, 128)),  # windows of 4
    "ds-transunet-tiny": (ds, (64, 128)),
}


def difference(architecture: str, details: Details) -> float:
    """Return the largest difference between our network and the oracle with some details."""
    oracle, size = ORACLES[architecture]
    model = drawn(architecture, size)
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    if architecture.startswith("ds"):
        model.train()  # for the auxiliary heads
        for layer in model.modules():
            if hasattr(layer, "probability"):
                layer.eval()
    with torch.no_grad():
        ours: Any = model(image)
        ours = torch.cat(ours, 1) if isinstance(ours, tuple) else ours
        return float((ours - oracle(model.state_dict(), image, details)).abs().max())


@pytest.mark.parametrize("architecture", ORACLES)
def test_baseline_logits_equal_the_float64_oracle(architecture):
    assert difference(architecture, Details()) < FLOAT64


SWIN_FAULTS: dict[str, dict[str, Any]] = {
    "eps of LayerNorm": {"layer_norm_eps": 1e-6},
    "approximate GELU": {"gelu": "tanh"},
    "merge order": {"merge_order": ((0, 0), (0, 1), (1, 0), (1, 1))},
    "no shift mask": {"masks_shifts": False},
    "key minus query": {"query_minus_key": False},
    "order of the skip": {"skip_first": False},
}
FAULTS: dict[str, dict[str, dict[str, Any]]] = {
    "unet-tiny": {"order of the skip": {"skip_first": False}, "bilinear": {"upsampling": "bilinear"}},
    "unet-t-tiny": {"order of the skip": {"skip_first": False}},
    "swin-unet-tiny": {**SWIN_FAULTS, "expand order": {"expands_rows_first": False}},
    "ds-transunet-tiny": {
        **SWIN_FAULTS,
        "padded keys masked": {"masks_padding": True},
        "no norm of the stages": {"norms_stages": False},
        "bilinear": {"upsampling": "bilinear"},
    },
}


@pytest.mark.parametrize(
    ("architecture", "fault"), [(architecture, fault) for architecture, faults in FAULTS.items() for fault in faults]
)
def test_faulty_baseline_detail_exceeds_the_tolerance(architecture, fault):
    wrong = difference(architecture, Details(**FAULTS[architecture][fault]))
    assert wrong > 1e5 * FLOAT64, "the smallest, an eps, moves the logits by 8e-5"


@pytest.mark.parametrize("architecture", [name for name in MODELS if name.endswith("-tiny")])
def test_a_grey_image_counts_as_three_equal_channels(architecture):
    torch.manual_seed(0)
    model = build_model(model_spec(architecture, (64, 64), 3)).eval()
    grey = torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(grey), model(grey.repeat(1, 3, 1, 1)))
