"""Open untrusted files of weights: no code in them is executed, and no claimed size is allocated unchecked."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medseg_trt.errors import ArtefactError, require
from medseg_trt.files import open_regular
from medseg_trt.train.tensor_files.pickle_judge import ExcessError, ForeignObjectError
from medseg_trt.train.tensor_files.pickle_limits import require_tensors_and_data

MAX_JSON_BYTES = 1 << 24


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file to read single tensors.

    Raises:
        ArtefactError: the file is damaged, also if this is detected only during a read.
    """
    safetensors = require("safetensors", "train")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            yield file
    except (OSError, safetensors.SafetensorError) as error:
        raise ArtefactError(f"{path} is not a usable safetensors file: {error}") from error


def open_pickled(path: Path) -> dict[str, Tensor]:
    """Memory-map a file of named tensors that ``torch.save`` wrote; only what is read is loaded.

    Raises:
        ArtefactError: the file is damaged, of PyTorch's format before 1.6, or contains other objects.
    """
    content = load_pickled(path, "file of named tensors", mapped=True)
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ArtefactError(f"{path} holds no named tensors; it is no checkpoint of a language model")
    if odd := [key for key, value in content.items() if not is_plain(value)]:
        raise ArtefactError(f"{path}: {odd[0]} is no plain tensor with all its values in the file")
    return content


def load_pickled(path: Path, kind: str, *, mapped: bool = False) -> Any:
    """Read tensors and plain data that ``torch.save`` wrote.

    Args:
        path: the file.
        kind: of file that it should be, for the message.
        mapped: memory-map the tensors instead of reading them.

    Raises:
        ArtefactError: the file is damaged, compressed, or requires the execution of code.
    """
    try:
        with path.open("rb") as file, warnings.catch_warnings(action="ignore"):  # the error contains the message
            require_tensors_and_data(file)
            file.seek(0)
            source = path if mapped else file
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
    except ForeignObjectError as error:
        raise ArtefactError(
            f"{path} holds other things than tensors and plain data ({one_line(error)}), so it is not opened; "
            'where it was made, load it and save its tensors alone: torch.save(model.state_dict(), "FILE")'
        ) from error
    except ExcessError as error:
        raise ArtefactError(f"{path} {error}; it is not to be trusted") from error
    except Exception as error:  # for damaged bytes PyTorch raises many types, including AssertionError
        raise ArtefactError(f"{path} is damaged or no {kind}: {one_line(error)}") from error


def is_plain(value: Any) -> bool:
    """Return whether this is a dense tensor with every value stored once, in memory or in the file."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type != "cpu":
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def is_finite(tensor: Tensor) -> bool:
    """Return whether all values are finite, without a copy."""
    return all(bool(end.isfinite()) for end in tensor.aminmax())  # both are NaN if a value is


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object that describes weights in the same folder.

    Raises:
        ArtefactError: it is missing, too large, or no JSON object.
    """
    try:
        with open_regular(path, follow_links=True) as file:  # a FIFO would block, and a device never end
            written = file.read(MAX_JSON_BYTES + 1)
        if len(written) > MAX_JSON_BYTES:
            raise ArtefactError(f"{path} has more than {MAX_JSON_BYTES} bytes; it is not what its name says")
        content = json.loads(written)
    except (OSError, ValueError, RecursionError) as error:
        raise ArtefactError(f"{path} is needed beside the weights and cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ArtefactError(f"{path} holds no JSON object")
    return content


def one_line(error: BaseException) -> str:
    """Return the beginning of an error's message on one line."""
    return " ".join(str(error).split())[:200]
