"""A trained model on disk: tensors and plain data only, so that reading it runs no code.

``model.pt`` holds the trained weights, BatchNorm's statistics and what is needed to use them. The frozen block is a
file of its own, known by its SHA-256, and is looked for beside the checkpoint and in the user's cache;
``--self-contained`` embeds its bytes.
"""

import os
import pickle
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medseg_trt.errors import ArtefactError
from medseg_trt.files import atomic_file, cache_folder, sha256
from medseg_trt.spec import Classes, ModelSpec, Preprocessing, from_dict, to_dict
from medseg_trt.train.blocks import FrozenBlock, load_block
from medseg_trt.train.model import build_model
from medseg_trt.train.transunet import TransUNet

SCHEMA = 1
HEADER = {"schema", "spec", "preprocessing", "classes", "block_sha256", "provenance"}
FROZEN_PREFIXES = ("insert.block.", "insert.final_norm.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A trained model, with all that is needed to use it and to say where it came from."""

    weights: Mapping[str, Tensor]  # trained parameters and BatchNorm statistics, float32
    spec: ModelSpec
    preprocessing: Preprocessing
    classes: Classes
    block_file: Path | None = None  # the frozen block's safetensors file
    block_sha256: str | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)  # data, recipe, seed, versions, metrics
    training: Mapping[str, Any] | None = None  # optimiser state and epoch, to resume from

    def model(self) -> TransUNet:
        """Build the network in evaluation mode: (batch, 1 or 3, height, width) float32 to logits.

        Raises:
            ArtefactError: the weights do not fit the architecture, or the block is not the one they were trained with.
        """
        block = self.block()
        model = build_model(self.spec, block)
        try:
            missing, unexpected = model.load_state_dict(dict(self.weights), strict=False)
        except RuntimeError as error:
            raise ArtefactError(f"the weights do not fit {self.spec.architecture}: {_one_line(error)}") from error
        if block is not None:  # its weights come from its own file, and from nowhere else
            missing = [name for name in missing if not name.startswith(FROZEN_PREFIXES)]
            unexpected += [name for name in self.weights if name.startswith(FROZEN_PREFIXES)]
        if missing or unexpected:
            raise ArtefactError(
                f"the weights do not fit {self.spec.architecture}: "
                f"{len(missing)} missing {missing[:3]}, {len(unexpected)} unknown {unexpected[:3]}"
            )
        return model.eval()

    def block(self) -> FrozenBlock | None:
        """Read the frozen block, after its digest has been checked; None where the architecture has none."""
        if self.block_sha256 is None or self.block_file is None:
            return None
        return load_block(self.block_file, self.block_sha256)


def trained_weights(model: TransUNet) -> dict[str, Tensor]:
    """Return a copy of everything that training changes, and nothing that is frozen."""
    state = model.state_dict()
    return {name: value.detach().clone() for name, value in state.items() if not name.startswith(FROZEN_PREFIXES)}


