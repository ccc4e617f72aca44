"""A checkpoint comes back with equal logits and its own block, and runs no code; damaged or altered, it is refused."""

import hashlib
import os
import pickle
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import LESION, SIZE, make_checkpoint

from medseg_trt.errors import ArtefactError, InputError
from medseg_trt.spec import InsertSpec
from medseg_trt.train import checkpoint as module
from medseg_trt.train.block.blocks import random_block, save_block
from medseg_trt.train.checkpoint import Checkpoint, block_name, load_checkpoint, save_checkpoint, trained_weights
from medseg_trt.train.models.model import TINY_LLAMA, build_model


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """The user's cache of blocks, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "medseg-trt" / "blocks"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A checkpoint with a frozen block beside it; do not write to its folder."""
    return make_checkpoint(tmp_path_factory.mktemp("made"), provenance={"recipe": {"name": "generated"}, "epoch": 3})


@pytest.fixture
def saved(made, tmp_path) -> Path:
    """The checkpoint and its block, in a folder to write to."""
    folder = tmp_path / "saved"
    folder.mkdir()
    digest = load_checkpoint(made).block_sha256
    assert digest is not None
    for name in ("model.pt", block_name(digest)):
        shutil.copyfile(made.parent / name, folder / name)
    return folder / "model.pt"


def the_block(path: Path) -> Path:
    """Return the block's file beside a checkpoint."""
    return next(path.parent.glob("block-*.safetensors"))


def logits(checkpoint: Checkpoint) -> torch.Tensor:
    with torch.inference_mode():
        return checkpoint.model()(torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(0)))


def change(path: Path, how: Callable[[dict[str, Any]], object]) -> None:
    """Write a checkpoint again after ``how`` has changed what is in it."""
    content = torch.load(path, weights_only=True)
    how(content)
    torch.save(content, path)


@pytest.mark.parametrize("self_contained", [False, True])
@pytest.mark.parametrize("architecture", ["transunet-tiny", "llm-transunet-tiny"])
def test_a_checkpoint_comes_back_with_equal_logits(architecture, self_contained, tmp_path):
    checkpoint = load_checkpoint(make_checkpoint(tmp_path / "a", architecture=architecture, classes=LESION))
    expected = logits(checkpoint)
    checkpoint = replace(checkpoint, provenance={"epoch": 7, "metrics": {"val": [None, 0.5]}}, training={"epoch": 7})
    save_checkpoint(checkpoint, tmp_path / "b" / "model.pt", self_contained=self_contained)
    found = load_checkpoint(tmp_path / "b" / "model.pt")
    assert torch.equal(logits(found), expected)
    for name in ("spec", "preprocessing", "classes", "block_sha256", "provenance", "training"):
        assert getattr(found, name) == getattr(checkpoint, name)
    assert found.weights.keys() == checkpoint.weights.keys()


def test_the_logits_come_from_the_weights_and_from_the_block(saved, tmp_path):
    """So that equal logits mean something: a change of either changes them, batch statistics included."""
    checkpoint = load_checkpoint(saved)
    expected = logits(checkpoint)
    for name in ("head.weight", "insert.mapper1.weight", "position_embedding", "bridge.1.running_mean"):
        weights = {**checkpoint.weights, name: checkpoint.weights[name] + 0.1}
        assert not torch.allclose(logits(replace(checkpoint, weights=weights)), expected, atol=1e-4)
    digest = save_block(random_block(TINY_LLAMA, seed=9), tmp_path / "other.safetensors")
    other = replace(checkpoint, block_file=tmp_path / "other.safetensors", block_sha256=digest)
    assert not torch.allclose(logits(other), expected, atol=1e-4)


def test_the_model_is_in_evaluation_mode_and_its_block_frozen(made):
    model = load_checkpoint(made).model()
    assert not any(part.training for part in model.modules())
    frozen = {name.split(".")[1] for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"block", "final_norm"}


