"""Checkpoints of Swin-UNet, DS-TransUNet and U-Net give the logits of the published forward pass, or are refused."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from baseline_forward import Details, ds_transunet_logits, swin_unet_logits, unet_logits, unet_t_logits
from click.testing import CliRunner
from torch import Tensor

from medseg_trt.cli import cli
from medseg_trt.errors import ArtefactError, MedsegError
from medseg_trt.networks import SwinUNetSpec
from medseg_trt.spec import Classes, Preprocessing
from medseg_trt.train.checkpoint import Checkpoint, load_checkpoint
from medseg_trt.train.models.model import build_model, model_spec, runner
from medseg_trt.train.models.swin import WindowAttention, relative_positions, shift_mask
from medseg_trt.train.official_weights import import_official

THREE = Classes(names=("background", "disc", "bar"))
CONTRACT = Preprocessing(image_size=(64, 64), window=(-125.0, 275.0))
TINY = Details(encoder_head_width=8, decoder_head_width=8)
# float32 through up to 150 layers, twice in another order, as a share of the largest logit; 3e-6 is the most measured.
# A wrong detail gives 1e-4 and more (tests/train/models/test_baselines.py).
FLOAT32 = 2e-5
ORACLES: dict[str, Any] = {
    "unet-tiny": unet_logits,
    "unet-t-tiny": unet_t_logits,
    "swin-unet-tiny": partial(swin_unet_logits, details=TINY),
    "ds-transunet-tiny": lambda state, image: ds_transunet_logits(state, image, TINY, groups=4)[0],
}


def official_state(architecture: str, size: tuple[int, int] = (64, 64), seed: int = 0) -> dict[str, Tensor]:
    """Make a state dict under the authors' names, with the buffers that ours does not store; every value matters."""
    torch.manual_seed(seed)
    model = build_model(model_spec(architecture, size, 3))
    state = model.state_dict()
    for name, tensor in state.items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif tensor.dim() == 1:
            tensor.normal_(1.0 if name.endswith("weight") else 0.0, 0.2)
        elif tensor.dim() == 2:
            tensor.normal_(0, tensor.shape[1] ** -0.5)
    for name, layer in model.named_modules():
        if isinstance(layer, WindowAttention):
            state[f"{name}.relative_position_index"] = layer.get_buffer("relative_position_index")
            if isinstance(layer.mask, Tensor) and architecture.startswith("swin"):
                state[f"{name.removesuffix('.attn')}.attn_mask"] = layer.mask
    return state


def imported(tmp_path: Path, content: Any, architecture: str, **options: Any) -> Checkpoint:
    torch.save(content, tmp_path / "theirs.pth")
    import_official(
        tmp_path / "theirs.pth",
        tmp_path / "model.pt",
        preprocessing=CONTRACT,
        classes=THREE,
        architecture=architecture,
        **options,
    )
    return load_checkpoint(tmp_path / "model.pt")


