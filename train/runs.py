"""A run folder: start one, go on with one after a kill, and save what an epoch has brought.

It holds ``best.pt`` (highest mean Dice on the validation split, or what ``train.best`` says), ``last.pt`` (with the
optimiser's state, after the latest epoch or, with ``train.save_every_steps``, in the middle of one), ``history.jsonl``
(a line an epoch; epoch 0 is the untrained model), ``curve.png``, ``recipe.json``, ``data.json``,
and ``data_folder.json``: where the data lie on this machine, of which the checkpoints hold nothing.
"""

import json
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medseg_trt import __version__
from medseg_trt.errors import UsageError
from medseg_trt.files import atomic_file, sha256, write_json
from medseg_trt.progress import LOG
from medseg_trt.spec import ModelSpec, Preprocessing, from_dict, to_dict
from medseg_trt.train.block.blocks import load_block, provenance_of
from medseg_trt.train.checkpoint import DATA_FOLDER, Checkpoint, load_checkpoint, save_checkpoint, trained_weights
from medseg_trt.train.curve import draw_curve
from medseg_trt.train.datasets.check import require_usable
from medseg_trt.train.datasets.folder import DataFolder, manifest_sha256
from medseg_trt.train.models.model import build_model, model_spec
from medseg_trt.train.models.transunet import TransUNet
from medseg_trt.train.recipes.training_spec import Recipe, TrainSpec
from medseg_trt.train.weights.pretrained import load_encoder