def save_checkpoint(checkpoint: Checkpoint, path: Path, *, self_contained: bool = False) -> None:
    """Write ``path`` whole or not at all, and put the frozen block beside it unless it is embedded."""
    content: dict[str, Any] = {
        "medseg_trt": {
            "schema": SCHEMA,
            "spec": to_dict(checkpoint.spec),
            "preprocessing": to_dict(checkpoint.preprocessing),
            "classes": to_dict(checkpoint.classes),
            "block_sha256": checkpoint.block_sha256,
            "provenance": dict(checkpoint.provenance),
        },
        "weights": dict(checkpoint.weights),
    }
    if checkpoint.training is not None:
        content["training"] = dict(checkpoint.training)
    if checkpoint.block_file is not None and checkpoint.block_sha256 is not None:
        if self_contained:
            content["block_bytes"] = torch.frombuffer(bytearray(checkpoint.block_file.read_bytes()), dtype=torch.uint8)
        else:
            digest = checkpoint.block_sha256
            _put_beside(checkpoint.block_file, digest, path.parent / block_name(digest))
    with atomic_file(path) as temporary:
        torch.save(content, temporary)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint without running any code in it.

    Raises:
        ArtefactError: not a checkpoint of ours, damaged, or its frozen block cannot be found.
    """
    path = Path(path)
    if not path.is_file():
        raise ArtefactError(f"{path} does not exist. Train a model first: medseg-trt train --recipe NAME --data DIR")
    try:
        with warnings.catch_warnings(action="ignore"):  # about pickles of others; the error says all that is needed
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ArtefactError(f"{path} holds other things than tensors and plain data, so it is not opened") from error
    except Exception as error:  # damaged bytes make PyTorch raise almost anything, AssertionError included
        raise ArtefactError(f"{path} is damaged or no checkpoint of medseg-trt: {_one_line(error)}") from error
    header = _checked_header(content, path)
    source, digest = str(path), header["block_sha256"]
    checkpoint = Checkpoint(
        weights=content["weights"],
        spec=from_dict(ModelSpec, header["spec"], source),
        preprocessing=from_dict(Preprocessing, header["preprocessing"], source),
        classes=from_dict(Classes, header["classes"], source),
        provenance=header["provenance"],
        training=content.get("training"),
    )
    if digest is None:
        return checkpoint
    embedded = content.get("block_bytes")
    block_file = find_block(digest, path.parent) if embedded is None else _unpack(embedded, digest)
    return replace(checkpoint, block_file=block_file, block_sha256=digest)


def _checked_header(content: Any, path: Path) -> dict[str, Any]:
    """Return what describes the weights, once everything in the file is of the kind it must be."""
    header = content.get("medseg_trt") if isinstance(content, dict) else None
    if not isinstance(header, dict):
        raise ArtefactError(f"{path} is damaged or no checkpoint of medseg-trt: nothing in it describes a model")
    if header.get("schema") != SCHEMA:
        raise ArtefactError(f"{path} was written by another version of medseg-trt; this one reads schema {SCHEMA}")
    weights, digest, embedded = content.get("weights"), header.get("block_sha256"), content.get("block_bytes")
    sound = {
        "weights": isinstance(weights, dict) and all(isinstance(value, Tensor) for value in weights.values()),
        "training": isinstance(content.get("training"), dict | None),
        "block_bytes": embedded is None or (isinstance(embedded, Tensor) and embedded.dtype == torch.uint8),
        "block_sha256": digest is None
        or (isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest) is not None),
        "provenance": isinstance(header.get("provenance"), dict),
        "its header": header.keys() == HEADER,
    }
    if damaged := [name for name, good in sound.items() if not good]:
        raise ArtefactError(f"{path} is damaged: {', '.join(damaged)} cannot be what medseg-trt wrote")
    return header


def block_name(digest: str) -> str:
    """Return the file name under which a block is kept beside a checkpoint and in the cache."""
    return f"block-{digest[:16]}.safetensors"


def find_block(digest: str, folder: Path) -> Path:
    """Find a frozen block by its SHA-256, beside the checkpoint first, then in the user's cache.

    Raises:
        ArtefactError: it is in neither place.
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
    if not path.is_file() or sha256(path) != digest:
        with atomic_file(path) as temporary:
            temporary.write_bytes(embedded.numpy().tobytes())
            if sha256(temporary) != digest:
                raise ArtefactError(f"the embedded block is damaged: its SHA-256 is not {digest[:16]}…")
    return path


def _put_beside(source: Path, digest: str, target: Path) -> None:
    if target.is_file() and (target.samefile(source) or sha256(target) == digest):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)  # the block of a 7B model is 405 MB: share its bytes where the disk can
    except OSError:  # another disk, no right to link, or a damaged file in its place
        with atomic_file(target) as temporary:
            shutil.copyfile(source, temporary)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
