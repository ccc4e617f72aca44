"""The encoder takes over published weights: every array has its place or is named, and training starts there."""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from scipy import ndimage
from tiny import tiny_changes, tiny_recipe, tiny_spec

from medseg_trt.cli import cli
from medseg_trt.errors import ArtefactError, UsageError
from medseg_trt.train.checkpoint import load_checkpoint
from medseg_trt.train.loop import train
from medseg_trt.train.models.model import build_model, model_spec
from medseg_trt.train.models.transunet import TransUNet
from medseg_trt.train.weights.pretrained import ENCODER_PARTS, load_encoder, resized_positions
from medseg_trt.train.weights.weight_names import NPZ, TIMM, names_elsewhere

HIDDEN, HEADS, MLP, WIDTH, LAYERS = 48, 4, 64, 32, 2  # of transunet-tiny
UNUSED = ("cls", "head/bias", "head/kernel", "pre_logits/bias", "pre_logits/kernel")
ATTENTION, MLP_BLOCK = "MultiHeadDotProductAttention_1", "MlpBlock_3"


def npz_arrays(side=14, seed=0):
    """Make the arrays of a small R50+ViT file: Google's names, layouts and unit axes."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    arrays = {"conv_root/kernel": draw(7, 7, 3, WIDTH)}
    for name in ("scale", "bias"):
        arrays[f"gn_root/{name}"] = draw(1, 1, 1, WIDTH)
    into = WIDTH
    for block, middle in enumerate((WIDTH, 2 * WIDTH, 4 * WIDTH), 1):
        unit = f"block{block}/unit1"
        sizes = {"1": (1, 1, into, middle), "2": (3, 3, middle, middle), "3": (1, 1, middle, 4 * middle)}
        for number, size in sizes.items():
            arrays[f"{unit}/conv{number}/kernel"] = draw(*size)
            for name in ("scale", "bias"):
                arrays[f"{unit}/gn{number}/{name}"] = draw(1, 1, 1, size[-1])
        arrays[f"{unit}/conv_proj/kernel"] = draw(1, 1, into, 4 * middle)
        for name in ("scale", "bias"):
            arrays[f"{unit}/gn_proj/{name}"] = draw(1, 1, 1, 4 * middle)
        into = 4 * middle
    arrays |= {"embedding/kernel": draw(1, 1, into, HIDDEN), "embedding/bias": draw(HIDDEN)}
    arrays["Transformer/posembed_input/pos_embedding"] = draw(1, 1 + side**2, HIDDEN)
    for layer in range(LAYERS):
        root = f"Transformer/encoderblock_{layer}"
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            for name in ("scale", "bias"):
                arrays[f"{root}/{norm}/{name}"] = draw(HIDDEN)
        for name in ("query", "key", "value"):
            arrays[f"{root}/{ATTENTION}/{name}/kernel"] = draw(HIDDEN, HEADS, HIDDEN // HEADS)
            arrays[f"{root}/{ATTENTION}/{name}/bias"] = draw(HEADS, HIDDEN // HEADS)
        arrays[f"{root}/{ATTENTION}/out/kernel"] = draw(HEADS, HIDDEN // HEADS, HIDDEN)
        arrays[f"{root}/{ATTENTION}/out/bias"] = draw(HIDDEN)
        arrays |= {
            f"{root}/{MLP_BLOCK}/Dense_0/kernel": draw(HIDDEN, MLP),
            f"{root}/{MLP_BLOCK}/Dense_0/bias": draw(MLP),
        }
        arrays |= {f"{root}/{MLP_BLOCK}/Dense_1/kernel": draw(MLP, HIDDEN)}
        arrays |= {f"{root}/{MLP_BLOCK}/Dense_1/bias": draw(HIDDEN)}
    for name in ("scale", "bias"):
        arrays[f"Transformer/encoder_norm/{name}"] = draw(HIDDEN)
    arrays |= {"cls": draw(1, 1, HIDDEN), "head/kernel": draw(HIDDEN, 9), "head/bias": draw(9)}
    return arrays | {"pre_logits/kernel": draw(HIDDEN, HIDDEN), "pre_logits/bias": draw(HIDDEN)}


def save_npz(path, arrays: dict[str, Any]):
    np.savez(path, **arrays)


def as_published(arrays) -> dict[str, Any]:
    """Restate TransUNet's ``load_from`` for our names: transposed kernels, flat vectors."""
    state = {"resnet.root.0.weight": arrays["conv_root/kernel"].transpose(3, 2, 0, 1)}
    state |= {
        "resnet.root.1.weight": arrays["gn_root/scale"].ravel(),
        "resnet.root.1.bias": arrays["gn_root/bias"].ravel(),
    }
    for block in (1, 2, 3):
        ours, theirs = f"resnet.block{block}.0", f"block{block}/unit1"
        for number in (1, 2, 3):
            state[f"{ours}.conv{number}.weight"] = arrays[f"{theirs}/conv{number}/kernel"].transpose(3, 2, 0, 1)
            state[f"{ours}.gn{number}.weight"] = arrays[f"{theirs}/gn{number}/scale"].ravel()
            state[f"{ours}.gn{number}.bias"] = arrays[f"{theirs}/gn{number}/bias"].ravel()
        state[f"{ours}.shortcut.0.weight"] = arrays[f"{theirs}/conv_proj/kernel"].transpose(3, 2, 0, 1)
        state[f"{ours}.shortcut.1.weight"] = arrays[f"{theirs}/gn_proj/scale"].ravel()
        state[f"{ours}.shortcut.1.bias"] = arrays[f"{theirs}/gn_proj/bias"].ravel()
    state["patch_embedding.weight"] = arrays["embedding/kernel"].transpose(3, 2, 0, 1)
    state["patch_embedding.bias"] = arrays["embedding/bias"]
    for layer in range(LAYERS):
        ours, theirs = f"layers.{layer}", f"Transformer/encoderblock_{layer}"
        for norm, published in (("attention_norm", "LayerNorm_0"), ("mlp_norm", "LayerNorm_2")):
            state[f"{ours}.{norm}.weight"] = arrays[f"{theirs}/{published}/scale"]
            state[f"{ours}.{norm}.bias"] = arrays[f"{theirs}/{published}/bias"]
        for name in ("query", "key", "value", "out"):
            kernel = arrays[f"{theirs}/{ATTENTION}/{name}/kernel"]
            state[f"{ours}.attention.{name}.weight"] = kernel.reshape(HIDDEN, HIDDEN).T
            state[f"{ours}.attention.{name}.bias"] = arrays[f"{theirs}/{ATTENTION}/{name}/bias"].ravel()
        for number in (0, 1):
            dense = f"{theirs}/{MLP_BLOCK}/Dense_{number}"
            state[f"{ours}.fc{number + 1}.weight"] = arrays[f"{dense}/kernel"].T
            state[f"{ours}.fc{number + 1}.bias"] = arrays[f"{dense}/bias"]
    for ours, theirs in (("weight", "scale"), ("bias", "bias")):
        state[f"encoder_norm.{ours}"] = arrays[f"Transformer/encoder_norm/{theirs}"]
    return state


