"""Read the authors' checkpoints of Swin-UNet, DS-TransUNet and U-Net, whose names ours have as well.

Buffers that follow from the architecture are compared with ours and left out. Nothing is left out in silence: a tensor
that is missing, unknown or of another shape is an error, where the authors' own loaders go on.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from math import isqrt
from pathlib import Path

import torch
from torch import Tensor

from medseg_trt.errors import ArtefactError, UsageError
from medseg_trt.network_spec import NetworkSpec
from medseg_trt.networks import DSTransUNetSpec, SwinUNetSpec
from medseg_trt.progress import LOG
from medseg_trt.spec import Preprocessing
from medseg_trt.train.models.model import build_model, model_spec
from medseg_trt.train.models.swin import relative_positions, shift_mask
from medseg_trt.train.tensor_files.state_dict import NO_CHECKPOINT
from medseg_trt.train.weights.matching import matching_tensor, require_same_names

State = Mapping[str, Tensor]

HEADS: Mapping[str, str] = {  # a network -> the tensor that is of no other, whose first axis are the classes
    "swin-unet": "output.weight",
    "ds-transunet-b": "final.weight",
    "unet": "Conv_1x1.weight",
    "unet-t": "outc.conv.weight",
}
INDEX, MASK = ".attn.relative_position_index", ".attn_mask"
TABLE = "layers.0.blocks.0.attn.relative_position_bias_table"
SHIFTED = "layers.0.blocks.1.attn_mask"
STEM = "encoder.patch_embed.proj.weight"
LARGE_WIDTH = 192  # of ds-transunet-l
AUXILIARY = ("loss1.", "loss2.")
OLD_BIAS = re.compile(r"(.*\.double_conv\.)([03])\.bias")  # of milesial's code before 2021
NEST_OF_UNETS = {"Conv.weight": "Conv_1x1.weight", "Conv.bias": "Conv_1x1.bias"}


def baseline_in(state: State) -> str | None:
    """Return which network a state dict is of, a key of ``MODELS``; None: of none that has the authors' names."""
    names = {NEST_OF_UNETS.get(name, name) for name in state}
    network = next((name for name, head in HEADS.items() if head in names), None)
    stem = state.get(STEM)
    if network == "ds-transunet-b" and stem is not None and stem.dim() == 4 and stem.shape[0] == LARGE_WIDTH:
        return "ds-transunet-l"
    return network


def baseline_spec(
    state: State,
    network: str,
    architecture: str | None,
    image_size: tuple[int, int] | None,
    contract: Preprocessing,
    path: Path,
) -> NetworkSpec:
    """Return the architecture of a state dict.

    Args:
        state: by published names.
        network: as ``baseline_in`` returned it.
        architecture: a key of ``MODELS`` with other sizes than the published ones.
        image_size: height and width; None: Swin-UNet's follows from its windows, the others' is the contract's.
        contract: how images were prepared.
        path: for messages.

    Raises:
        ArtefactError: the tensors that decide are missing or have other axes.
        UsageError: the network cannot have the image size.
    """
    head = state.get(HEADS.get(network, HEADS["ds-transunet-b"]), state.get("Conv.weight"))
    if head is None or head.dim() != 4:
        raise ArtefactError(f"{path} has no convolution that ends the network; {NO_CHECKPOINT}")
    chosen, classes = architecture or network, len(head)
    if network != "swin-unet":
        if image_size is None:
            LOG.warning(
                "the weights do not tell the image size; it is taken to be %d x %d: --image-size", *contract.image_size
            )
        return model_spec(chosen, image_size or contract.image_size, classes)
    window = _window(state, path)
    size = image_size or _swin_image_size(state, window)
    spec = model_spec(chosen, size, classes)
    if isinstance(spec, SwinUNetSpec) and spec.window_of(0) != window:
        try:
            return replace(spec, window=window)
        except ValueError as error:
            raise UsageError(f"{path} was trained with windows of {window} tokens: {error}") from error
    return spec


