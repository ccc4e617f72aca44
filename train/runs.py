"""A run folder: start a run, resume it after a kill, and save the results of an epoch.

It holds ``best.pt`` (highest mean Dice on the validation split, or as ``train.best`` says), ``last.pt`` (with the
optimiser's state, after the latest epoch or, with ``train.save_every_steps``, within an epoch), ``history.jsonl`` (a
line per epoch; epoch 0 is the untrained model), ``curve.png``, ``recipe.json``, ``data.json`` and ``data_folder.json``,
the path of the data on this machine, which no checkpoint contains.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from medseg_trt.errors import UsageError
from medseg_trt.files import atomic_file, sha256, write_json
from medseg_trt.network_spec import NetworkSpec
from medseg_trt.progress import LOG
from medseg_trt.spec import Preprocessing, from_dict, to_dict
from medseg_trt.train.block.blocks import load_block, provenance_of
from medseg_trt.train.checkpoint import DATA_FOLDER, Checkpoint, load_checkpoint, save_checkpoint, trained_weights
from medseg_trt.train.curve import draw_curve
from medseg_trt.train.datasets.check import require_usable
from medseg_trt.train.datasets.folder import DataFolder, manifest_sha256
from medseg_trt.train.history import HistoryRow, parse_history
from medseg_trt.train.models.model import build_model, model_spec
from medseg_trt.train.models.segmentation_model import SegmentationModel
from medseg_trt.train.provenance import DataRecord, FileRecord, Provenance, versions
from medseg_trt.train.recipes.recipes import RECIPE_FILE
from medseg_trt.train.recipes.training_spec import Recipe, TrainSpec
from medseg_trt.train.training_state import OptimizerState, Progress, TrainingState
from medseg_trt.train.weights.swin_weights import load_initial

PARTIAL_SLICES = ".partial-slices-"  # prefix of the temporary folder of prepared slices
GET_BLOCK = (
    "medseg-trt samples get llama-block -o data && medseg-trt block extract "
    "data/llama-block/SmolLM2-135M-Instruct.Q4_1.gguf -o block.safetensors"
)
NO_WEIGHTS = (
    "the recipe needs pretrained weights of the encoder: --weights R50+ViT-B_16.npz, or timm's "
    "vit_base_r50_s16_224.orig_in21k as .safetensors, or Swin-T. To start from random weights: --set pretrained=none"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunState:
    """The state of a training run between two epochs, or within one."""

    checkpoint: Checkpoint
    history: tuple[HistoryRow, ...] = ()  # known only to the process that writes it
    next_epoch: int = 0  # 0 is the validation of the untrained model
    progress: Progress | None = None  # in ``next_epoch``


def begin(
    recipe: Recipe, data: DataFolder, out: Path, *, block: Path | None, weights: Sequence[Path], resume: bool
) -> RunState:
    """Start a run, or with ``resume`` continue the one in ``out``.

    Raises:
        UsageError: ``out`` holds a run already, or one of another recipe, data set, block or pretrained weights; or the
            block or the weights are missing.
    """
    last = out / "last.pt"
    if last.is_file() and not resume:
        raise UsageError(f"{out} holds a run already. Add --resume to continue it, or choose another folder with -o")
    if not last.is_file():
        _check_spec(recipe, data, block, weights)  # before gigabytes of data are hashed
    manifest = data.manifest()
    digest = manifest_sha256(manifest)
    provenance = Provenance(
        recipe=_without_paths(json.loads(json.dumps(to_dict(recipe)))),
        data=DataRecord(name=data.name, sha256=digest, note=data.note, manifest=manifest),
        versions=versions(),
    )
    _remove_leftovers(out)
    if last.is_file():
        state = _resume(load_checkpoint(last), provenance, block, weights, out)
        _write_data_folder(data, out)
        return state
    if resume:
        LOG.warning("%s holds no run to resume; a new run starts", out)
    require_usable(data)
    checkpoint = _fresh(recipe, data, provenance, block, weights)
    write_json(out / RECIPE_FILE, to_dict(recipe))
    LOG.info("all fields of the recipe are in %s, and -v shows them", out / RECIPE_FILE)
    write_json(out / "data.json", manifest)
    _write_data_folder(data, out)
    return RunState(checkpoint=checkpoint)


def join(recipe: Recipe, data: DataFolder, out: Path, *, block: Path | None, weights: Sequence[Path]) -> RunState:
    """Return the state that ``begin`` returned in the first process, without its checks and without writing files."""
    last = out / "last.pt"
    return (
        _state(load_checkpoint(last))
        if last.is_file()
        else RunState(checkpoint=_fresh(recipe, data, Provenance(), block, weights))
    )


def save(
    state: RunState,
    model: SegmentationModel,
    optimizer_state: OptimizerState,
    row: HistoryRow,
    out: Path,
    spec: TrainSpec,
) -> RunState:
    """Write the results of an epoch, so that a kill at any time loses at most the interrupted epoch.

    Args:
        state: of the run before this epoch.
        model: after this epoch.
        optimizer_state: after this epoch.
        row: of the history.
        out: the run folder.
        spec: which epochs are kept, and which is the best.
    """
    history = (*state.history, row)
    dice_of_class = dict(row.validation.dice_of_class) if row.validation is not None else None
    provenance = replace(state.checkpoint.provenance, epoch=row.epoch, step=None, metrics={"val": dice_of_class})
    checkpoint = replace(state.checkpoint, weights=trained_weights(model), provenance=provenance, training=None)
    if _is_best(row, state.history, spec):
        save_checkpoint(checkpoint, out / "best.pt")
    if row.epoch in spec.keep_epochs:
        save_checkpoint(checkpoint, out / f"epoch-{row.epoch}.pt")
    with atomic_file(out / "history.jsonl") as temporary:
        temporary.write_text("".join(row.to_line() for row in history), encoding="utf-8")
    training = TrainingState(optimizer_state=optimizer_state, epoch=row.epoch)
    save_checkpoint(replace(checkpoint, training=training), out / "last.pt")
    draw_curve(history, out / "curve.png")
    return RunState(checkpoint=state.checkpoint, history=history, next_epoch=row.epoch + 1)


def save_progress(
    state: RunState, model: SegmentationModel, optimizer_state: OptimizerState, progress: Progress, out: Path
) -> None:
    """Write ``last.pt`` within an epoch, so that a kill loses at most the steps after it."""
    last = TrainingState(optimizer_state=optimizer_state, epoch=progress.epoch - 1, progress=progress)
    provenance = replace(state.checkpoint.provenance, epoch=progress.epoch - 1, step=len(progress.losses))
    checkpoint = replace(state.checkpoint, weights=trained_weights(model), provenance=provenance, training=last)
    save_checkpoint(checkpoint, out / "last.pt")


def _is_best(row: HistoryRow, history: Sequence[HistoryRow], spec: TrainSpec) -> bool:
    """Return whether no earlier epoch is better; without a validation split, the latest epoch is the best."""
    if spec.best == "last":
        return True
    score = row.score(spec.best)
    if score is None:
        return all(earlier.score(spec.best) is None for earlier in history)
    candidates = [earlier for earlier in history if earlier.epoch > 0] if spec.first_of_equals else history
    earlier_scores = [value for earlier in candidates if (value := earlier.score(spec.best)) is not None]
    if spec.first_of_equals:
        return not earlier_scores or score > max(earlier_scores)
    return score >= max(earlier_scores, default=0.0)


def _fresh(
    recipe: Recipe, data: DataFolder, provenance: Provenance, block: Path | None, weights: Sequence[Path]
) -> Checkpoint:
    spec = _check_spec(recipe, data, block, weights)
    frozen = load_block(block) if block is not None else ()
    if spec.block is not None and frozen:
        spec = replace(spec, block=replace(frozen[0].spec, rotary=recipe.rotary, causal=recipe.causal))
    torch.manual_seed(recipe.train.seed)
    model = build_model(spec, frozen)
    if weights:
        unused, names = load_initial(model, weights), ", ".join(file.name for file in weights)
        record = FileRecord(file=names, sha256=_digest(weights), unused=tuple(unused))
        provenance = replace(provenance, weights=record)
    return Checkpoint(
        weights=trained_weights(model),
        spec=spec,
        preprocessing=_preprocessing(recipe, data),
        classes=data.classes,
        block_file=block,
        block_sha256=sha256(block) if block is not None else None,
        provenance=replace(provenance, block=provenance_of(frozen) if frozen else None),
    )


def _check_spec(recipe: Recipe, data: DataFolder, block: Path | None, weights: Sequence[Path]) -> NetworkSpec:
    """Return the architecture, after checking that the files it needs are given."""
    spec = model_spec(
        recipe.architecture,
        recipe.preprocessing.image_size,
        data.classes.num_logits,
        recipe.insert,
        rotary=recipe.rotary,
        causal=recipe.causal,
    )
    if spec.block is not None and spec.insert.needs_block_file and block is None:
        raise UsageError(f"{recipe.architecture} needs a frozen block: --block block.safetensors. Get one: {GET_BLOCK}")
    if (not weights) != (recipe.pretrained == "none"):
        raise UsageError(NO_WEIGHTS if not weights else "pretrained=none and --weights exclude each other")
    return spec


def _digest(weights: Sequence[Path]) -> str:
    return "+".join(sha256(file) for file in weights)


def _preprocessing(recipe: Recipe, data: DataFolder) -> Preprocessing:
    preprocessing = recipe.contract
    if data.window is None:
        return preprocessing
    with_window = replace(preprocessing, window=data.window, own_window=False)
    if with_window != preprocessing:
        LOG.info("the window is %g … %g, set by the data set", *data.window)
    return with_window


def finished_epochs(out: Path) -> str | None:
    """Say for an interrupted run what ``last.pt`` and ``history.jsonl`` hold; None: there is nothing to resume."""
    if not (out / "last.pt").is_file():
        return None
    epoch = len((out / "history.jsonl").read_text(encoding="utf-8").splitlines()) - 1 if _has_history(out) else 0
    return f"saved after epoch {epoch} in {out}"


def _has_history(out: Path) -> bool:
    return (out / "history.jsonl").is_file()


def _resume(
    last: Checkpoint, provenance: Provenance, block: Path | None, weights: Sequence[Path], out: Path
) -> RunState:
    recorded = last.provenance
    old_recipe, new_recipe = _with_defaults(recorded.recipe, out), provenance.recipe or {}
    if old_recipe != new_recipe:
        raise UsageError(
            f"{out} was started with another recipe: {'; '.join(_differences(old_recipe, new_recipe))}. "
            f"{out / RECIPE_FILE} holds all of it; leave out --recipe and --set to resume with it, or choose another -o"
        )
    initial_weights = recorded.weights.sha256 if recorded.weights is not None else None
    changed = [
        name
        for name, before, now in (
            ("data", _data_digest(recorded), _data_digest(provenance)),
            ("block", last.block_sha256, sha256(block) if block is not None else last.block_sha256),
            ("pretrained weights", initial_weights, _digest(weights) if weights else initial_weights),
        )
        if before != now
    ]
    if changed:
        raise UsageError(
            f"{out} was started with another {' and '.join(changed)}; resume with the same, or choose another -o"
        )
    state = _state(last)
    rows = parse_history((out / "history.jsonl").read_text(encoding="utf-8"))
    history = tuple(row for row in rows if row.epoch < state.next_epoch)
    step = f", step {len(state.progress.losses)} of the next" if state.progress is not None else ""
    LOG.info("resume after epoch %d%s", state.next_epoch - 1, step)
    return replace(state, history=history)


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the fields in which two recipes differ, with both values."""
    for name in dict.fromkeys([*old, *new]):
        before, now = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            yield from _differences(cast("dict[str, Any]", before), cast("dict[str, Any]", now), f"{prefix}{name}.")
        elif before != now:
            yield f"{prefix}{name} was {json.dumps(before)}, is now {json.dumps(now)}"


