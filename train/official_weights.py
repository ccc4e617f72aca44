"""Read the authors' own checkpoints into one of ours with the same logits.

TransUNet's and LLM4MedSeg's are read here, those of the networks that have the authors' names in ``baseline_weights``.
They are state dicts, alone or under a key of a larger dictionary (``state_dict.named_tensors``). LLM4MedSeg's hold the
frozen language layer too, in float32: it is split off into a block file, in 16 bits where it came from 16 bits.
"""

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isqrt
from pathlib import Path

import torch
from torch import Tensor

from medseg_trt import __version__
from medseg_trt.errors import ArtefactError, UsageError
from medseg_trt.files import sha256
from medseg_trt.network_spec import PIXELS_PER_TOKEN, ModelSpec, NetworkSpec
from medseg_trt.spec import BlockSpec, Classes, Preprocessing
from medseg_trt.train.block.blocks import FrozenBlock, load_block, save_block
from medseg_trt.train.block.layer_choice import FINAL_NORM
from medseg_trt.train.block.layer_geometry import block_spec, half_split
from medseg_trt.train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from medseg_trt.train.models.model import build_model, model_spec
from medseg_trt.train.provenance import FileRecord, Provenance, versions
from medseg_trt.train.tensor_files.state_dict import NO_CHECKPOINT, named_tensors
from medseg_trt.train.tensor_files.weight_files import load_pickled
from medseg_trt.train.weights.baseline_weights import baseline_in, baseline_spec, baseline_weights
from medseg_trt.train.weights.matching import matching_tensor, named_classes, require_same_names
from medseg_trt.train.weights.weight_names import LLM4MEDSEG, META_NAME, TRANSUNET, names_elsewhere

POSITIONS, HEAD = "transformer.embeddings.position_embeddings", "segmentation_head.0.weight"
MAPPER = "transformer.llama_dim_mapper1.weight"
LANGUAGE_LAYER, LANGUAGE_NORM = "transformer.llama.layers.0.", "transformer.llama.norm.weight"
ROTARY_TABLE = re.compile(r"transformer\.llama\.(layers\.0\.attention\.inner_attention\.)?(rope\.)?freqs(_cis)?")

State = Mapping[str, Tensor]


def import_official(
    path: Path,
    out: Path,
    *,
    preprocessing: Preprocessing,
    classes: Classes | None = None,
    image_size: tuple[int, int] | None = None,
    block: Path | None = None,
    architecture: str | None = None,
    keep_auxiliary: bool = True,
) -> Checkpoint:
    """Write a checkpoint, and its block file beside it, from one of the authors' checkpoints.

    Args:
        path: the ``.pth`` file.
        out: the checkpoint to write.
        preprocessing: how images were prepared for the network; its size is replaced by the network's.
        classes: the labels' names; None takes those of the authors' data set with as many, or else numbers.
        image_size: height and width in pixels; None: the square that the position embedding is of.
        block: the frozen layer, for a file that does not hold it.
        architecture: a key of ``MODELS`` with other sizes than the published ones.
        keep_auxiliary: of DS-TransUNet, keep the auxiliary heads, which only further training uses.

    Raises:
        ArtefactError: the file is damaged, or does not match the architecture.
        UsageError: the classes, the size or the block do not match the file, or are missing.
    """
    state = read_state(path)
    if (baseline := baseline_in(state)) is not None:
        if block is not None:
            raise UsageError(f"{path} is a {baseline}, which has no frozen layer; leave --block out")
        spec = baseline_spec(state, baseline, architecture, image_size, preprocessing, path)
        weights, spec = baseline_weights(state, spec, path, keep_auxiliary=keep_auxiliary)
        _created(out.parent)
        checkpoint = _checkpoint(weights, spec, preprocessing, named_classes(classes, spec.num_classes, path), path)
        save_checkpoint(checkpoint, out)
        return load_checkpoint(out)
    has_block = MAPPER in state
    chosen = architecture or ("llm-transunet" if has_block else "transunet")
    spec = model_spec(chosen, image_size or _square(state, path), _shape(state, HEAD, 4, path)[0])
    if not isinstance(spec, ModelSpec):
        raise ArtefactError(f"{path} is a TransUNet; {chosen} is another network")
    if spec.num_layers and spec.grid[0] * spec.grid[1] != _shape(state, POSITIONS, 3, path)[1]:
        raise UsageError(
            f"{path} was trained with {_shape(state, POSITIONS, 3, path)[1]} tokens, but {spec.image_size[0]} x "
            f"{spec.image_size[1]} pixels have {spec.grid[0] * spec.grid[1]}; give its own --image-size"
        )
    named = named_classes(classes, spec.num_classes, path)
    if (spec.block is None) == has_block:
        raise ArtefactError(f"{path} holds {'a' if has_block else 'no'} language insert; {chosen} is another network")
    with tempfile.TemporaryDirectory(dir=_created(out.parent), prefix=".partial-import-") as temporary:
        frozen, block_file = _frozen(state, spec, block, Path(temporary), path) if has_block else (None, None)
        if frozen is not None:
            norm = "ones" if _final_norm(state) is None else "pretrained"
            spec = replace(spec, block=frozen.spec, insert=replace(spec.insert, norm=norm))
        checkpoint = _checkpoint(_weights(state, spec, path), spec, preprocessing, named, path)
        if frozen is not None and block_file is not None:
            checkpoint = replace(
                checkpoint,
                block_file=block_file,
                block_sha256=sha256(block_file),
                provenance=replace(checkpoint.provenance, block=dict(frozen.provenance)),
            )
        save_checkpoint(checkpoint, out)
    return load_checkpoint(out)


