"""Frozen is frozen in either number type; bfloat16 is a matter of training alone; a kill costs a few steps."""

import json
import shutil
import signal

import numpy as np
import pytest
import torch
from tiny import TINY_LLAMA, tiny_changes, tiny_recipe, tiny_spec, train_and_kill

from medseg_trt.errors import UsageError
from medseg_trt.train import loop
from medseg_trt.train.block.blocks import load_block, random_block
from medseg_trt.train.checkpoint import FROZEN_PREFIXES, load_checkpoint
from medseg_trt.train.datasets.prepared import PreparedSlices
from medseg_trt.train.loop import make_optimizer, train, train_epoch
from medseg_trt.train.models.frozen import keep_frozen_in
from medseg_trt.train.models.model import LanguageInsert, build_model
from medseg_trt.train.models.transunet import TransUNet
from medseg_trt.train.training_process import TrainingProcess
from medseg_trt.train.training_state import TrainingState

BLOCK = random_block(TINY_LLAMA, seed=0, std=0.3)


def slices(count=4):
    random = np.random.default_rng(0)
    images = random.normal(size=(count, 3, 32, 32)).astype(np.float32)
    return PreparedSlices(images=images, labels=(images[:, 0] > 1).astype(np.uint8), slices_of_class=())


def fresh_model(dtype) -> TransUNet:
    torch.manual_seed(0)
    model = build_model(tiny_spec(), BLOCK)
    assert isinstance(model, TransUNet)
    keep_frozen_in(model, dtype)
    return model


def insert_of(model) -> LanguageInsert:
    assert isinstance(model.insert, LanguageInsert)
    return model.insert


def training_of(run) -> TrainingState:
    training = load_checkpoint(run / "last.pt").training
    assert training is not None
    return training


def frozen_of(model):
    return {name: value for name, value in model.state_dict().items() if name.startswith(FROZEN_PREFIXES)}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_frozen_block_has_its_bits_no_gradient_and_no_state_after_training(dtype):
    model = fresh_model(dtype)
    before = {name: value.clone() for name, value in frozen_of(model).items()}
    recipe = tiny_recipe("train.optimizer=adamw", "train.weight_decay=0.1", f"train.frozen_dtype={dtype}")
    optimizer = make_optimizer(model, recipe.train)
    train_epoch(model, optimizer, slices(), recipe, 1)
    assert before
    assert all(torch.equal(value, before[name]) for name, value in frozen_of(model).items())
    frozen = [value for name, value in model.named_parameters() if name.startswith(FROZEN_PREFIXES)]
    trained = [value for name, value in model.named_parameters() if not name.startswith(FROZEN_PREFIXES)]
    assert all(value.grad is None for value in frozen)
    assert not any(value in optimizer.state for value in frozen)
    assert all(value.grad is not None and value in optimizer.state for value in trained)
    assert {value.dtype for value in trained} == {torch.float32}


def test_a_block_in_bfloat16_takes_half_the_memory_and_computes_in_it():
    seen: set[tuple[str, torch.dtype, torch.dtype]] = set()
    for dtype in ("fp32", "bf16"):
        model = fresh_model(dtype)
        stored = sum(value.nbytes for name, value in frozen_of(model).items() if "block" in name)
        assert stored == BLOCK.num_parameters * {"fp32": 4, "bf16": 2}[dtype]

        def look(module, inputs, output, dtype=dtype):
            seen.add((dtype, inputs[0].dtype, output.dtype))

        insert_of(model).layers[0].mlp.down_proj.register_forward_hook(look)
        assert model.eval()(torch.randn(1, 3, 32, 32)).dtype == torch.float32
    assert seen == {("fp32", torch.float32, torch.float32), ("bf16", torch.bfloat16, torch.bfloat16)}


def test_a_block_in_bfloat16_is_the_block_but_for_its_roundings():
    tokens = torch.randn(2, 4, 48, generator=torch.Generator().manual_seed(0))
    exact, rounded, coarse = (insert_of(fresh_model(dtype)).eval() for dtype in ("fp32", "bf16", "fp32"))
    with torch.no_grad():
        for weight in coarse.block.parameters():
            weight.copy_(weight.to(torch.float8_e4m3fn).float())
    expected = exact(tokens)
    errors = [((insert(tokens) - expected).norm() / expected.norm()).item() for insert in (rounded, coarse)]
    # Eight bits: every rounding is off by 2**-9 of its value at most, some ten of them follow each other, and this
    # block's large weights sharpen its attention: 1.3 % of the norm was measured. Four bits are caught, with 11 %.
    assert 1e-3 < errors[0] < 0.03 < errors[1]


