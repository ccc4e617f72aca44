"""Read Meta's layout of LLaMA: ``params.json`` beside ``consolidated.00.pth``, ``consolidated.01.pth`` and so on.

Each part holds every tensor's share for one GPU. Source: meta-llama/llama ``model.py`` and fairscale's model-parallel
layers: ``ColumnParallelLinear`` splits the rows of PyTorch's weight, ``RowParallelLinear`` its columns.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medseg_trt.errors import ArtefactError
from medseg_trt.train.tensor_files.weight_files import open_pickled, read_json

PART = re.compile(r"consolidated\.(\d{2})\.pth")
SPLIT_AXIS: Mapping[str, int | None] = {  # by the end of a key: 0: rows, 1: columns, None: complete in every part
    "attention_norm.weight": None,
    "attention.wq.weight": 0,
    "attention.wk.weight": 0,
    "attention.wv.weight": 0,
    "attention.wo.weight": 1,
    "ffn_norm.weight": None,
    "feed_forward.w1.weight": 0,
    "feed_forward.w2.weight": 1,
    "feed_forward.w3.weight": 0,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class MetaFile:
    """The parts of one model, memory-mapped, and the content of ``params.json``."""

    params_path: Path
    params: Mapping[str, Any]
    parts: Mapping[Path, Mapping[str, Tensor]]  # in the order of their numbers

    def keys(self) -> list[str]:
        """Return every key of every part, once."""
        return list(dict.fromkeys(key for tensors in self.parts.values() for key in tensors))

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of the joined tensor.

        Raises:
            ArtefactError: a part lacks it, or the parts do not match.
        """
        shares = self._shares(key)
        first, axis = shares[0], _axis(key)
        if len({(share.shape, share.dtype) for share in shares}) > 1 or first.dim() <= (axis or 0):
            kinds = ", ".join(f"{tuple(share.shape)} {str(share.dtype).removeprefix('torch.')}" for share in shares)
            raise ArtefactError(f"{self.params_path.parent}: the parts of {key} do not fit together: {kinds}")
        shape = list(first.shape)
        if axis is not None:
            shape[axis] *= len(shares)
        return tuple(shape)

    def read(self, key: str) -> Tensor:
        """Join one tensor's shares in memory.

        Raises:
            ArtefactError: the parts differ in a tensor that is complete in all of them.
        """
        self.shape(key)
        shares, axis = self._shares(key), _axis(key)
        if axis is not None:
            return torch.cat(shares, axis)
        if not all(torch.equal(share, shares[0]) for share in shares[1:]):
            raise ArtefactError(f"{self.params_path.parent}: {key} differs between the parts; they are of two models")
        return shares[0].clone()

    def _shares(self, key: str) -> list[Tensor]:
        for path, tensors in self.parts.items():
            if key not in tensors:
                raise ArtefactError(f"{path} lacks {key}, which other parts have")
        return [tensors[key] for tensors in self.parts.values()]


def open_meta(source: Path) -> MetaFile:
    """Memory-map the parts of a folder, or a part with all others in its folder.

    Raises:
        ArtefactError: ``params.json`` or a part is missing or damaged, or a part holds other things than tensors.
    """
    folder = source if source.is_dir() else source.parent
    params_path = folder / "params.json"
    params = read_json(params_path)
    paths = part_paths(folder) if source.is_dir() or PART.fullmatch(source.name) else [source]
    if absent := [number for number, path in enumerate(paths) if number != _number(path)]:
        raise ArtefactError(f"{folder} lacks consolidated.{absent[0]:02}.pth; every part is needed")
    return MetaFile(params_path=params_path, params=params, parts={path: open_pickled(path) for path in paths})


def part_paths(folder: Path) -> list[Path]:
    """Return the ``consolidated.NN.pth`` of a folder in the order of their numbers."""
    return sorted(path for path in folder.glob("consolidated.*.pth") if PART.fullmatch(path.name))


def _number(path: Path) -> int:
    match = PART.fullmatch(path.name)
    return int(match[1]) if match else 0  # a single file of another name is the complete model


def _axis(key: str) -> int | None:
    return next((axis for end, axis in SPLIT_AXIS.items() if key.endswith(f".{end}")), None)