PARTIAL_SLICES = ".partial-slices-"  # how the folder of prepared slices begins, which a run removes at its end
NO_WEIGHTS = (
    "the recipe starts from pretrained weights of the encoder: --weights R50+ViT-B_16.npz, or timm's "
    "vit_base_r50_s16_224.orig_in21k as .safetensors. To start from random ones: --set pretrained=none"
)
Row = Mapping[str, Any]  # of history.jsonl: epoch, loss, seconds, and dice, dice_of_class where it was validated


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far an epoch that is not complete has come."""

    epoch: int
    losses: tuple[float, ...]  # of the steps that are done
    random_state: Mapping[str, Tensor]  # before the next step


@dataclass(frozen=True, kw_only=True, slots=True)
class RunState:
    """Where a training run stands."""

    checkpoint: Checkpoint
    history: tuple[Row, ...] = ()  # known to the process that writes it
    next_epoch: int = 0  # 0 is the look at the untrained model
    progress: Progress | None = None  # in ``next_epoch``


def begin(
    recipe: Recipe, data: DataFolder, out: Path, *, block: Path | None, weights: Path | None, resume: bool
) -> RunState:
    """Start a run, or with ``resume`` go on with the one in ``out``.

    Raises:
        UsageError: ``out`` holds a run already, or one of another recipe, data set, block or pretrained weights; or a
            block or the weights are missing.
    """
    last = out / "last.pt"
    if last.is_file() and not resume:
        raise UsageError(f"{out} holds a run already. Add --resume to go on with it, or choose another folder with -o")
    if not last.is_file():
        _checked_spec(recipe, data, block, weights)  # before gigabytes of data are hashed
    manifest = data.manifest()
    digest = manifest_sha256(manifest)
    provenance = {
        "recipe": _without_paths(json.loads(json.dumps(to_dict(recipe)))),
        "data": {"name": data.name, "sha256": digest, "note": data.note, "manifest": manifest},
        "versions": {"medseg-trt": __version__, "torch": str(torch.__version__), "python": platform.python_version()},
    }
    _remove_leftovers(out)
    if last.is_file():
        state = _resumed(load_checkpoint(last), provenance, block, weights, out)
        _keep_data_folder(data, out)
        return state
    if resume:
        LOG.warning("%s holds no run to go on with; a new one begins", out)
    require_usable(data)
    checkpoint = _fresh(recipe, data, provenance, block, weights)
    write_json(out / "recipe.json", to_dict(recipe))
    write_json(out / "data.json", manifest)
    _keep_data_folder(data, out)
    return RunState(checkpoint=checkpoint)


def join(recipe: Recipe, data: DataFolder, out: Path, *, block: Path | None, weights: Path | None) -> RunState:
    """Return what ``begin`` has returned in another process, which has checked it all; nothing is written."""
    last = out / "last.pt"
    return (
        _state(load_checkpoint(last))
        if last.is_file()
        else RunState(checkpoint=_fresh(recipe, data, {}, block, weights))
    )


def save(
    state: RunState, model: TransUNet, training: Mapping[str, Any], row: Row, out: Path, spec: TrainSpec
) -> RunState:
    """Write what an epoch has brought, so that a kill at any moment loses no more than the epoch it interrupts.

    Args:
        state: of the run before this epoch.
        model: after it.
        training: what is needed besides the weights to go on.
        row: of the history.
        out: the run folder.
        spec: which epochs are kept, and which is the best.
    """
    history = (*state.history, row)
    provenance = {**state.checkpoint.provenance, "epoch": row["epoch"], "metrics": {"val": row.get("dice_of_class")}}
    checkpoint = replace(state.checkpoint, weights=trained_weights(model), provenance=provenance, training=None)
    if _is_best(row, state.history, spec):
        save_checkpoint(checkpoint, out / "best.pt")
    if row["epoch"] in spec.keep_epochs:
        save_checkpoint(checkpoint, out / f"epoch-{row['epoch']}.pt")
    with atomic_file(out / "history.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in history), encoding="utf-8")
    save_checkpoint(replace(checkpoint, training={**training, "epoch": row["epoch"]}), out / "last.pt")
    draw_curve(history, out / "curve.png")
    return RunState(checkpoint=state.checkpoint, history=history, next_epoch=row["epoch"] + 1)


def save_progress(
    state: RunState, model: TransUNet, training: Mapping[str, Any], progress: Progress, out: Path
) -> None:
    """Write ``last.pt`` in the middle of an epoch, so that a kill loses no more than the steps after it."""
    last = {**training, "epoch": progress.epoch - 1, "progress": to_dict(progress)}
    provenance = {**state.checkpoint.provenance, "epoch": progress.epoch - 1, "step": len(progress.losses)}
    checkpoint = replace(state.checkpoint, weights=trained_weights(model), provenance=provenance, training=last)
    save_checkpoint(checkpoint, out / "last.pt")


def _is_best(row: Row, history: Sequence[Row], spec: TrainSpec) -> bool:
    """Say whether no epoch was better; the latest is, where there is nothing to validate on or ``best`` says so."""
    if spec.best == "last":
        return True
    if row.get(spec.best) is None:
        return not any(old.get(spec.best) is not None for old in history)
    rivals = [old for old in history if old["epoch"] > 0] if spec.first_of_equals else history
    before = [old[spec.best] for old in rivals if old.get(spec.best) is not None]
    if spec.first_of_equals:
        return not before or row[spec.best] > max(before)
    return row[spec.best] >= max(before, default=0.0)


def _fresh(
    recipe: Recipe, data: DataFolder, provenance: Mapping[str, Any], block: Path | None, weights: Path | None
) -> Checkpoint:
    spec = _checked_spec(recipe, data, block, weights)
    frozen = load_block(block) if block is not None else ()
    if spec.block is not None and frozen:
        spec = replace(spec, block=replace(frozen[0].spec, rotary=recipe.rotary, causal=recipe.causal))
    torch.manual_seed(recipe.train.seed)
    model = build_model(spec, frozen)
    if weights is not None:
        unused = load_encoder(model, weights)
        provenance = {**provenance, "weights": {"file": weights.name, "sha256": sha256(weights), "unused": unused}}
    return Checkpoint(
        weights=trained_weights(model),
        spec=spec,
        preprocessing=_preprocessing(recipe, data),
        classes=data.classes,
        block_file=block,
        block_sha256=sha256(block) if block is not None else None,
        provenance={**provenance, "block": provenance_of(frozen) if frozen else None},
    )


def _checked_spec(recipe: Recipe, data: DataFolder, block: Path | None, weights: Path | None) -> ModelSpec:
    """Return the architecture, once it is sure that the files are given which it starts from."""
    spec = model_spec(
        recipe.architecture, recipe.preprocessing.image_size, data.classes.num_logits,
        recipe.insert, rotary=recipe.rotary, causal=recipe.causal,
    )  # fmt: skip
    if spec.block is not None and spec.insert.needs_block_file and block is None:
        raise UsageError(
            f"{recipe.architecture} needs a frozen block: --block FILE. "
            "Get one: medseg-trt samples get llama-block, then medseg-trt block extract"
        )
    if (weights is None) != (recipe.pretrained == "none"):
        raise UsageError(NO_WEIGHTS if weights is None else "pretrained=none and --weights contradict one another")
    return spec


def _preprocessing(recipe: Recipe, data: DataFolder) -> Preprocessing:
    contract = recipe.contract
    if data.window is None:
        return contract
    told = replace(contract, window=data.window, own_window=False)
    if told != contract:
        LOG.info("the window is %g … %g, as the data set says", *data.window)
    return told


def _resumed(
    last: Checkpoint, provenance: Mapping[str, Any], block: Path | None, weights: Path | None, out: Path
) -> RunState:
    begun_from = last.provenance.get("weights", {}).get("sha256")
    changed = [
        name
        for name, before, now in (
            ("recipe", _with_defaults(last.provenance["recipe"], out), provenance["recipe"]),
            ("data", last.provenance["data"]["sha256"], provenance["data"]["sha256"]),
            ("block", last.block_sha256, sha256(block) if block is not None else last.block_sha256),
            ("pretrained weights", begun_from, sha256(weights) if weights is not None else begun_from),
        )
        if before != now
    ]
    if changed:
        raise UsageError(
            f"{out} was begun with another {' and '.join(changed)}; resume with the same, or choose another -o"
        )
    state = _state(last)
    rows = [json.loads(line) for line in (out / "history.jsonl").read_text(encoding="utf-8").splitlines()]
    history = tuple(row for row in rows if row["epoch"] < state.next_epoch)
    step = f", step {len(state.progress.losses)} of the next" if state.progress is not None else ""
    LOG.info("go on after epoch %d%s", state.next_epoch - 1, step)
    return replace(state, history=history)


def _state(last: Checkpoint) -> RunState:
    assert last.training is not None  # last.pt always carries it
    progress = last.training.get("progress")
    return RunState(
        checkpoint=last,
        next_epoch=last.training["epoch"] + 1,
        progress=Progress(**progress) if progress is not None else None,
    )


def _keep_data_folder(data: DataFolder, out: Path) -> None:
    write_json(out / DATA_FOLDER, str(data.root.resolve()))


def _with_defaults(recorded: object, out: Path) -> dict[str, Any]:
    """Return a recorded recipe with the fields that recipes had not when its run was begun."""
    return _without_paths(json.loads(json.dumps(to_dict(from_dict(Recipe, recorded, str(out / "last.pt"))))))


def _without_paths(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe as plain data with the name of its split manifest alone; the splits themselves are recorded."""
    manifest = recipe["data"]["manifest"]
    return recipe if manifest is None else {**recipe, "data": {**recipe["data"], "manifest": Path(manifest).name}}


def _remove_leftovers(out: Path) -> None:
    """Remove the large files that a killed run had no time to remove."""
    for checkpoint in out.glob(".partial-*.pt"):
        checkpoint.unlink(missing_ok=True)
    for folder in out.glob(f"{PARTIAL_SLICES}*"):
        shutil.rmtree(folder, ignore_errors=True)