def zoomed(stored, grid):
    """Restate TransUNet's resizing of the position embedding."""
    tokens = stored[0, 1:]
    side = int(np.sqrt(len(tokens)))
    square = tokens.reshape(side, side, -1)
    return np.asarray(ndimage.zoom(square, (grid[0] / side, grid[1] / side, 1), order=1)).reshape(
        1, grid[0] * grid[1], -1
    )


def tiny_model(size=(32, 32)) -> TransUNet:
    torch.manual_seed(3)
    model = build_model(tiny_spec("transunet-tiny", size, 1))
    assert isinstance(model, TransUNet)
    return model


def encoder_of(model):
    return {name: value.numpy() for name, value in model.state_dict().items() if name.startswith(ENCODER_PARTS)}


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "R50+ViT-B_16.npz"
    save_npz(path, npz_arrays())
    return path


@pytest.mark.parametrize("size", [(32, 32), (224, 224), (256, 256), (64, 96)])
def test_load_encoder_loads_or_reports_every_npz_array(npz, size):
    model, arrays = tiny_model(size), npz_arrays()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert tuple(load_encoder(model, npz)) == UNUSED
    encoder = encoder_of(model)
    expected = as_published(arrays)
    grid = (size[0] // 16, size[1] // 16)
    positions = arrays["Transformer/posembed_input/pos_embedding"]
    expected["position_embedding"] = positions[:, 1:] if grid == (14, 14) else zoomed(positions, grid)
    assert encoder.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(encoder[name], value, err_msg=name)
    rest = {name for name in before if not name.startswith(ENCODER_PARTS)}
    assert rest
    assert all(torch.equal(before[name], model.state_dict()[name]) for name in rest)


def test_positions_of_14_x_14_tokens_become_16_x_16_as_scipy_zooms_them():
    stored = np.random.default_rng(0).normal(size=(1, 197, 768)).astype(np.float32)
    resized = resized_positions(torch.from_numpy(stored), (16, 16)).numpy()
    np.testing.assert_array_equal(resized, zoomed(stored, (16, 16)))
    np.testing.assert_array_equal(resized[0, 0], stored[0, 1])  # the corners stay where they are
    np.testing.assert_array_equal(resized[0, -1], stored[0, -1])


def timm_tensors(arrays):
    """Say the same weights in timm's names, from the table of names alone."""
    published = as_published(arrays) | {"position_embedding": arrays["Transformer/posembed_input/pos_embedding"]}
    tensors, parts = {}, {}
    for ours, source in names_elsewhere(TIMM, published).items():
        if source.layout in ("query", "key", "value"):
            parts.setdefault(source.name, {})[source.layout] = published[ours]
        else:
            tensors[source.name] = published[ours]
    for name, three in parts.items():
        tensors[name] = np.concatenate([three["query"], three["key"], three["value"]])
    tensors |= {"cls_token": arrays["cls"], "head.weight": arrays["head/kernel"].T, "head.bias": arrays["head/bias"]}
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in tensors.items()}