def test_a_checkpoint_of_a_run_in_bfloat16_uses_the_blocks_file_in_float32(source, tmp_path, no_curve):
    data, block = source
    changes = ("train.epochs=1", "train.frozen_dtype=bf16")
    train(tiny_recipe(*changes), data, tmp_path / "run", block=block)
    model = load_checkpoint(tmp_path / "run" / "best.pt").model()
    (stored,) = load_block(block)
    for name, value in stored.tensors.items():
        assert torch.equal(model.state_dict()[f"insert.block.{name}"], value.float())
    assert {value.dtype for value in model.parameters()} == {torch.float32}


def test_bfloat16_is_refused_for_a_block_that_is_trained():
    with pytest.raises(UsageError, match="frozen_dtype=bf16 is for a block that is frozen"):
        tiny_recipe("train.frozen_dtype=bf16", "insert.trainable=true")
    with pytest.raises(UsageError, match=r"frozen_dtype cannot be 'int4'; choose one of: fp32, bf16"):
        tiny_recipe("train.frozen_dtype=int4")


# Number types of a training step.


@pytest.mark.parametrize("autocast", ["bf16", "fp16"])
def test_autocast_computes_steps_in_its_type_and_keeps_weights_and_loss_in_float32(autocast):
    kinds, losses = set(), {}
    for name in ("no", autocast):
        recipe, model = tiny_recipe(f"train.autocast={name}", "train.optimizer=sgd"), fresh_model("fp32")
        hook = model.bridge[0].register_forward_hook(
            lambda *arguments, name=name: kinds.add((name, arguments[2].dtype))
        )
        losses[name] = train_epoch(model, make_optimizer(model, recipe.train), slices(), recipe, 1)
        hook.remove()
        assert {value.dtype for value in model.state_dict().values()} == {torch.float32, torch.int64}
    assert kinds == {("no", torch.float32), (autocast, {"bf16": torch.bfloat16, "fp16": torch.float16}[autocast])}
    assert losses[autocast] != losses["no"]
    # Eight bits leave 0.4 % of a value, and a mean over 4096 pixels less of it: 3e-5 was measured.
    assert losses[autocast] == pytest.approx(losses["no"], rel=2e-3)


def test_gradients_that_overflow_float16_lower_the_scale_and_change_no_weight():
    model, recipe = fresh_model("fp32"), tiny_recipe("train.autocast=fp16", "train.batch_size=4")
    process = TrainingProcess("fp16")
    process.scaler.load_state_dict({**process.scaler.state_dict(), "scale": 2.0**40})
    before = model.head.weight.clone()
    train_epoch(model, make_optimizer(model, recipe.train), slices(), recipe, 1, process)
    assert torch.equal(model.head.weight, before)
    assert process.scaler.get_scale() == 2.0**39


# A kill in the middle of an epoch.


def history_of(out):
    lines = (out / "history.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def killed(source, tmp_path_factory):
    """A run that was killed before the fourth of the four steps of its second epoch, and one that was not."""
    folder, (data, block) = tmp_path_factory.mktemp("killed"), source
    arguments = ["--recipe", "folder", "--data", str(data.root), "--block", str(block), "-o", str(folder / "run")]
    arguments += [part for change in changes() for part in ("--set", change)]
    done = train_and_kill(arguments, signal.SIGKILL, at_step=7)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("medseg_trt.train.runs.draw_curve", lambda *_: None)
        train(tiny_recipe(*changes()[4:]), data, folder / "whole", block=block)
    return folder


def changes():
    more = ("train.batch_size=1", "train.epochs=2", "train.save_every_steps=2", "train.accumulate=1")
    return tiny_changes(*more, "train.max_gradient_norm=1.0")


def test_a_run_killed_within_an_epoch_goes_on_at_the_step_that_was_saved(killed, source, no_curve, monkeypatch):
    data, block = source
    forgetful = shutil.copytree(killed / "run", killed / "forgetful")
    last = load_checkpoint(killed / "run" / "last.pt")
    progress = training_of(killed / "run").progress
    assert progress is not None
    assert len(progress.losses) == 2
    assert last.provenance.epoch == 1
    steps, real = [], loop.segmentation_loss
    monkeypatch.setattr(loop, "segmentation_loss", lambda *arguments: steps.append(1) or real(*arguments))
    recipe = tiny_recipe(*changes()[4:])
    train(recipe, data, killed / "run", block=block, resume=True)
    assert len(steps) == 2  # of the four of the second epoch
    for name in ("last.pt", "best.pt"):
        ours, theirs = (load_checkpoint(killed / run / name).weights for run in ("run", "whole"))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert history_of(killed / "run") == history_of(killed / "whole")
    assert training_of(killed / "run").progress is None

    monkeypatch.setattr(TrainingProcess, "set_random_state", lambda process, state: None)
    train(recipe, data, forgetful, block=block, resume=True)
    others = load_checkpoint(forgetful / "last.pt").weights
    assert not all(torch.equal(ours[key], others[key]) for key in ours)  # other masks of dropout are noticed
