"""Start the encoder from R50+ViT-B/16, trained on ImageNet-21k: Google's ``.npz``, or timm's safetensors of it.

The files hold a convolutional stem and a transformer, with a class token that TransUNet has not; the position embedding
of 14 x 14 tokens is resized to the network's. timm's ``vit_base_r50_s16_224`` has the same weights but pads its strided
convolutions and its pooling on one side (SAME), and normalises a shortcut in 32 groups; TransUNet pads both sides and
normalises every channel by itself, so that its features are others from the same weights. Training evens that out.

Source: Beckschen/TransUNet ``vit_seg_modeling.py``, ``load_from``; timm 1.0.29 ``vision_transformer_hybrid.py``.
"""

import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isqrt, prod
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from medseg_trt.errors import ArtefactError
from medseg_trt.network_spec import ModelSpec
from medseg_trt.progress import LOG
from medseg_trt.train.models.transunet import TransUNet
from medseg_trt.train.tensor_files.weight_files import is_finite, one_line, open_safetensors
from medseg_trt.train.weights.weight_names import NPZ, TIMM, Elsewhere, Layout, Rule, names_elsewhere

ENCODER_PARTS = ("resnet.", "patch_embedding.", "position_embedding", "layers.", "encoder_norm.")
MAX_TOKENS = 1 << 16
NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
DAMAGE = (  # NumPy reads an array's header as Python
    OSError,
    ValueError,
    EOFError,
    RuntimeError,
    NotImplementedError,
    SyntaxError,
    TypeError,
    TokenError,
    zipfile.BadZipFile,
    zlib.error,
)
WHERE = "R50+ViT-B_16.npz of Google, or timm's vit_base_r50_s16_224.orig_in21k as .safetensors"
SUFFIXES: Mapping[str, tuple[Rule, ...]] = {".npz": tuple(NPZ), ".safetensors": tuple(TIMM)}

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Array:
    """One array of a file, of which only the shape has been read so far."""

    shape: Shape
    read: Callable[[], Tensor]


def load_encoder(model: TransUNet, path: Path) -> list[str]:
    """Give the encoder the weights of a file, and return the names in it that serve for nothing.

    Raises:
        ArtefactError: the file is missing or damaged, lacks a tensor, or is of another network.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES or not path.is_file():
        problem = "does not exist" if not path.is_file() else "cannot be read"
        raise ArtefactError(f"{path} {problem}; give the encoder's weights: {WHERE}")
    state = {name: value for name, value in model.state_dict().items() if name.startswith(ENCODER_PARTS)}
    sources = names_elsewhere(SUFFIXES[suffix], state)
    if suffix == ".npz":
        unused = _from_npz(model, state, sources, path)
    else:
        with open_safetensors(path) as file:
            arrays = {name: _lazy(file, name) for name in file.keys()}  # noqa: SIM118  # safe_open is no mapping
            unused = _fill(model, state, sources, arrays, path)
    LOG.info("%s: %d tensors of the encoder; unused: %s", path.name, len(state), ", ".join(unused) or "none")
    return unused


def _from_npz(model: TransUNet, state: Mapping[str, Tensor], sources: Mapping[str, Elsewhere], path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            arrays = {name.removesuffix(".npy"): _member(archive, name, path) for name in archive.namelist()}
            return _fill(model, state, sources, arrays, path)
    except DAMAGE as error:
        raise ArtefactError(f"{path} is no usable .npz file: {one_line(error)}") from error


def _member(archive: zipfile.ZipFile, name: str, path: Path) -> Array:
    with archive.open(name) as file:
        version = np.lib.format.read_magic(file)
        if version not in NPY_HEADERS:
            raise ArtefactError(f"{path}: {name} is of NumPy's format {version}; save it again with numpy.savez")
        shape, is_fortran, dtype = NPY_HEADERS[version](file)

    def read() -> Tensor:
        if dtype.kind != "f" or dtype.itemsize > 8:
            raise ArtefactError(f"{path}: {name} holds {dtype}; weights are floating-point numbers")
        with archive.open(name) as file:
            NPY_HEADERS[np.lib.format.read_magic(file)](file)
            content = file.read(prod(shape) * dtype.itemsize)
            file.read(1)  # at the end of a member its checksum is compared
        values = np.frombuffer(content, dtype).reshape(shape, order="F" if is_fortran else "C")
        return torch.from_numpy(np.array(values, np.float32))

    return Array(shape=tuple(shape), read=read)


def _lazy(file: Any, name: str) -> Array:
    return Array(shape=tuple(file.get_slice(name).get_shape()), read=lambda: file.get_tensor(name).float())


def _fill(
    model: TransUNet,
    state: Mapping[str, Tensor],
    sources: Mapping[str, Elsewhere],
    arrays: Mapping[str, Array],
    path: Path,
) -> list[str]:
    """Copy every array to its tensor, once all of them are known to be there and of the right shape."""
    misfit = f"{path} is no encoder of {model.spec.architecture}"
    if missing := sorted({source.name for source in sources.values()} - arrays.keys()):
        raise ArtefactError(f"{misfit}: {len(missing)} missing, {', '.join(missing[:3])}; give {WHERE}")
    assert isinstance(model.spec, ModelSpec)  # of a TransUNet
    heads = model.spec.num_heads
    for ours, source in sources.items():
        wanted, stored = _stored_shape(tuple(state[ours].shape), source.layout, heads), arrays[source.name].shape
        if not FITS.get(source.layout, _same_but_for_ones)(stored, wanted):
            raise ArtefactError(f"{misfit}: {source.name} is {stored}, but {wanted} is asked for")
    for ours, source in sources.items():
        tensor = arrays[source.name].read()
        if not is_finite(tensor):
            raise ArtefactError(f"{path}: {source.name} holds values that are not finite")
        if source.layout == "position":
            tensor = resized_positions(tensor, model.spec.grid)
        with torch.no_grad():
            state[ours].copy_(LAYOUTS[source.layout](tensor, state[ours]))
    return sorted(arrays.keys() - {source.name for source in sources.values()})


def _third(number: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Return one of the three that timm keeps in one: query, key and value."""
    return lambda stored, like: stored.unflatten(0, (3, -1))[number]


