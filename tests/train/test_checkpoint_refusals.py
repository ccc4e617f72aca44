"""A checkpoint that is damaged, altered or carries code is refused, and runs nothing."""

import os
import pickle
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medseg_trt.errors import ArtefactError
from medseg_trt.train import checkpoint as module
from medseg_trt.train.checkpoint import load_checkpoint
from medseg_trt.train.models.model import build_model

pytestmark = pytest.mark.usefixtures("cache")


def change(path: Path, how: Callable[[dict[str, Any]], object]) -> None:
    """Write a checkpoint again after ``how`` has changed what is in it."""
    content = torch.load(path, weights_only=True)
    how(content)
    torch.save(content, path)


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
def test_load_checkpoint_refuses_files_of_other_content(content, saved):
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
        for offset in (*(pickled + rng.integers(-50, 6000, 4)), -rng.integers(1, 5000)):
            content[offset] = rng.integers(256)
        saved.write_bytes(content)
        try:
            load_checkpoint(saved)
        except ArtefactError:
            refused += 1
    assert refused > 100


def test_assertion_error_of_torch_load_is_an_artefact_error(saved, monkeypatch):
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
    "training without an optimiser": (lambda content: content.update(training={"epoch": 1}), "damaged: 'optimizer'"),
    "training of an epoch that is no number": (
        lambda content: content.update(training={"optimizer": {}, "epoch": "one"}),
        "the training state is damaged: 'epoch'",
    ),
    "training with a field more": (
        lambda content: content.update(training={"optimizer": {}, "epoch": 1, "code": ""}),
        "the training state is damaged: 'code'",
    ),
    "training in an epoch without losses": (
        lambda content: content.update(training={"optimizer": {}, "epoch": 1, "progress": {"epoch": 2}}),
        "the training state is damaged: 'losses', 'random_state'",
    ),
    "provenance that is none": (header(provenance="x"), "provenance cannot be"),
    "provenance of an epoch that is no number": (header(provenance={"epoch": "one"}), "Provenance epoch"),
    "provenance of data that are none": (header(provenance={"data": ["a"]}), "Provenance data"),
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
}


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
            content["medseg_trt"]["spec"].update(image_size=(8192, 8192)),
            content["medseg_trt"]["preprocessing"].update(image_size=(8192, 8192)),
        ),
        "position_embedding is (1, 4, 48) float32, but it asks for (1, 262144, 48) float32",
    ),
    "images of too many pixels": (
        lambda content: (
            content["medseg_trt"]["spec"].update(image_size=(16 << 20, 16 << 20)),
            content["medseg_trt"]["preprocessing"].update(image_size=(16 << 20, 16 << 20)),
        ),
        "16777216 x 16777216 pixels are too many for a network",
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
}


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


def test_load_checkpoint_builds_on_meta_and_model_on_cpu(saved, monkeypatch):
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
