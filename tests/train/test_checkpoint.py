"""A checkpoint comes back with equal logits and its own block, and a save is whole or leaves no trace."""

import hashlib
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import LESION, SIZE, make_checkpoint

from medseg_trt.errors import ArtefactError, InputError
from medseg_trt.spec import InsertSpec
from medseg_trt.train import checkpoint as module
from medseg_trt.train.block.blocks import random_block, save_block
from medseg_trt.train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, trained_weights
from medseg_trt.train.models.model import TINY_LLAMA, build_model
from medseg_trt.train.models.transunet import TransUNet
from medseg_trt.train.provenance import DataRecord, FileRecord, Provenance
from medseg_trt.train.training_state import OptimizerState, TrainingState

pytestmark = pytest.mark.usefixtures("cache")


def the_block(path: Path) -> Path:
    """Return the block's file beside a checkpoint."""
    return next(path.parent.glob("block-*.safetensors"))


def logits(checkpoint: Checkpoint) -> torch.Tensor:
    with torch.inference_mode():
        return checkpoint.model()(torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("self_contained", [False, True])
@pytest.mark.parametrize("architecture", ["transunet-tiny", "llm-transunet-tiny"])
def test_a_checkpoint_comes_back_with_equal_logits(architecture, self_contained, tmp_path):
    checkpoint = load_checkpoint(make_checkpoint(tmp_path / "a", architecture=architecture, classes=LESION))
    expected = logits(checkpoint)
    provenance = Provenance(
        recipe={"name": "generated"},
        data=DataRecord(name="generated", sha256="0" * 64, manifest={"splits": {"train": ["a"]}}),
        weights=FileRecord(file="encoder.npz", sha256="1" * 64, unused=("head",)),
        epoch=7,
        metrics={"val": [None, 0.5]},
        other={"added later": [1, "b"]},
    )
    training = TrainingState(optimizer_state=OptimizerState(optimizer={"state": {}}, scaler={"scale": 2.0}), epoch=7)
    checkpoint = replace(checkpoint, provenance=provenance, training=training)
    save_checkpoint(checkpoint, tmp_path / "b" / "model.pt", self_contained=self_contained)
    loaded = load_checkpoint(tmp_path / "b" / "model.pt")
    assert torch.equal(logits(loaded), expected)
    for name in ("spec", "preprocessing", "classes", "block_sha256", "provenance", "training"):
        assert getattr(loaded, name) == getattr(checkpoint, name)
    assert loaded.weights.keys() == checkpoint.weights.keys()
    assert load_checkpoint(str(tmp_path / "b" / "model.pt")).provenance == provenance


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


def test_the_model_is_in_evaluation_mode_and_its_block_frozen(checkpoint_path):
    model = load_checkpoint(checkpoint_path).model()
    assert not any(part.training for part in model.modules())
    frozen = {name.split(".")[1] for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"block", "final_norm"}


def test_frozen_weights_are_in_the_block_file_and_not_in_the_checkpoint(checkpoint_path):
    content = torch.load(checkpoint_path, weights_only=True)
    checkpoint = load_checkpoint(checkpoint_path)
    everything = checkpoint.model().state_dict()
    weights = content["weights"]
    assert everything.keys() - weights.keys() == {
        "insert.final_norm.weight",
        *(f"insert.block.{name}" for name in random_block(TINY_LLAMA, seed=0).tensors),
    }
    assert "block_bytes" not in content
    saved_bytes = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    # besides the tensors: a pickled header, and for each tensor a zip entry and padding to 64 bytes
    assert saved_bytes < checkpoint_path.stat().st_size < saved_bytes + 64_000 + 1000 * len(weights)


def test_trained_weights_are_copies(checkpoint_path):
    model = load_checkpoint(checkpoint_path).model()
    assert isinstance(model, TransUNet)
    weights = trained_weights(model)
    before = weights["head.weight"].clone()
    with torch.no_grad():
        model.head.weight.add_(1)
    assert torch.equal(weights["head.weight"], before)
    assert not any(tensor.requires_grad for tensor in weights.values())


def test_layers_that_are_trained_are_in_the_checkpoint_and_their_norm_is_not(saved, tmp_path):
    checkpoint = load_checkpoint(saved)
    spec = replace(checkpoint.spec, insert=InsertSpec(trainable=True))
    model = build_model(spec, checkpoint.block())
    with torch.no_grad():
        model.get_parameter("insert.block.mlp.up_proj.weight").add_(0.1)
    weights = trained_weights(model)
    assert {name for name in model.state_dict() if name not in weights} == {"insert.final_norm.weight"}
    save_checkpoint(replace(checkpoint, spec=spec, weights=weights), tmp_path / "trained" / "model.pt")
    loaded = load_checkpoint(tmp_path / "trained" / "model.pt")
    assert torch.equal(logits(loaded), logits(replace(checkpoint, spec=spec, weights=weights)))
    assert not torch.equal(logits(loaded), logits(checkpoint))


def test_the_block_is_found_beside_the_checkpoint_first_and_then_in_the_cache(saved, cache):
    expected = logits(load_checkpoint(saved))
    beside = the_block(saved)
    cache.mkdir(parents=True)
    shutil.copyfile(beside, cache / beside.name)
    assert load_checkpoint(saved).block_file == beside
    beside.unlink()
    loaded = load_checkpoint(saved)
    assert loaded.block_file == cache / beside.name
    assert torch.equal(logits(loaded), expected)


@pytest.mark.parametrize("location", ["beside", "cache"])
def test_a_block_with_another_digest_is_refused_wherever_it_lies(location, saved, cache):
    name = the_block(saved).name
    the_block(saved).unlink()
    wrong = saved.parent / name if location == "beside" else cache / name
    save_block(random_block(TINY_LLAMA, seed=5), wrong)  # sound in itself, and of the same geometry
    with pytest.raises(ArtefactError, match=f"{name} is another block: its SHA-256 is"):
        load_checkpoint(saved).model()


def test_missing_block_error_gives_the_extract_command(saved):
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
    loaded = load_checkpoint(tmp_path / "another machine" / "model.pt")
    assert torch.equal(logits(loaded), expected)
    assert loaded.block_file is not None
    assert hashlib.sha256(loaded.block_file.read_bytes()).hexdigest() == loaded.block_sha256
    loaded.block_file.write_bytes(b"damaged in the cache")
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


def test_the_block_beside_shares_its_bytes_on_one_disk_and_is_copied_to_another(checkpoint_path, tmp_path, monkeypatch):
    checkpoint = load_checkpoint(checkpoint_path)
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


def test_a_damaged_block_beside_is_replaced_by_the_sound_one(checkpoint_path, saved):
    the_block(saved).write_bytes(b"half a block")
    save_checkpoint(load_checkpoint(checkpoint_path), saved)
    assert torch.equal(logits(load_checkpoint(saved)), logits(load_checkpoint(checkpoint_path)))


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
    assert isinstance(model, TransUNet)
    optimizer = torch.optim.AdamW([model.head.weight], lr=0.1)
    model.head.weight.sum().backward()
    optimizer.step()
    state = TrainingState(optimizer_state=OptimizerState(optimizer=optimizer.state_dict()), epoch=2)
    save_checkpoint(replace(load_checkpoint(saved), training=state), saved)
    training = load_checkpoint(saved).training
    assert training is not None
    assert training.epoch == 2
    states = training.optimizer_state.optimizer, optimizer.state_dict()
    actual, expected = (state["state"][0]["exp_avg"] for state in states)
    assert torch.equal(actual, expected)
    assert expected.abs().sum() > 0