def test_frozen_weights_are_in_the_block_file_and_not_in_the_checkpoint(made):
    content = torch.load(made, weights_only=True)
    checkpoint = load_checkpoint(made)
    everything = checkpoint.model().state_dict()
    kept = content["weights"]
    assert everything.keys() - kept.keys() == {
        "insert.final_norm.weight",
        *(f"insert.block.{name}" for name in random_block(TINY_LLAMA, seed=0).tensors),
    }
    assert "block_bytes" not in content
    saved_bytes = sum(tensor.numel() * tensor.element_size() for tensor in kept.values())
    # besides the tensors: a pickled header, and for each tensor a zip entry and padding to 64 bytes
    assert saved_bytes < made.stat().st_size < saved_bytes + 64_000 + 1000 * len(kept)


def test_trained_weights_are_copies(made):
    model = load_checkpoint(made).model()
    weights = trained_weights(model)
    before = weights["head.weight"].clone()
    with torch.no_grad():
        model.head.weight.add_(1)
    assert torch.equal(weights["head.weight"], before)
    assert not any(tensor.requires_grad for tensor in weights.values())


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("where", ["alone", "in a zip archive", "in the weights", "in the provenance", "beside"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(where, saved, tmp_path):
    trap = Touch(tmp_path / "touched")
    if where == "alone":
        saved.write_bytes(pickle.dumps(trap))
    elif where == "in a zip archive":
        torch.save(trap, saved)
    elif where == "in the weights":
        change(saved, lambda content: content["weights"].update(trap=trap))
    elif where == "in the provenance":
        change(saved, lambda content: content["medseg_trt"]["provenance"].update(trap=trap))
    else:
        change(saved, lambda content: content.update(trap=trap))
    with pytest.raises(ArtefactError, match=r"model\.pt holds other things than tensors and plain data.*not opened"):
        load_checkpoint(saved)
    assert not (tmp_path / "touched").exists()
    with suppress(RuntimeError):  # "alone" is no archive of torch's, which is found out after the code has run
        torch.load(saved, weights_only=False)
    assert (tmp_path / "touched").exists()  # it would have


@pytest.mark.parametrize("content", [b"", b"PK", b"a picture of a cat\n" * 100, bytes(1000), pickle.dumps([1, 2])])
def test_a_file_of_something_else_is_refused(content, saved):
    saved.write_bytes(content)
    with pytest.raises(ArtefactError, match=r"model\.pt"):
        load_checkpoint(saved)


@pytest.mark.parametrize(
    "content", [torch.zeros(3), [1, 2], {}, {"weights": {}}, {"medseg_trt": [], "weights": {}}, "x"]
)
def test_data_that_describe_no_model_are_refused(content, saved):
    torch.save(content, saved)
    with pytest.raises(ArtefactError, match=r"model\.pt is damaged or no checkpoint of medseg-trt"):
        load_checkpoint(saved)


def test_a_checkpoint_that_does_not_exist_says_how_to_make_one(tmp_path):
    with pytest.raises(ArtefactError, match=r"absent\.pt does not exist. Train a model first: medseg-trt train"):
        load_checkpoint(tmp_path / "absent.pt")


def test_a_file_cut_short_anywhere_is_refused(saved):
    whole = saved.read_bytes()
    for size in np.linspace(1, len(whole) - 1, 23, dtype=int):
        saved.write_bytes(whole[:size])
        with pytest.raises(ArtefactError, match=r"model\.pt"):
            load_checkpoint(saved)


def test_damaged_bytes_are_refused_or_give_a_checkpoint(saved):
    """PyTorch raises ten kinds of errors for them; the first bytes hold the pickle, the last ones list the parts."""
    whole = saved.read_bytes()
    pickled = whole.index(b"medseg_trt")
    refused = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        content = bytearray(whole)
        for place in (*(pickled + rng.integers(-50, 6000, 4)), -rng.integers(1, 5000)):
            content[place] = rng.integers(256)
        saved.write_bytes(content)
        try:
            load_checkpoint(saved)
        except ArtefactError:
            refused += 1
    assert refused > 100


def test_what_pytorch_asserts_of_a_damaged_file_is_refused_too(saved, monkeypatch):
    def load(*arguments: Any, **options: Any) -> None:
        raise AssertionError("saved_id must be a tuple")  # as it did for one file in a thousand of those above

    monkeypatch.setattr(module.torch, "load", load)
    with pytest.raises(ArtefactError, match=r"model\.pt is damaged or no checkpoint of medseg-trt: saved_id"):
        load_checkpoint(saved)


def header(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["medseg_trt"].update(changes)


def part(name: str, **changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["medseg_trt"][name].update(changes)


ALTERATIONS: Mapping[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another schema": (header(schema=2), "another version of medseg-trt; this one reads schema 1"),
    "no schema": (lambda content: content["medseg_trt"].pop("schema"), "another version"),
    "no weights": (lambda content: content.pop("weights"), "weights cannot be what medseg-trt wrote"),
    "a weight that is no tensor": (lambda content: content["weights"].update({"head.bias": [0.0]}), "weights cannot"),
    "training that is no state": (lambda content: content.update(training=[1]), "training cannot be"),
    "provenance that is none": (header(provenance="x"), "provenance cannot be"),
    "an unknown part": (header(code="print()"), "its header cannot be"),
    "a part missing": (lambda content: content["medseg_trt"].pop("classes"), "its header cannot be"),
    "a digest that is none": (header(block_sha256="0" * 63), "block_sha256 cannot be"),
    "a digest that leads away": (header(block_sha256="../" * 20 + "etc/passwd"), "block_sha256 cannot be"),
    "a digest that is a number": (header(block_sha256=7), "block_sha256 cannot be"),
    "an embedded block of numbers": (lambda content: content.update(block_bytes=torch.zeros(3)), "block_bytes cannot"),
    "an embedded block of other bytes": (
        lambda content: content.update(block_bytes=torch.zeros(3, dtype=torch.uint8)),
        "the embedded block is damaged",
    ),
    "an unknown field": (part("spec", attention="flash"), "ModelSpec attention"),
    "an unknown field of the block": (part("spec", block={"experts": 8}), "ModelSpec block.experts"),
    "a field missing": (lambda content: content["medseg_trt"]["spec"].pop("image_size"), "ModelSpec image_size"),
    "a field of another kind": (part("spec", num_layers="many"), "ModelSpec num_layers"),
    "an impossible size": (part("spec", image_size=(33, 32)), "the image height is 33 pixels"),
    "no heads": (part("spec", num_heads=0), "every size of a network must be at least 1"),
    "no key/value heads": (part("spec", block={"num_kv_heads": 0}), "every size of a block must be at least 1"),
    "a spec that is none": (header(spec=None), "ModelSpec"),
    "an unknown way to resize": (part("preprocessing", resize="cubic"), "Preprocessing resize"),
    "an empty window": (part("preprocessing", window=(1.0, 1.0)), "the window"),
    "one class": (part("classes", names=("background",)), "1 class names"),
    "a class too many": (
        part("classes", names=("background", "a", "b", "c"), colors=()),
        "4 class names need 4 logits, but num_classes is 3",
    ),
    "two classes for three logits": (part("classes", names=("no", "yes"), colors=()), "2 class names need 1 logits"),
    "images of another size": (
        part("preprocessing", image_size=(48, 32)),
        "images are prepared at (48, 32), but the network takes (32, 32)",
    ),
    "weights that are not there": (
        lambda content: content["weights"].update({"head.bias": torch.zeros(1).expand(3)}),
        "weights cannot be what medseg-trt wrote",
    ),
    "an embedded block that is not there": (
        lambda content: content.update(block_bytes=torch.zeros(1, dtype=torch.uint8).expand(1 << 50)),
        "block_bytes cannot",
    ),
}  # fmt: skip


@pytest.mark.parametrize("alteration", ALTERATIONS)
def test_an_altered_checkpoint_is_refused(alteration, saved):
    how, problem = ALTERATIONS[alteration]
    change(saved, how)
    with pytest.raises(ArtefactError, match=re.escape(problem)):
        load_checkpoint(saved)


MISFITS: Mapping[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "missing": (lambda content: content["weights"].pop("head.bias"), "1 missing ['head.bias'], 0 unknown"),
    "unknown": (lambda content: content["weights"].update(extra=torch.zeros(1)), "0 missing [], 1 unknown ['extra']"),
    "another shape": (
        lambda content: content["weights"].update({"head.bias": torch.zeros(7)}),
        "head.bias is (7,) float32, but it asks for (3,) float32",
    ),
    "another type": (
        lambda content: content["weights"].update({"head.bias": torch.zeros(3, dtype=torch.float16)}),
        "head.bias is (3,) float16, but it asks for (3,) float32",
    ),
    "another depth": (part("spec", num_layers=3), "missing ['layers.2."),
    "a second block": (
        lambda content: content["weights"].update({"insert.block.mlp.up_proj.weight": torch.zeros(96, 64)}),
        "0 missing [], 1 unknown ['insert.block.mlp.up_proj.weight']",
    ),
    "no block": (header(block_sha256=None), "missing ['insert.block."),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_weights_that_do_not_fit_are_named(misfit, saved):
    how, problem = MISFITS[misfit]
    change(saved, how)
    with pytest.raises(ArtefactError, match=f"do not fit llm-transunet-tiny: .*{re.escape(problem)}"):
        load_checkpoint(saved).model()


HUGE: Mapping[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "width": (part("spec", hidden_size=4 << 20), "it asks for"),
    "width past what a tensor can have": (part("spec", hidden_size=4 << 60), "do not fit"),
    "width past what PyTorch can count": (part("spec", hidden_size=4 << 200), "do not fit"),
    "inner width": (part("spec", mlp_size=1 << 40), "it asks for (1099511627776, 48) float32"),
    "depth": (part("spec", num_layers=1 << 40), "it asks for 1099511627776 layers of one kind"),
    "depth of the ResNet": (part("spec", resnet_units=(1, 1 << 40, 1)), "it asks for 1099511627776 layers"),
    "layers of the insert": (part("spec", insert={"num_layers": 1 << 40}), "it asks for 1099511627776 layers"),
    "classes": (
        lambda content: (
            content["medseg_trt"]["spec"].update(num_classes=256),
            content["medseg_trt"]["classes"].update(names=[f"{number}" for number in range(256)], colors=()),
        ),
        "head.weight is (3, 16, 3, 3) float32, but it asks for (256, 16, 3, 3) float32",
    ),
    "images": (
        lambda content: (
            content["medseg_trt"]["spec"].update(image_size=(16 << 20, 16 << 20)),
            content["medseg_trt"]["preprocessing"].update(image_size=(16 << 20, 16 << 20)),
        ),
        "position_embedding is (1, 4, 48) float32, but it asks for (1, 1099511627776, 48) float32",
    ),
    "channels that do not divide": (part("spec", resnet_width=33), "do not fit"),
    "width of the block": (
        lambda content: content["medseg_trt"]["spec"]["block"].update(hidden_size=1 << 40),
        "hidden_size is 1099511627776; it must be a whole number from 1 to 1048576",
    ),
    "inner width of the block": (
        lambda content: content["medseg_trt"]["spec"]["block"].update(intermediate_size=1 << 20),
        "the frozen block's geometry is",
    ),
    "random layers that are in no file": (
        lambda content: (
            content["medseg_trt"]["spec"]["block"].update(intermediate_size=1 << 20),
            content["medseg_trt"]["spec"].update(insert={"weights": "random", "num_layers": 1000}),
        ),
        "frozen parameters; no model has as many",
    ),
}  # fmt: skip


@pytest.mark.parametrize("size", HUGE)
def test_a_size_that_is_not_that_of_the_weights_is_refused_before_anything_is_built(size, saved, monkeypatch):
    """On the device "meta" a tensor has a shape and no memory."""
    devices: list[str] = []

    def build(*arguments: Any) -> object:
        devices.append(torch.get_default_device().type)
        assert devices[-1] == "meta", "memory of the size that was asked for"
        return build_model(*arguments)

    monkeypatch.setattr(module, "build_model", build)
    how, problem = HUGE[size]
    change(saved, how)
    with pytest.raises(ArtefactError, match=re.escape(problem)):
        load_checkpoint(saved).model()
    assert set(devices) <= {"meta"}


def test_the_sizes_above_are_refused_and_the_sound_ones_are_built(saved, monkeypatch):
    devices: list[str] = []

    def build(*arguments: Any) -> object:
        devices.append(torch.get_default_device().type)
        return build_model(*arguments)

    monkeypatch.setattr(module, "build_model", build)
    checkpoint = load_checkpoint(saved)
    assert devices == ["meta"]
    checkpoint.model()
    assert devices[-1] == "cpu"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["head.bias", "layers.1.fc1.weight", "bridge.1.running_var"])
def test_weights_that_are_not_finite_are_named(name, value, saved):
    change(saved, lambda content: content["weights"][name].view(-1)[1:2].fill_(value))
    with pytest.raises(ArtefactError, match=rf"model\.pt: {re.escape(name)} holds values that are not finite"):
        load_checkpoint(saved)


def test_layers_that_are_trained_are_in_the_checkpoint_and_their_norm_is_not(saved, tmp_path):
    checkpoint = load_checkpoint(saved)
    spec = replace(checkpoint.spec, insert=InsertSpec(trainable=True))
    model = build_model(spec, checkpoint.block())
    with torch.no_grad():
        model.get_parameter("insert.block.mlp.up_proj.weight").add_(0.1)
    weights = trained_weights(model)
    assert {name for name in model.state_dict() if name not in weights} == {"insert.final_norm.weight"}
    save_checkpoint(replace(checkpoint, spec=spec, weights=weights), tmp_path / "trained" / "model.pt")
    found = load_checkpoint(tmp_path / "trained" / "model.pt")
    assert torch.equal(logits(found), logits(replace(checkpoint, spec=spec, weights=weights)))
    assert not torch.equal(logits(found), logits(checkpoint))


def test_the_block_is_found_beside_the_checkpoint_first_and_then_in_the_cache(saved, cache):
    expected = logits(load_checkpoint(saved))
    beside = the_block(saved)
    cache.mkdir(parents=True)
    shutil.copyfile(beside, cache / beside.name)
    assert load_checkpoint(saved).block_file == beside
    beside.unlink()
    found = load_checkpoint(saved)
    assert found.block_file == cache / beside.name
    assert torch.equal(logits(found), expected)


@pytest.mark.parametrize("place", ["beside", "cache"])
def test_a_block_with_another_digest_is_refused_wherever_it_lies(place, saved, cache):
    name = the_block(saved).name
    the_block(saved).unlink()
    wrong = saved.parent / name if place == "beside" else cache / name
    save_block(random_block(TINY_LLAMA, seed=5), wrong)  # sound in itself, and of the same geometry
    with pytest.raises(ArtefactError, match=f"{name} is another block: its SHA-256 is"):
        load_checkpoint(saved).model()


def test_a_block_that_is_nowhere_is_named_with_what_to_do(saved):
    name = the_block(saved).name
    the_block(saved).unlink()
    with pytest.raises(ArtefactError, match=rf"is not in .*Copy {name} there, or .*medseg-trt block extract SOURCE -o"):
        load_checkpoint(saved)


def test_a_self_contained_checkpoint_needs_nothing_but_itself(saved, cache, tmp_path, monkeypatch):
    expected = logits(load_checkpoint(saved))
    save_checkpoint(load_checkpoint(saved), tmp_path / "whole" / "model.pt", self_contained=True)
    assert [path.name for path in (tmp_path / "whole").iterdir()] == ["model.pt"]
    shutil.rmtree(saved.parent)
    shutil.rmtree(cache, ignore_errors=True)
    shutil.copytree(tmp_path / "whole", tmp_path / "another machine")
    shutil.rmtree(tmp_path / "whole")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another cache"))
    found = load_checkpoint(tmp_path / "another machine" / "model.pt")
    assert torch.equal(logits(found), expected)
    assert found.block_file is not None
    assert hashlib.sha256(found.block_file.read_bytes()).hexdigest() == found.block_sha256
    found.block_file.write_bytes(b"damaged in the cache")
    assert torch.equal(logits(load_checkpoint(tmp_path / "another machine" / "model.pt")), expected)


def test_a_cache_that_cannot_be_written_to_is_named_with_what_to_do(saved, tmp_path, monkeypatch):
    save_checkpoint(load_checkpoint(saved), tmp_path / "whole" / "model.pt", self_contained=True)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    advice = "set XDG_CACHE_HOME to a folder with room that you may write to"
    with pytest.raises(InputError, match=rf"cannot be written to {tmp_path}/file/.*: Not a directory; {advice}"):
        load_checkpoint(tmp_path / "whole" / "model.pt")

    def full_disk(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(InputError, match=rf"cannot be written to .*: No space left on device; {advice}"):
        load_checkpoint(tmp_path / "whole" / "model.pt")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_the_block_beside_shares_its_bytes_on_one_disk_and_is_copied_to_another(made, tmp_path, monkeypatch):
    checkpoint = load_checkpoint(made)
    assert checkpoint.block_file is not None
    checkpoint.block_file.chmod(0o444)
    save_checkpoint(checkpoint, tmp_path / "same" / "model.pt")
    assert the_block(tmp_path / "same" / "model.pt").samefile(checkpoint.block_file)
    assert checkpoint.block_file.stat().st_mode & 0o777 == 0o444  # somebody's own file is left as it is

    def another_disk(*arguments: Path) -> None:
        raise OSError("Invalid cross-device link")

    monkeypatch.setattr(os, "link", another_disk)
    save_checkpoint(checkpoint, tmp_path / "other" / "model.pt")
    copied = the_block(tmp_path / "other" / "model.pt")
    assert not copied.samefile(checkpoint.block_file)
    assert copied.read_bytes() == checkpoint.block_file.read_bytes()


def test_a_block_that_is_a_relative_link_is_put_beside_as_a_file(saved, tmp_path):
    """Caches of downloaded models are full of such links, which mean nothing in another folder."""
    checkpoint = load_checkpoint(saved)
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "block.safetensors"
    link.symlink_to(Path("..", "saved", the_block(saved).name))
    save_checkpoint(replace(checkpoint, block_file=link), tmp_path / "deep" / "er" / "model.pt")
    assert not the_block(tmp_path / "deep" / "er" / "model.pt").is_symlink()
    assert torch.equal(logits(load_checkpoint(tmp_path / "deep" / "er" / "model.pt")), logits(checkpoint))


def test_a_damaged_block_beside_is_replaced_by_the_sound_one(made, saved):
    the_block(saved).write_bytes(b"half a block")
    save_checkpoint(load_checkpoint(made), saved)
    assert torch.equal(logits(load_checkpoint(saved)), logits(load_checkpoint(made)))


@pytest.mark.parametrize("interruption", [OSError("no space left"), KeyboardInterrupt()])
def test_a_save_that_fails_leaves_the_old_checkpoint_and_nothing_else(interruption, saved, monkeypatch):
    checkpoint = load_checkpoint(saved)
    before = {path.name: path.read_bytes() for path in saved.parent.iterdir()}

    def write_half(content: Any, path: Path) -> None:
        path.write_bytes(before["model.pt"][:1000])
        raise interruption

    monkeypatch.setattr(module.torch, "save", write_half)
    weights = {name: torch.zeros_like(tensor) for name, tensor in checkpoint.weights.items()}
    with pytest.raises(type(interruption)):
        save_checkpoint(replace(checkpoint, weights=weights), saved)
    assert {path.name: path.read_bytes() for path in saved.parent.iterdir()} == before


def test_a_save_replaces_the_old_checkpoint(saved):
    checkpoint = load_checkpoint(saved)
    weights = {**checkpoint.weights, "head.bias": torch.full_like(checkpoint.weights["head.bias"], 3.0)}
    save_checkpoint(replace(checkpoint, weights=weights), saved)
    assert (load_checkpoint(saved).weights["head.bias"] == 3.0).all()


def test_an_optimiser_state_comes_back_to_be_resumed(saved):
    model = build_model(load_checkpoint(saved).spec)
    optimizer = torch.optim.AdamW([model.head.weight], lr=0.1)
    model.head.weight.sum().backward()
    optimizer.step()
    save_checkpoint(replace(load_checkpoint(saved), training={"optimizer": optimizer.state_dict(), "epoch": 2}), saved)
    training = load_checkpoint(saved).training
    assert training is not None
    assert training["epoch"] == 2
    found, expected = (state["state"][0]["exp_avg"] for state in (training["optimizer"], optimizer.state_dict()))
    assert torch.equal(found, expected)
    assert expected.abs().sum() > 0
