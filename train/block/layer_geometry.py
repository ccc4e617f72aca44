"""The geometry of a LLaMA decoder layer: read from untrusted values, and compared with tensor shapes."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medseg_trt.errors import ArtefactError
from medseg_trt.spec import BlockSpec, from_dict
from medseg_trt.train.block.layer_choice import FINAL_NORM
from medseg_trt.train.block.llama import LlamaBlock

MAX_SIZE = 1 << 20  # of one axis of a layer; LLaMA-3 405B has 53248


def check_layer(spec: BlockSpec, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that the shapes are those of one layer of this geometry, optionally with the final norm.

    Raises:
        ValueError: a tensor is missing, unknown, or has another shape.
    """
    with torch.device("meta"):
        expected_shapes = {name: tuple(tensor.shape) for name, tensor in LlamaBlock(spec).state_dict().items()}
    if FINAL_NORM in shapes:
        expected_shapes[FINAL_NORM] = (spec.hidden_size,)
    if different := sorted(expected_shapes.keys() ^ shapes.keys()):
        raise ValueError(
            f"{different[0]} is {'missing' if different[0] in expected_shapes else 'no tensor of a LLaMA layer'}"
        )
    for name, shape in shapes.items():
        if tuple(shape) != expected_shapes[name]:
            raise ValueError(f"{name} has the shape {tuple(shape)}, but its geometry requires {expected_shapes[name]}")


def half_split(rows: Tensor, heads: int) -> Tensor:
    """Reorder a q or k projection's rows: interleaved rotary pairs (llama.cpp, Meta) to half-split (Hugging Face)."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(rows.shape)


def block_spec(values: Mapping[str, Any], source: Path | str) -> BlockSpec:
    """Build a geometry from untrusted values; implausible sizes are refused before any allocation.

    Raises:
        ArtefactError: a value is missing, unknown or out of range.
    """
    for name in ("hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim"):
        if not isinstance(value := values.get(name), int) or not 0 < value <= MAX_SIZE:
            raise ArtefactError(f"{source}: {name} is {value!r}; it must be a whole number from 1 to {MAX_SIZE}")
    for name in ("rms_norm_eps", "rope_theta"):
        if not isinstance(value := values.get(name), int | float) or not 0 < value < math.inf:
            raise ArtefactError(f"{source}: {name} is {value!r}; it must be a positive number")
    return from_dict(BlockSpec, dict(values), str(source))


def head_dim_of(hidden: Any, heads: Any) -> Any:
    """Return the default width of a head, ``hidden / heads``; None if the values are not valid sizes."""
    is_valid = isinstance(hidden, int) and isinstance(heads, int) and heads > 0 and hidden % heads == 0
    return hidden // heads if is_valid else None