LAYOUTS: Mapping[Layout, Callable[[Tensor, Tensor], Tensor]] = {  # as stored, and a tensor like the wanted one
    "same": lambda stored, like: stored,
    "hwio": lambda stored, like: stored.permute(3, 2, 0, 1),  # height, width, in, out
    "flat": lambda stored, like: stored.reshape(like.shape),  # norms of the stem have axes of one; biases have heads
    "transposed": lambda stored, like: stored.T,  # in, out
    "heads_in": lambda stored, like: stored.reshape(len(stored), -1).T,  # in, heads, columns of a head
    "heads_out": lambda stored, like: stored.reshape(-1, stored.shape[-1]).T,  # heads, columns of a head, out
    "position": lambda stored, like: stored,
    "query": _third(0),
    "key": _third(1),
    "value": _third(2),
}


def _stored_shape(shape: Shape, layout: Layout, heads: int) -> Shape:
    """Return the shape that a tensor of ours has in the file; axes of one do not count."""
    out, *rest = shape
    if layout == "hwio":
        return (shape[2], shape[3], shape[1], shape[0])
    if layout == "transposed":
        return (rest[0], out)
    if layout == "heads_in":
        return (rest[0], heads, out // heads)
    if layout == "heads_out":
        return (heads, rest[0] // heads, out)
    if layout in ("query", "key", "value"):
        return (3 * out, *rest)
    return shape


def _same_but_for_ones(stored: Shape, wanted: Shape) -> bool:
    first, second = ([size for size in shape if size != 1] for shape in (stored, wanted))
    return first == second


def _same_count(stored: Shape, wanted: Shape) -> bool:
    return prod(stored) == prod(wanted)


def _fits_position(stored: Shape, wanted: Shape) -> bool:
    """Tell whether this is a square of tokens, perhaps with a class token, of the right width."""
    if len(stored) != 3 or stored[0] != 1 or stored[2] != wanted[2] or not 1 <= stored[1] <= MAX_TOKENS:
        return False
    return any(isqrt(count) ** 2 == count for count in (stored[1], stored[1] - 1))


def resized_positions(stored: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the embedding of a grid of tokens: the class token dropped, the square zoomed linearly, corner to corner.

    Args:
        stored: (1, tokens, width), with a class token in front or without.
        grid: rows and columns.

    Source: Beckschen/TransUNet, ``ndimage.zoom(…, order=1)``.
    """
    tokens = stored[0] if isqrt(stored.shape[1]) ** 2 == stored.shape[1] else stored[0, 1:]
    side = isqrt(len(tokens))
    if (side, side) != grid:
        LOG.info("the position embedding is resized from %d x %d tokens to %d x %d", side, side, *grid)
        square = tokens.reshape(side, side, -1).numpy()
        tokens = torch.from_numpy(ndimage.zoom(square, (grid[0] / side, grid[1] / side, 1), order=1))
    return tokens.reshape(1, grid[0] * grid[1], -1)


FITS: Mapping[Layout, Callable[[Shape, Shape], bool]] = {"position": _fits_position, "flat": _same_count}