def _data_digest(provenance: Provenance) -> str | None:
    return provenance.data.sha256 if provenance.data is not None else None


def _state(last: Checkpoint) -> RunState:
    assert last.training is not None  # last.pt always has it
    return RunState(checkpoint=last, next_epoch=last.training.epoch + 1, progress=last.training.progress)


def _write_data_folder(data: DataFolder, out: Path) -> None:
    write_json(out / DATA_FOLDER, str(data.root.resolve()))


def _with_defaults(recorded: object, out: Path) -> dict[str, Any]:
    """Return a recorded recipe with the defaults of fields that were added after its run started."""
    return _without_paths(json.loads(json.dumps(to_dict(from_dict(Recipe, recorded, str(out / "last.pt"))))))


def _without_paths(recipe: dict[str, Any]) -> dict[str, Any]:
    """Reduce the path of the split manifest in a recipe to its name; the splits themselves are recorded."""
    manifest = recipe["data"]["manifest"]
    return recipe if manifest is None else {**recipe, "data": {**recipe["data"], "manifest": Path(manifest).name}}


def _remove_leftovers(out: Path) -> None:
    """Remove the large temporary files of a killed run."""
    for checkpoint in out.glob(".partial-*.pt"):
        checkpoint.unlink(missing_ok=True)
    for folder in out.glob(f"{PARTIAL_SLICES}*"):
        shutil.rmtree(folder, ignore_errors=True)
