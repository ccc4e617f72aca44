"""A trained model on disk: only tensors and plain data, so reading it executes no code.

``model.pt`` contains the trained weights, the statistics of BatchNorm and the metadata to use them. The frozen block is
a separate file, identified by its SHA-256, in the folder of the checkpoint or in the user's cache; ``--self-contained``
embeds it.
"""

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medseg_trt.errors import ArtefactError, InputError, MedsegError
from medseg_trt.files import atomic_file, cache_folder, parse_json, read_limited, sha256
from medseg_trt.network_spec import NetworkSpec
from medseg_trt.networks import network_from_dict
from medseg_trt.spec import Classes, Preprocessing, from_dict, to_dict
from medseg_trt.train.block.blocks import FrozenBlock, load_block
from medseg_trt.train.block.layer_geometry import block_spec
from medseg_trt.train.models.model import build_model, frozen_names
from medseg_trt.train.models.segmentation_model import SegmentationModel
from medseg_trt.train.provenance import Provenance, parse_provenance
from medseg_trt.train.tensor_files.weight_files import is_finite, is_plain, load_pickled, one_line
from medseg_trt.train.training_state import TrainingState, parse_training_state

SCHEMA = 1
HEADER = {"schema", "spec", "preprocessing", "classes", "block_sha256", "provenance"}
FROZEN_PREFIXES = ("insert.block.", "insert.final_norm.")
DATA_FOLDER = "data_folder.json"  # of a run folder
MAX_PATH_BYTES = 1 << 15  # Linux's PATH_MAX of 4096, each byte as an escape of six characters
MAX_LAYERS = 1 << 10  # of one kind; ViT-H has 32 and ResNet-152 has 36
MAX_FROZEN_PARAMETERS = 1 << 32  # LLaMA-3 405B has 3.2e9 in a layer


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A trained model with its metadata and provenance."""

    weights: Mapping[str, Tensor]  # trained parameters and BatchNorm statistics, float32
    spec: NetworkSpec
    preprocessing: Preprocessing
    classes: Classes
    block_file: Path | None = None  # the frozen block's safetensors file
    block_sha256: str | None = None
    provenance: Provenance = field(default_factory=Provenance)
    training: TrainingState | None = None  # to resume from; None: the run is complete
    data_folder: Path | None = None  # of the training, from the run folder; not stored in the checkpoint

    def model(self) -> SegmentationModel:
        """Build the network in evaluation mode: (batch, 1 or 3, height, width) float32 to logits.

        Raises:
            ArtefactError: the weights do not fit the architecture, or the block is not the one they were trained with.
        """
        blocks = self.block()
        _check_fit(self, blocks, "the checkpoint")
        model = build_model(self.spec, blocks)
        model.load_state_dict(dict(self.weights), strict=False)
        return model.eval()

    def block(self) -> tuple[FrozenBlock, ...]:
        """Read the frozen block's layers after checking the digest; empty without a block."""
        if self.block_sha256 is None or self.block_file is None:
            return ()
        return load_block(self.block_file, self.block_sha256)


def trained_weights(model: SegmentationModel) -> dict[str, Tensor]:
    """Return copies of all tensors that training changes."""
    state, frozen = model.state_dict(), _frozen_names(model)
    return {name: value.detach().clone() for name, value in state.items() if name not in frozen}


