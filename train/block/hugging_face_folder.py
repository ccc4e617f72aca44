"""Find and read tensors in a Hugging Face folder, or in one shard of it: safetensors, or PyTorch's older ``.bin``."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from medseg_trt.errors import ArtefactError
from medseg_trt.train.tensor_files.weight_files import open_pickled, open_safetensors, read_json

SINGLE_FILES: Mapping[str, str] = {
    ".safetensors": "model.safetensors",
    ".bin": "pytorch_model.bin",
}  # the preferred first


@dataclass(frozen=True, kw_only=True, slots=True)
class HuggingFaceFiles:
    """The files that contain the tensors."""

    file_of_key: Mapping[str, Path]  # the file of every tensor's key
    elsewhere: Mapping[str, str]  # for a single shard: the files of all other keys, per the index

    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Return tensors by key, memory-mapped if the format allows it.

        Raises:
            ArtefactError: a file is missing or damaged, or lacks a tensor of the index.
        """
        key_list = list(keys)
        tensors: dict[str, Tensor] = {}
        for path in self.files(key_list):
            tensors |= _read(path, [key for key in key_list if self.file_of_key[key] == path])
        return tensors

    def files(self, keys: Iterable[str]) -> list[Path]:
        """Return the files that contain these tensors, sorted."""
        return sorted({self.file_of_key[key] for key in keys})


def open_hugging_face(source: Path) -> HuggingFaceFiles:
    """Find the file of every tensor; only names are read.

    Args:
        source: a folder, or a single file.

    Raises:
        ArtefactError: no weights, or the index is damaged or points outside its folder.
    """
    if source.is_dir():
        return _open_folder(source)
    file_of_key = dict.fromkeys(_keys(source), source)
    index = _index(source.parent, source.suffix.lower())
    promised = _weight_map(index) if index.is_file() else {}
    return HuggingFaceFiles(
        file_of_key=file_of_key, elsewhere={key: promised[key] for key in promised.keys() - file_of_key.keys()}
    )


def _open_folder(folder: Path) -> HuggingFaceFiles:
    for suffix, name in SINGLE_FILES.items():
        if (index := _index(folder, suffix)).is_file():
            file_of_key = {key: folder / file for key, file in _weight_map(index).items()}
            return HuggingFaceFiles(file_of_key=file_of_key, elsewhere={})
        if (folder / name).is_file():
            return HuggingFaceFiles(file_of_key=dict.fromkeys(_keys(folder / name), folder / name), elsewhere={})
    names = ", ".join(file for name in SINGLE_FILES.values() for file in (name, f"{name}.index.json"))
    raise ArtefactError(f"{folder} has no weights: none of {names}")


def _index(folder: Path, suffix: str) -> Path:
    return folder / f"{SINGLE_FILES[suffix]}.index.json"


def _weight_map(index: Path) -> dict[str, str]:
    suffix = Path(index.name.removesuffix(".index.json")).suffix
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(_is_file_name(name, suffix) for name in weight_map.values()):
        raise ArtefactError(f"{index} has no weight_map from tensors to files of its own folder; it is not trusted")
    return weight_map


def _is_file_name(name: Any, suffix: str) -> bool:
    """Return whether a name is a plain file name, without a path.

    Links, as in Hugging Face's cache, are followed.
    """
    return isinstance(name, str) and name.endswith(suffix) and not set(name) & set("/\\:\0")


def _keys(path: Path) -> list[str]:
    if path.suffix.lower() == ".bin":
        return list(open_pickled(path))
    with open_safetensors(path) as file:
        return list(file.keys())


def _read(path: Path, keys: list[str]) -> dict[str, Tensor]:
    if not path.is_file():
        raise ArtefactError(f"{path} is missing; according to the index it has {keys[0]}")
    if path.suffix.lower() != ".bin":
        with open_safetensors(path) as file:
            return {key: file.get_tensor(key) for key in keys}
    tensors = open_pickled(path)
    if absent := [key for key in keys if key not in tensors]:
        raise ArtefactError(f"{path} has no {absent[0]}, contrary to the index")
    return {key: tensors[key] for key in keys}
