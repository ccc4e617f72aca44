"""ImageNet's Swin transformers go where the authors' loaders put them, and what does not fit is refused."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from medseg_trt.errors import ArtefactError, UsageError
from medseg_trt.train.models.ds_transunet import DSTransUNet, SwinEncoder
from medseg_trt.train.models.model import build_model, model_spec
from medseg_trt.train.models.presets import ds_transunet_b
from medseg_trt.train.models.swin import WindowAttention, relative_positions
from medseg_trt.train.weights.swin_weights import load_initial, read_swin, resized_table

TINY = (8, (2, 2, 6, 2), (1, 2, 4, 8))
# What Swin-UNet does not take from ImageNet: three expansions, the joins, and the head.
RANDOM = {
    *(f"layers_up.0.{name}" for name in ("expand.weight", "norm.weight", "norm.bias")),
    *(f"layers_up.{i}.upsample.{name}" for i in (1, 2) for name in ("expand.weight", "norm.weight", "norm.bias")),
    *(f"concat_back_dim.{number}.{name}" for number in (1, 2, 3) for name in ("weight", "bias")),
    *("norm_up.weight", "norm_up.bias", "up.expand.weight", "up.norm.weight", "up.norm.bias", "output.weight"),
}


def swin_state(width: int, depths: tuple[int, ...], num_heads: tuple[int, ...], window: int = 7) -> dict[str, Tensor]:
    """Make a Swin transformer's state dict with Microsoft's names; every value is another."""
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    state = {"patch_embed.proj.weight": draw(width, 3, 4, 4), "patch_embed.proj.bias": draw(width)}
    norms = {"patch_embed.norm": width, "norm": 8 * width}
    for stage, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
        wide = width << stage
        for block in (f"layers.{stage}.blocks.{number}" for number in range(depth)):
            norms |= {f"{block}.norm1": wide, f"{block}.norm2": wide}
            linears = {"attn.qkv": (3 * wide, wide), "attn.proj": (wide, wide)}
            linears |= {"mlp.fc1": (4 * wide, wide), "mlp.fc2": (wide, 4 * wide)}
            for name, shape in linears.items():
                state |= {f"{block}.{name}.weight": draw(*shape), f"{block}.{name}.bias": draw(shape[0])}
            state[f"{block}.attn.relative_position_bias_table"] = draw((2 * window - 1) ** 2, heads)
            state[f"{block}.attn.relative_position_index"] = relative_positions(window)
        if stage < 3:
            norms[f"layers.{stage}.downsample.norm"] = 4 * wide
            state[f"layers.{stage}.downsample.reduction.weight"] = draw(2 * wide, 4 * wide)
            state[f"layers.{stage}.blocks.1.attn_mask"] = draw(4, window**2, window**2)
    for name, size in norms.items():
        state |= {f"{name}.weight": draw(size), f"{name}.bias": draw(size)}
    return state | {"head.weight": draw(10, 8 * width), "head.bias": draw(10)}


def saved(path: Path, state: dict[str, Tensor]) -> Path:
    torch.save({"model": state}, path)
    return path


def test_swin_unet_takes_the_tensors_that_the_authors_loader_takes(tmp_path):
    state = swin_state(*TINY)
    model = build_model(model_spec("swin-unet-tiny", (224, 224), 9))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    unused = load_initial(model, [saved(tmp_path / "swin.pth", state)])
    after = model.state_dict()
    assert {name for name in after if torch.equal(after[name], before[name])} == RANDOM
    blocks = sum(isinstance(layer, WindowAttention) for layer in model.modules())
    masks = 6
    assert len(after.keys() - RANDOM) + blocks + masks == 217, "with the buffers, which ours computes"
    assert len(after) + blocks + masks == 238
    for name in after.keys() - RANDOM:
        theirs = re.sub(r"^layers_up\.(\d)", lambda match: f"layers.{3 - int(match[1])}", name)
        assert torch.equal(after[name], state[theirs]), name
    assert {name.split(".")[3] for name in unused if name.startswith("layers.2.blocks")} == {"2", "3", "4", "5"}


def test_as_many_parameters_come_from_imagenet_as_published():
    with torch.device("meta"):
        model = build_model(model_spec("swin-unet", (224, 224), 9))
    loaded = sum(p.numel() for name, p in model.named_parameters() if name not in RANDOM)
    assert (loaded, sum(p.numel() for p in model.parameters()) - loaded) == (25_082_820, 2_086_080)


def test_tables_of_another_window_are_resized_per_head(tmp_path):
    state = swin_state(*TINY)
    model = build_model(model_spec("swin-unet-tiny", (256, 256), 1))  # windows of 8
    load_initial(model, [saved(tmp_path / "swin.pth", state)])
    name = "layers.1.blocks.0.attn.relative_position_bias_table"
    table, resized = state[name], model.state_dict()[name]
    assert resized.shape == (15**2, 2)
    middle = resized.reshape(15, 15, 2)[7, 7]  # no offset: the middle of both
    torch.testing.assert_close(middle, table.reshape(13, 13, 2)[6, 6], rtol=0.0, atol=1e-6)
    ramp = torch.linspace(0, 1, 13)[:, None].expand(13, 13).reshape(-1, 1)
    across = resized_table(ramp, 15**2).reshape(15, 15)
    assert (across.diff(dim=0) > 0).all(), "rows stay rows"
    assert across.std(dim=1).max() < 1e-6


def test_timms_files_have_the_merging_at_the_next_stage(tmp_path):
    state = swin_state(*TINY)
    timm = {
        re.sub(r"^layers\.(\d)\.downsample", lambda match: f"layers.{int(match[1]) + 1}.downsample", name): tensor
        for name, tensor in state.items()
    }
    save_file({name: tensor.contiguous() for name, tensor in timm.items()}, tmp_path / "swin.safetensors")
    microsoft = read_swin(saved(tmp_path / "swin.pth", state))
    weights = read_swin(tmp_path / "swin.safetensors")
    assert weights.keys() == microsoft.keys()
    assert all(torch.equal(weights[name], microsoft[name]) for name in weights)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_ds_transunet_takes_two_files_in_any_order(order, tmp_path):
    fine, coarse = swin_state(16, (2, 2, 2, 2), (1, 2, 4, 8)), swin_state(8, (2, 2, 2, 2), (1, 2, 4, 8))
    files = [saved(tmp_path / "fine.pth", fine), saved(tmp_path / "coarse.pth", coarse)]
    torch.manual_seed(0)
    spec = model_spec("ds-transunet-tiny", (64, 64), 1)
    model = build_model(replace(spec, width=16))
    assert isinstance(model, DSTransUNet)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    load_initial(model, [files[number] for number in order])
    after = model.state_dict()
    same = {name for name in after if torch.equal(after[name], before[name])}
    norms = {name for name in after if re.match(r"encoder2?\.norm\d\.", name)}
    assert {name for name in same if name.startswith("encoder")} == norms | {"encoder2.patch_embed.proj.weight"}
    assert same >= {name for name in after if not name.startswith("encoder")}, "nothing goes into the decoder"
    assert torch.equal(after["encoder2.layers.3.blocks.1.mlp.fc2.bias"], coarse["layers.3.blocks.1.mlp.fc2.bias"])


def test_as_many_tensors_go_into_ds_transunet_as_published():
    with torch.device("meta"):
        model = DSTransUNet(ds_transunet_b((256, 256), 1))
    counts = []
    for encoder, stem in ((model.encoder, 0), (model.encoder2, 1)):
        assert isinstance(encoder, SwinEncoder)
        buffers = sum(isinstance(layer, WindowAttention) for layer in encoder.modules())
        counts.append(len(encoder.state_dict()) - 8 - stem + buffers)
    assert counts == [349, 180]


@pytest.mark.parametrize(
    ("architecture", "change", "message"),
    [
        ("swin-unet-tiny", lambda state: {**state, "norm.bias": torch.full((64,), torch.inf)}, "not finite"),
        ("swin-unet-tiny", lambda state: {**state, "norm.bias": torch.ones(65)}, r"norm\.bias is \(65,\)"),
        (
            "swin-unet-tiny",
            lambda state: {n: t for n, t in state.items() if n != "norm.bias"},
            r"1 missing, norm\.bias",
        ),
        ("swin-unet-tiny", lambda state: {"layers.0.x": torch.ones(1)}, "it is no Swin transformer"),
        ("swin-unet-tiny", lambda state: swin_state(16, (2, 2, 6, 2), (1, 2, 4, 8)), r"is \(16, 3, 4, 4\)"),
    ],
)
def test_mismatched_swin_weights_are_refused(architecture, change, message, tmp_path):
    model = build_model(model_spec(architecture, (32, 32), 1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ArtefactError, match=message):
        load_initial(model, [saved(tmp_path / "swin.pth", change(swin_state(*TINY)))])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), "nothing was copied"


def test_networks_without_such_files_and_wrong_numbers_of_them_are_refused(tmp_path):
    path = saved(tmp_path / "swin.pth", swin_state(*TINY))
    with pytest.raises(UsageError, match="unet-tiny starts from random weights"):
        load_initial(build_model(model_spec("unet-tiny", (32, 32), 1)), [path])
    with pytest.raises(UsageError, match="2 are needed: swin_base"):
        load_initial(build_model(model_spec("ds-transunet-tiny", (64, 64), 1)), [path])
    with pytest.raises(ArtefactError, match="does not exist"):
        load_initial(build_model(model_spec("swin-unet-tiny", (32, 32), 1)), [tmp_path / "none.pth"])