def baseline_weights(
    state: State, spec: NetworkSpec, path: Path, *, keep_auxiliary: bool
) -> tuple[dict[str, Tensor], NetworkSpec]:
    """Return all that a checkpoint of ours holds, and its architecture, once every tensor has its place.

    Args:
        state: by published names.
        spec: the architecture.
        path: for messages.
        keep_auxiliary: keep the heads of deep supervision, where there are any.

    Raises:
        ArtefactError: a tensor is missing, unknown, of another shape, not finite, or a buffer is not ours.
    """
    if spec.block is not None:
        raise ArtefactError(f"{path} holds no language insert; {spec.architecture} is another network")
    state = _with_our_names(state)
    if isinstance(spec, DSTransUNetSpec):
        has_auxiliary = any(name.startswith(AUXILIARY) for name in state)
        if has_auxiliary and not keep_auxiliary:
            LOG.info("%s: the auxiliary heads are left out", path)
            state = {name: tensor for name, tensor in state.items() if not name.startswith(AUXILIARY)}
        spec = replace(spec, deep_supervision=has_auxiliary and keep_auxiliary)
    with torch.device("meta"):
        likes = build_model(spec).state_dict()
    buffers = (INDEX, MASK) if isinstance(spec, SwinUNetSpec) else INDEX  # DS-TransUNet's masks are in no file
    computed = {name for name in state if name.endswith(buffers)}
    require_same_names(
        sorted(likes.keys() - state.keys()), sorted(state.keys() - likes.keys() - computed), spec.architecture, path
    )
    for name in sorted(computed):
        _require_ours(state[name], name, spec, path)
    return {
        name: matching_tensor(state[name], like, name, spec.architecture, path) for name, like in likes.items()
    }, spec


def _with_our_names(state: State) -> dict[str, Tensor]:
    """Return a U-Net of Nest-of-Unets, or of milesial's older code, as the newer code would have it."""
    renamed = {NEST_OF_UNETS.get(name, name): tensor for name, tensor in state.items()}
    for name in list(renamed):
        if (match := OLD_BIAS.fullmatch(name)) is not None:
            mean = f"{match[1]}{int(match[2]) + 1}.running_mean"
            if mean in renamed and renamed[mean].shape == renamed[name].shape:  # BatchNorm takes the mean off again
                renamed[mean] = renamed[mean] - renamed.pop(name)
    return renamed


def _window(state: State, path: Path) -> int:
    table = state.get(TABLE)
    rows = len(table) if table is not None and table.dim() == 2 else 0
    side = isqrt(rows)
    if side * side != rows or side % 2 == 0:
        raise ArtefactError(f"{path} has no {TABLE} of a square window; {NO_CHECKPOINT}")
    return (side + 1) // 2


def _swin_image_size(state: State, window: int) -> tuple[int, int]:
    """Return the square that the mask of the first stage is of, or else that whose last stage is one window."""
    mask = state.get(SHIFTED)
    across = isqrt(len(mask)) if mask is not None and mask.dim() == 3 else 8
    return 4 * window * across, 4 * window * across


def _require_ours(stored: Tensor, name: str, spec: NetworkSpec, path: Path) -> None:
    """Refuse a buffer that would make the network another one; masks of another image size are recomputed."""
    window = isqrt(stored.shape[-1]) if stored.dim() else 0
    square = (window**2, window**2)
    if name.endswith(INDEX):
        same = tuple(stored.shape) == square and torch.equal(stored, relative_positions(window))
    else:
        rows, columns = _mask_grid(name, spec)
        cut = (rows // max(window, 1)) * (columns // max(window, 1))
        same = rows > 0
        if same and tuple(stored.shape) == (cut, *square) and not (rows % window or columns % window):
            same = torch.equal(stored.float(), shift_mask((rows, columns), window, window // 2))
    if not same:
        raise ArtefactError(f"{path}: {name} is not what {spec.architecture} computes; it is another network")


def _mask_grid(name: str, spec: NetworkSpec) -> tuple[int, int]:
    """Return rows and columns of the map that a mask of Swin-UNet is of; no rows where its name is of no stage."""
    stage = re.match(r"layers(_up)?\.([0-3])\.", name)
    if stage is None or not isinstance(spec, SwinUNetSpec):
        return 0, 0
    return spec.grid_of(3 - int(stage[2]) if stage[1] else int(stage[2]))