def largest_difference(checkpoint: Checkpoint, state: dict[str, Tensor], architecture: str) -> float:
    image = torch.randn(2, 3, *checkpoint.spec.image_size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = ORACLES[architecture](state, image).numpy()
    return float(np.abs(runner(checkpoint.model())(image.numpy()) - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("architecture", ORACLES)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_logits_are_those_of_the_published_forward_pass(architecture, prefix, tmp_path):
    size = (128, 128) if architecture.startswith("swin") else (64, 64)
    state = official_state(architecture, size)
    own = "swin_unet." if architecture.startswith("swin") else ""
    checkpoint = imported(tmp_path, {prefix + own + name: tensor for name, tensor in state.items()}, architecture)
    assert checkpoint.spec.image_size == checkpoint.preprocessing.image_size == size
    assert largest_difference(checkpoint, state, architecture) < FLOAT32


@pytest.mark.parametrize(
    ("wrap", "architecture"),
    [
        (lambda state: {"model": state, "epoch": 3}, "swin-unet-tiny"),
        (lambda state: {"state_dict": state, "optimizer": {"lr": 0.1}}, "ds-transunet-tiny"),
        (lambda state: {**state, "mask_values": [0, 1, 2]}, "unet-t-tiny"),
        (lambda state: {"net": {f"module.{name}": tensor for name, tensor in state.items()}}, "unet-tiny"),
    ],
)
def test_wrapped_baseline_state_dicts_are_imported(wrap, architecture, tmp_path):
    state = official_state(architecture)
    checkpoint = imported(tmp_path, wrap(state), architecture)
    assert largest_difference(checkpoint, state, architecture) < FLOAT32


def test_the_last_layer_of_nest_of_unets_has_another_name(tmp_path):
    state = official_state("unet-tiny")
    renamed = {name.replace("Conv_1x1.", "Conv."): tensor for name, tensor in state.items()}
    assert largest_difference(imported(tmp_path, renamed, "unet-tiny"), state, "unet-tiny") < FLOAT32


def test_biases_of_milesials_older_code_go_into_batch_norm(tmp_path):
    state = official_state("unet-t-tiny")
    older = dict(state)
    for name in [name for name in state if name.endswith((".double_conv.0.weight", ".double_conv.3.weight"))]:
        older[name.replace("weight", "bias")] = torch.randn(len(state[name]))
    assert len(older) == 118 + 18
    assert largest_difference(imported(tmp_path, older, "unet-t-tiny"), older, "unet-t-tiny") < FLOAT32


@pytest.mark.parametrize("keeps", [True, False])
def test_the_heads_of_deep_supervision_are_kept_or_dropped(keeps, tmp_path):
    state = official_state("ds-transunet-tiny")
    checkpoint = imported(tmp_path, state, "ds-transunet-tiny", keep_auxiliary=keeps)
    assert {"loss1.0.weight", "loss2.0.bias"} <= checkpoint.weights.keys() or not keeps
    assert any(name.startswith("loss") for name in checkpoint.weights) == keeps
    assert largest_difference(checkpoint, state, "ds-transunet-tiny") < FLOAT32
    without = {name: tensor for name, tensor in state.items() if not name.startswith("loss")}
    assert not any(name.startswith("loss") for name in imported(tmp_path, without, "ds-transunet-tiny").weights)


def test_the_window_and_the_size_of_a_swin_unet_follow_from_its_tensors(tmp_path):
    torch.manual_seed(0)
    model = build_model(SwinUNetSpec(image_size=(128, 128), num_classes=3, width=8, num_heads=(1, 2, 4, 8), window=2))
    state = model.state_dict() | {"layers.0.blocks.1.attn_mask": shift_mask((32, 32), 2, 1)}
    spec = imported(tmp_path, state, "swin-unet-tiny").spec
    assert isinstance(spec, SwinUNetSpec)
    assert (spec.image_size, spec.window) == ((128, 128), 2)
    assert imported(tmp_path, state, "swin-unet-tiny", image_size=(192, 192)).spec.image_size == (192, 192)
    with pytest.raises(MedsegError, match=r"windows of 2 tokens: .* try "):
        imported(tmp_path, state, "swin-unet-tiny", image_size=(224, 224))


def without(name: str) -> Any:
    return lambda state: {key: tensor for key, tensor in state.items() if key != name}


def with_tensor(name: str, tensor: Tensor) -> Any:
    return lambda state: {**state, name: tensor}


FIRST = "layers.0.blocks.0.attn"


@pytest.mark.parametrize(
    ("architecture", "change", "message"),
    [
        ("unet-tiny", without("Up5.up.1.bias"), r"1 missing: Up5\.up\.1\.bias"),
        ("unet-tiny", with_tensor("Att5.W_g.0.weight", torch.ones(2)), r"1 unknown: Att5"),
        ("unet-t-tiny", with_tensor("outc.conv.bias", torch.full((3,), torch.nan)), "not finite"),
        ("unet-t-tiny", with_tensor("outc.conv.bias", torch.ones(4)), r"is \(4,\), but that of unet-t-tiny is \(3,\)"),
        ("unet-t-tiny", with_tensor("inc.double_conv.0.bias", torch.ones(9)), r"1 unknown: inc\.double_conv\.0\.bias"),
        ("swin-unet-tiny", without("norm_up.weight"), r"1 missing: norm_up\.weight"),
        (
            "swin-unet-tiny",
            with_tensor(f"{FIRST}.relative_position_index", relative_positions(2).T.contiguous()),
            "relative_position_index is not what",
        ),
        (
            "swin-unet-tiny",
            with_tensor("layers.0.blocks.1.attn_mask", torch.zeros(64, 4, 4)),
            r"layers\.0\.blocks\.1\.attn_mask is not what swin-unet-tiny computes",
        ),
        ("swin-unet-tiny", with_tensor(f"{FIRST}.relative_position_bias_table", torch.ones(8, 1)), "no layers.0"),
        ("swin-unet-tiny", with_tensor(f"{FIRST}.relative_position_bias_table", torch.ones(())), "no layers.0"),
        ("swin-unet-tiny", with_tensor("output.weight", torch.ones(3)), "no convolution that ends the network"),
        ("ds-transunet-tiny", without("cross_att_2.linear_s.bias"), r"1 missing: cross_att_2\.linear_s\.bias"),
        ("ds-transunet-tiny", without("loss1.0.bias"), r"1 missing: loss1\.0\.bias"),
        ("ds-transunet-tiny", with_tensor("layer1.attn_mask", torch.zeros(1, 0, 0)), r"1 unknown: layer1\.attn_mask"),
        ("swin-unet-tiny", with_tensor("other.attn_mask", torch.zeros(1, 0, 0)), r"other\.attn_mask is not what"),
    ],
)
def test_mismatched_baseline_weights_are_refused(architecture, change, message, tmp_path):
    with pytest.raises(ArtefactError, match=message) as caught:
        imported(tmp_path, change(official_state(architecture)), architecture)
    assert "\n" not in str(caught.value)


def test_the_published_sizes_are_told_from_the_tensors_alone(tmp_path):
    large = {"encoder.patch_embed.proj.weight": torch.ones(192, 3, 4, 4), "final.weight": torch.ones(1, 32, 1, 1)}
    torch.save(large, tmp_path / "l.pth")
    with pytest.raises(ArtefactError, match=r"no checkpoint of ds-transunet-l: \d+ missing"):
        import_official(tmp_path / "l.pth", tmp_path / "model.pt", preprocessing=CONTRACT)


def test_the_command_drops_the_auxiliary_heads(tmp_path):
    torch.save(official_state("ds-transunet-tiny"), tmp_path / "theirs.pth")
    options = ["--architecture", "ds-transunet-tiny", "--image-size", "64", "--drop-auxiliary", "-o"]
    ran = CliRunner().invoke(cli, ["import", str(tmp_path / "theirs.pth"), *options, str(tmp_path / "model.pt")])
    assert ran.exit_code == 0, ran.output
    assert not any(name.startswith("loss") for name in load_checkpoint(tmp_path / "model.pt").weights)