def save_checkpoint(checkpoint: Checkpoint, path: Path, *, self_contained: bool = False) -> None:
    """Write ``path`` atomically, and the frozen block beside it unless it is embedded."""
    content: dict[str, Any] = {
        "medseg_trt": {
            "schema": SCHEMA,
            "spec": to_dict(checkpoint.spec),
            "preprocessing": to_dict(checkpoint.preprocessing),
            "classes": to_dict(checkpoint.classes),
            "block_sha256": checkpoint.block_sha256,
            "provenance": checkpoint.provenance.to_dict(),
        },
        "weights": dict(checkpoint.weights),
    }
    if checkpoint.training is not None:
        content["training"] = checkpoint.training.to_dict()
    if checkpoint.block_file is not None and checkpoint.block_sha256 is not None:
        if self_contained:
            content["block_bytes"] = torch.frombuffer(bytearray(checkpoint.block_file.read_bytes()), dtype=torch.uint8)
        else:
            digest = checkpoint.block_sha256
            _put_beside(checkpoint.block_file, digest, path.parent / block_name(digest))
    with atomic_file(path) as temporary:
        torch.save(content, temporary)


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint without executing code from it.

    Raises:
        ArtefactError: no checkpoint of medseg-trt, damaged, inconsistent, or its frozen block is missing.
        InputError: it embeds its frozen block, and the cache is not writable.
    """
    path = Path(path)
    if not path.is_file():
        raise ArtefactError(f"{path} does not exist. Train a model first: medseg-trt train --recipe NAME --data DIR")
    content = load_pickled(path, "checkpoint of medseg-trt")
    header = _checked_header(content, path)
    source, digest = str(path), header["block_sha256"]
    provenance, training = parse_provenance(header["provenance"], source), content.get("training")
    checkpoint = Checkpoint(
        weights=content["weights"],
        spec=network_from_dict(header["spec"], source),
        preprocessing=from_dict(Preprocessing, header["preprocessing"], source),
        classes=from_dict(Classes, header["classes"], source),
        provenance=provenance,
        training=parse_training_state(training, source) if training is not None else None,
        block_sha256=digest,
        data_folder=_data_folder(path.parent, provenance),
    )
    _check_agreement(checkpoint, path)
    _check_fit(checkpoint, (), source)
    _check_finite(checkpoint, path)
    if digest is None:
        return checkpoint
    embedded = content.get("block_bytes")
    return replace(
        checkpoint, block_file=find_block(digest, path.parent) if embedded is None else _unpack(embedded, digest)
    )


def _data_folder(folder: Path, provenance: Provenance) -> Path | None:
    """Return the folder of the training data from the run folder or, in older files, from the checkpoint itself."""
    recorded: object = provenance.data.root if provenance.data is not None else None
    path = folder / DATA_FOLDER
    if path.is_file():  # missing beside a checkpoint that was copied alone
        recorded = parse_json(path, read_limited(path, MAX_PATH_BYTES))
    return Path(recorded) if isinstance(recorded, str) else None


def _checked_header(content: Any, path: Path) -> dict[str, Any]:
    """Return the metadata, after checking the types of everything in the file."""
    header = content.get("medseg_trt") if isinstance(content, dict) else None
    if not isinstance(header, dict):
        raise ArtefactError(f"{path} is damaged or no checkpoint of medseg-trt: nothing in it describes a model")
    if header.get("schema") != SCHEMA:
        raise ArtefactError(f"{path} was written by another version of medseg-trt; this one reads schema {SCHEMA}")
    weights, digest, embedded = content.get("weights"), header.get("block_sha256"), content.get("block_bytes")
    sound = {
        "weights": isinstance(weights, dict) and all(map(is_plain, weights.values())),
        "training": isinstance(content.get("training"), dict | None),
        "block_bytes": embedded is None or (is_plain(embedded) and embedded.dtype == torch.uint8),
        "block_sha256": digest is None
        or (isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest) is not None),
        "provenance": isinstance(header.get("provenance"), dict),
        "its header": header.keys() == HEADER,
    }
    if damaged := [name for name, good in sound.items() if not good]:
        raise ArtefactError(f"{path} is damaged: {', '.join(damaged)} cannot be what medseg-trt wrote")
    return header


def _check_agreement(checkpoint: Checkpoint, path: Path) -> None:
    """Check that the metadata are consistent."""
    spec, classes, preprocessing = checkpoint.spec, checkpoint.classes, checkpoint.preprocessing
    if classes.num_logits != spec.num_classes:
        raise ArtefactError(
            f"{path}: {len(classes.names)} class names need {classes.num_logits} logits, "
            f"but num_classes is {spec.num_classes}; the file has been altered"
        )
    if preprocessing.image_size != spec.image_size:
        raise ArtefactError(
            f"{path}: images are prepared at {preprocessing.image_size}, "
            f"but the network takes {spec.image_size}; the file has been altered"
        )


def _check_fit(checkpoint: Checkpoint, blocks: Sequence[FrozenBlock], source: str) -> None:
    """Compare names, shapes and types with the architecture before any allocation of the sizes in the spec.

    Raises:
        ArtefactError: the weights, or the block's layers if given, do not match the architecture.
    """
    spec = checkpoint.spec
    misfit = f"{source}: the weights do not fit {spec.architecture}"
    depth = max(spec.depth, spec.insert.num_layers)
    if depth > MAX_LAYERS:
        raise ArtefactError(f"{misfit}: it asks for {depth} layers of one kind; at most {MAX_LAYERS} are believed")
    if spec.block is not None:
        block_spec(to_dict(spec.block), source)
        geometry = replace(spec.block, rotary=False, causal=False)
        if other := [block.spec for block in blocks if block.spec != geometry]:
            raise ArtefactError(f"{source}: the frozen block's geometry is {other[0]}; the model asks for {geometry}")
    try:
        with torch.device("meta"):
            model = build_model(spec)
    except (MedsegError, ValueError, TypeError, RuntimeError, OverflowError) as error:  # impossible sizes
        raise ArtefactError(f"{misfit}: {one_line(error)}") from error
    expected, weights = model.state_dict(), checkpoint.weights
    block_is_elsewhere = checkpoint.block_sha256 is not None or not spec.insert.needs_block_file
    frozen = _frozen_names(model) if block_is_elsewhere else set()
    if (count := sum(expected[name].numel() for name in frozen)) > MAX_FROZEN_PARAMETERS:
        raise ArtefactError(f"{misfit}: it asks for {count:,} frozen parameters; no model has as many")
    missing = [name for name in expected if name not in weights and name not in frozen]
    unknown = [name for name in weights if name not in expected or name in frozen]
    if missing or unknown:
        raise ArtefactError(f"{misfit}: {len(missing)} missing {missing[:3]}, {len(unknown)} unknown {unknown[:3]}")
    for name, tensor in weights.items():
        if (tensor.shape, tensor.dtype) != (expected[name].shape, expected[name].dtype):
            raise ArtefactError(f"{misfit}: {name} is {_kind(tensor)}, but it asks for {_kind(expected[name])}")


def _check_finite(checkpoint: Checkpoint, path: Path) -> None:
    for name, tensor in checkpoint.weights.items():
        if not is_finite(tensor):
            raise ArtefactError(f"{path}: {name} holds values that are not finite; the training has failed")


def _frozen_names(model: SegmentationModel) -> set[str]:
    """Return the names that checkpoints omit, because the block's file and the spec determine them."""
    return {name for name in frozen_names(model) if name.startswith(FROZEN_PREFIXES)}


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def block_name(digest: str) -> str:
    """Return the file name of a block beside a checkpoint and in the cache."""
    return f"block-{digest[:16]}.safetensors"