def read_state(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a ``.pth`` file by their published names, without wrappers and prefixes.

    Raises:
        ArtefactError: it is missing or damaged, or contains other objects than named tensors.
    """
    if not path.is_file():
        raise ArtefactError(f"{path} does not exist; give a checkpoint of an author's code (.pth)")
    if path.suffix.lower() in (".npz", ".safetensors"):
        raise UsageError(f"{path} has an encoder's weights alone; start a training from them: train --weights {path}")
    state = named_tensors(load_pickled(path, "checkpoint of PyTorch"), path)
    return {key: value for key, value in state.items() if not ROTARY_TABLE.fullmatch(key)}


def _checkpoint(
    weights: Mapping[str, Tensor], spec: NetworkSpec, preprocessing: Preprocessing, classes: Classes, path: Path
) -> Checkpoint:
    return Checkpoint(
        weights=weights,
        spec=spec,
        preprocessing=replace(preprocessing, image_size=spec.image_size),
        classes=classes,
        provenance=Provenance(imported=FileRecord(file=path.name, sha256=sha256(path)), versions=versions()),
    )


def _shape(state: State, name: str, axes: int, path: Path) -> tuple[int, ...]:
    if name not in state or state[name].dim() != axes:
        raise ArtefactError(f"{path} has no {name} with {axes} axes; {NO_CHECKPOINT}")
    return tuple(state[name].shape)


def _square(state: State, path: Path) -> tuple[int, int]:
    tokens = _shape(state, POSITIONS, 3, path)[1]
    side = isqrt(tokens)
    if side * side != tokens:
        raise UsageError(f"{path} has {tokens} tokens, which make no square; give its size: --image-size HEIGHTxWIDTH")
    return side * PIXELS_PER_TOKEN, side * PIXELS_PER_TOKEN


def _weights(state: State, spec: ModelSpec, path: Path) -> dict[str, Tensor]:
    """Return the weights of the checkpoint; every tensor must be found, and none may be left over."""
    with torch.device("meta"):
        model = build_model(spec)
    is_frozen = [name for name in model.state_dict() if name.startswith(("insert.block.", "insert.final_norm."))]
    sources = names_elsewhere(LLM4MEDSEG if spec.block is not None else TRANSUNET, model.state_dict())
    key_of = {ours: sources[ours].name for ours in model.state_dict() if ours not in is_frozen}
    known = {source.name for source in sources.values()} | {LANGUAGE_NORM}
    require_same_names(
        sorted(set(key_of.values()) - state.keys()), sorted(state.keys() - known), spec.architecture, path
    )
    _require_skips(
        state, {key_of[ours]: like.shape for ours, like in model.state_dict().items() if ours in key_of}, path
    )
    weights: dict[str, Tensor] = {}
    for ours, like in model.state_dict().items():
        if ours in key_of:
            remedy = "for another image size give --image-size" if key_of[ours] == POSITIONS else None
            weights[ours] = matching_tensor(state[key_of[ours]], like, key_of[ours], spec.architecture, path, remedy)
    return weights


def _require_skips(state: State, shapes: Mapping[str, torch.Size], path: Path) -> None:
    """Refuse a network with other skip connections, whose decoder has other numbers of channels."""
    joins = [name for name in shapes if re.fullmatch(r"decoder\.blocks\.\d\.conv1\.0\.weight", name)]
    wider = [name for name in joins if state[name].dim() == 4 and state[name].shape[1] != shapes[name][1]]
    if wider and all(state[name].shape[0] == shapes[name][0] for name in wider):
        raise ArtefactError(
            f"{path} was trained with other skip connections (n_skip of TransUNet's configuration): {wider[0]} takes "
            f"{state[wider[0]].shape[1]} channels, not {shapes[wider[0]][1]}; only n_skip = 3 can be imported"
        )


def _frozen(state: State, spec: ModelSpec, block: Path | None, folder: Path, path: Path) -> tuple[FrozenBlock, Path]:
    """Return the frozen layer and its file: the given one, or one that is written from the checkpoint."""
    assert spec.block is not None
    inside = {
        name: state[LANGUAGE_LAYER + META_NAME[name]] for name in META_NAME if LANGUAGE_LAYER + META_NAME[name] in state
    }
    given_block = _only(load_block(block), block) if block is not None else None
    if not inside:
        if given_block is None or block is None:
            raise UsageError(f"{path} does not hold the frozen language layer; give it: --block FILE")
        if (norm := _final_norm(state)) is not None and not _same(given_block, {FINAL_NORM: norm}):
            raise UsageError(f"{path} has another final norm than {block}; extract the block with --final-norm")
        return given_block, block
    if missing := sorted(set(META_NAME) - set(inside)):
        raise ArtefactError(f"{path} holds a part of the language layer only; {META_NAME[missing[0]]} is missing")
    split_off = _split_off(inside, _final_norm(state), spec.block, path)
    if given_block is not None and block is not None:
        if given_block.spec != split_off.spec or not _same(given_block, split_off.tensors):
            raise UsageError(f"{path} holds another language layer than {block}; leave --block out to use its own")
        return given_block, block
    file = folder / "block.safetensors"
    save_block(split_off, file)
    return split_off, file


def _final_norm(state: State) -> Tensor | None:
    """Return the weight of the final norm; None if all are ones, as in the authors' code."""
    norm = state.get(LANGUAGE_NORM)
    return None if norm is None or bool((norm == 1).all()) else norm


def _same(block: FrozenBlock, tensors: State) -> bool:
    """Return whether the block has these tensors with equal values."""
    return all(
        name in block.tensors and torch.equal(block.tensors[name].float(), tensor.float())
        for name, tensor in tensors.items()
    )


def _only(blocks: Sequence[FrozenBlock], path: Path) -> FrozenBlock:
    if len(blocks) != 1:
        raise UsageError(f"{path} holds {len(blocks)} layers, but the authors' network has one")
    return blocks[0]


def _split_off(inside: State, norm: Tensor | None, preset: BlockSpec, path: Path) -> FrozenBlock:
    """Return the layer of a checkpoint under Hugging Face's names, with the final norm if given."""
    if any(tensor.dim() != (1 if "norm" in name else 2) for name, tensor in inside.items()):
        raise ArtefactError(f"{path}: the language layer has tensors of another number of axes than LLaMA's")
    query, key, gate = (inside[f"{name}.weight"] for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj"))
    geometry = block_spec(
        {
            "hidden_size": query.shape[1],
            "intermediate_size": gate.shape[0],
            "num_heads": query.shape[0] // preset.head_dim,
            "num_kv_heads": key.shape[0] // preset.head_dim,
            "head_dim": preset.head_dim,
            "rms_norm_eps": preset.rms_norm_eps,
            "rope_theta": preset.rope_theta,
        },
        path,
    )
    tensors = dict(inside)
    for name, heads in (
        ("self_attn.q_proj.weight", geometry.num_heads),
        ("self_attn.k_proj.weight", geometry.num_kv_heads),
    ):
        tensors[name] = half_split(tensors[name], heads)
    if norm is not None:
        tensors[FINAL_NORM] = norm
    provenance = {"format": "LLM4MedSeg", "file": path.name, "rope_layout": "half-split", "medseg_trt": __version__}
    try:
        return FrozenBlock(spec=geometry, tensors=_smallest(tensors), provenance=provenance)
    except ValueError as error:
        raise ArtefactError(f"{path}: {error}") from error


def _smallest(tensors: State) -> dict[str, Tensor]:
    """Return the tensors in 16 bits if no value changes, else in float32."""
    whole = {name: tensor.float().contiguous() for name, tensor in tensors.items()}
    for dtype in (torch.float16, torch.bfloat16):
        short = {name: tensor.to(dtype) for name, tensor in whole.items()}
        if all(torch.equal(short[name].float(), whole[name]) for name in whole):
            return short
    return whole


def _created(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
