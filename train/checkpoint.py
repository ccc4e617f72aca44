"""A trained model on disk: tensors and plain data only, so that reading it runs no code.

``model.pt`` holds the trained weights, BatchNorm's statistics and what is needed to use them. The frozen block is a
file of its own, known by its SHA-256, and is looked for beside the checkpoint and in the user's cache;
``--self-contained`` embeds its bytes.
"""

import os
import pickle
import shutil
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
            ArtefactError: the weights do not fit the architecture, or the block is not the one it was trained with.
        """
        model = build_model(self.spec, self.block())
        try:
            missing, unexpected = model.load_state_dict(dict(self.weights), strict=False)
        except RuntimeError as error:
            raise ArtefactError(f"the weights do not fit {self.spec.architecture}: {_one_line(error)}") from error
        missing = [name for name in missing if not name.startswith(FROZEN_PREFIXES)]
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
            _put_beside(checkpoint.block_file, path.parent / block_name(checkpoint.block_sha256))
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
        content = torch.load(path, map_location="cpu", weights_only=True)
        header, weights = content["medseg_trt"], content["weights"]
    except pickle.UnpicklingError as error:
        raise ArtefactError(f"{path} holds more than tensors and plain data, so it is not opened") from error
    except (RuntimeError, EOFError, OSError, KeyError, TypeError, ValueError) as error:
        raise ArtefactError(f"{path} is damaged or no checkpoint of medseg-trt: {_one_line(error)}") from error
    if not isinstance(header, dict) or header.get("schema") != SCHEMA:
        raise ArtefactError(f"{path} was written by another version of medseg-trt; this one reads schema {SCHEMA}")
    source = str(path)
    checkpoint = Checkpoint(
        weights=weights,
        spec=from_dict(ModelSpec, header.get("spec"), source),
        preprocessing=from_dict(Preprocessing, header.get("preprocessing"), source),
        classes=from_dict(Classes, header.get("classes"), source),
        provenance=header.get("provenance", {}),
        training=content.get("training"),
    )
    digest = header.get("block_sha256")
    if digest is None:
        return checkpoint
    block_file = (
        _unpack(content["block_bytes"], digest) if "block_bytes" in content else find_block(digest, path.parent)
    )
    return replace(checkpoint, block_file=block_file, block_sha256=digest)


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


def _put_beside(source: Path, target: Path) -> None:
    if target.exists():
        return
    with atomic_file(target) as temporary:
        temporary.unlink()
        try:
            os.link(source, temporary)  # the block of a 7B model is 405 MB: share its bytes where the disk can
        except OSError:
            shutil.copyfile(source, temporary)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