def find_block(digest: str, folder: Path) -> Path:
    """Find a frozen block by its SHA-256, beside the checkpoint first, then in the user's cache.

    Raises:
        ArtefactError: it is in neither folder.
    """
    for candidate in (folder / block_name(digest), cache_folder("blocks") / block_name(digest)):
        if candidate.is_file():
            return candidate
    raise ArtefactError(
        f"the frozen block {digest[:16]}… is not in {folder}. Copy {block_name(digest)} there, "
        f"or make it again: medseg-trt block extract SOURCE -o {folder / block_name(digest)}"
    )


def _unpack(embedded: Tensor, digest: str) -> Path:
    path = cache_folder("blocks") / block_name(digest)
    try:
        if not path.is_file() or sha256(path) != digest:
            with atomic_file(path) as temporary:
                temporary.write_bytes(embedded.numpy().tobytes())
                if sha256(temporary) != digest:
                    raise ArtefactError(f"the embedded block is damaged: its SHA-256 is not {digest[:16]}…")
    except OSError as error:
        raise InputError(
            f"the embedded block cannot be written to {path.parent}: {error.strerror or error}; "
            "set XDG_CACHE_HOME to a folder with room that you may write to"
        ) from error
    return path


def _put_beside(source: Path, digest: str, target: Path) -> None:
    if target.is_file() and (target.samefile(source) or sha256(target) == digest):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)  # the block of a 7B model is 405 MB: share it if the file system allows
    except OSError:  # another disk, no permission to link, or a damaged file of that name
        with atomic_file(target) as temporary:
            shutil.copyfile(source, temporary)