def test_timms_file_gives_the_same_encoder(npz, tmp_path):
    save_file(timm_tensors(npz_arrays()), tmp_path / "timm.safetensors")
    one, other = tiny_model(), tiny_model()
    load_encoder(one, npz)
    assert load_encoder(other, tmp_path / "timm.safetensors") == ["cls_token", "head.bias", "head.weight"]
    for name, value in encoder_of(one).items():
        np.testing.assert_array_equal(encoder_of(other)[name], value, err_msg=name)


def test_the_names_are_timms_own_at_full_size():
    lines = (Path(__file__).parent / "timm_keys.txt").read_text(encoding="utf-8").splitlines()[1:]
    theirs = {name: json.loads(shape) for name, shape in (line.split(" ", 1) for line in lines)}
    with torch.device("meta"):
        ours = build_model(model_spec("transunet", (224, 224), 1)).state_dict()
    encoder = {name: value for name, value in ours.items() if name.startswith(ENCODER_PARTS)}
    sources = names_elsewhere(TIMM, encoder)
    assert theirs.keys() - {source.name for source in sources.values()} == {"cls_token", "head.weight", "head.bias"}
    for name, source in sources.items():
        if source.layout == "same":
            assert theirs[source.name] == list(encoder[name].shape)
    assert len(names_elsewhere(NPZ, encoder)) == len({source.name for source in names_elsewhere(NPZ, encoder).values()})


def broken(tmp_path, **changes):
    arrays = npz_arrays() | {name: value for name, value in changes.items() if value is not None}
    for name in (name for name, value in changes.items() if value is None):
        del arrays[name]
    save_npz(tmp_path / "broken.npz", arrays)
    return tmp_path / "broken.npz"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conv_root/kernel": None}, "1 missing, conv_root/kernel; give R50"),
        ({"conv_root/kernel": np.zeros((7, 7, 3, 64), np.float32)}, r"conv_root/kernel is \(7, 7, 3, 64\), but"),
        ({"embedding/bias": np.full(HIDDEN, np.inf, np.float32)}, "embedding/bias holds values that are not finite"),
        ({"embedding/bias": np.zeros(HIDDEN, np.int32)}, "embedding/bias.npy holds int32"),
        ({"Transformer/posembed_input/pos_embedding": np.zeros((1, 199, HIDDEN), np.float32)}, "pos_embedding is"),
    ],
)
def test_load_encoder_refuses_mismatched_arrays(tmp_path, changes, message):
    with pytest.raises(ArtefactError, match=message):
        load_encoder(tiny_model(), broken(tmp_path, **changes))


def test_damaged_files_and_other_kinds_are_refused_in_one_line(npz, tmp_path):
    cut = tmp_path / "cut.npz"
    cut.write_bytes(npz.read_bytes()[:5000])
    text = tmp_path / "weights.txt"
    text.write_text("no weights")
    for path, message in ((cut, "no usable .npz"), (text, "cannot be read"), (tmp_path / "no.npz", "does not exist")):
        with pytest.raises(ArtefactError, match=message) as caught:
            load_encoder(tiny_model(), path)
        assert "\n" not in str(caught.value)
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1,\n"  # NumPy reads it as Python, which has no end
    with zipfile.ZipFile(tmp_path / "header.npz", "w") as archive:
        archive.writestr("cls.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(ArtefactError, match=r"no usable \.npz"):
        load_encoder(tiny_model(), tmp_path / "header.npz")
    flipped = bytearray(npz.read_bytes())
    flipped[3000] ^= 255  # in the first kernel: the archive's checksum tells
    (tmp_path / "flipped.npz").write_bytes(flipped)
    with pytest.raises(ArtefactError, match=r"no usable \.npz"):
        load_encoder(tiny_model(), tmp_path / "flipped.npz")


def test_a_training_starts_from_the_file_and_says_so(source, npz, tmp_path, no_curve):
    data, block = source
    chosen = tiny_recipe("pretrained=file", "train.epochs=0")
    best = load_checkpoint(train(chosen, data, tmp_path / "run", block=block, weights=npz))
    expected = as_published(npz_arrays())
    for name, value in expected.items():
        np.testing.assert_array_equal(best.weights[name].numpy(), value)
    assert best.provenance.weights is not None
    assert best.provenance.weights.file == "R50+ViT-B_16.npz"
    assert best.provenance.weights.unused == UNUSED
    train(chosen, data, tmp_path / "run", block=block, resume=True)  # the file is no longer needed
    save_npz(tmp_path / "other.npz", npz_arrays(seed=1))
    with pytest.raises(UsageError, match="started with another pretrained weights"):
        train(chosen, data, tmp_path / "run", block=block, weights=tmp_path / "other.npz", resume=True)


def test_a_recipe_that_wants_weights_says_where_they_are_and_how_to_go_without(source, npz, tmp_path):
    data, block = source
    with pytest.raises(UsageError, match=r"--weights R50\+ViT-B_16\.npz, .*--set pretrained=none"):
        train(tiny_recipe("pretrained=file"), data, tmp_path / "run", block=block)
    with pytest.raises(UsageError, match="exclude each other"):
        train(tiny_recipe(), data, tmp_path / "run", block=block, weights=npz)
    assert not (tmp_path / "run" / "last.pt").exists()


def test_train_command_loads_pretrained_weights_and_records_them(source, npz, tmp_path, no_curve):
    data, block = source
    run = ["train", "--recipe", "folder", "--data", str(data.root), "--block", str(block), "--weights", str(npz)]
    run += [part for change in tiny_changes("train.epochs=0") for part in ("--set", change)]
    ran = CliRunner().invoke(cli, [*run, "-o", str(tmp_path / "run"), "--json"])
    assert ran.exit_code == 0, ran.output
    provenance = load_checkpoint(Path(json.loads(ran.stdout)["checkpoint"])).provenance
    assert provenance.recipe is not None
    assert provenance.weights is not None
    assert provenance.recipe["pretrained"] == "file"
    assert provenance.weights.file == npz.name
    ran = CliRunner().invoke(cli, [*run, "-o", str(tmp_path / "other"), "--set", "pretrained=none"])
    assert isinstance(ran.exception, UsageError)
