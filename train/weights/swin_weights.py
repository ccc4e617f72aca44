"""Start Swin-UNet and DS-TransUNet from Swin transformers that were trained on ImageNet, as the authors' loaders do.

Swin-UNet takes ``swin_tiny_patch4_window7_224.pth`` twice: for the encoder, of whose third stage it has only the first
two blocks, and once more for the decoder's blocks, stage 3 - i from stage i. DS-TransUNet takes a Swin-B (or Swin-L)
for the first encoder and Swin-T for the second, whose patches are larger, so that their projection stays random. Bias
tables of another window are resized per head (bicubic), which DS-TransUNet's loader does too; Swin-UNet's leaves them
random. Nothing is left out in silence: what is not loaded is logged, and what does not fit is refused.

Files are microsoft/Swin-Transformer's ``.pth``, or timm's ``.safetensors`` of the same networks, where merging is the
first thing of a stage instead of the last.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from math import isqrt
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from medseg_trt.errors import ArtefactError, UsageError
from medseg_trt.progress import LOG
from medseg_trt.train.models.ds_transunet import DSTransUNet, SwinEncoder
from medseg_trt.train.models.segmentation_model import SegmentationModel
from medseg_trt.train.models.swin_unet import SwinUNet
from medseg_trt.train.models.transunet import TransUNet
from medseg_trt.train.tensor_files.state_dict import named_tensors
from medseg_trt.train.tensor_files.weight_files import is_finite, load_pickled, open_safetensors
from medseg_trt.train.weights.pretrained import load_encoder

TABLE = "relative_position_bias_table"
COMPUTED = re.compile(r".*\.(relative_position_index|attn_mask)")
TIMM_MERGING = re.compile(r"^layers\.(\d)\.downsample\.")
STEM = "patch_embed.proj.weight"
SWIN_T = "swin_tiny_patch4_window7_224.pth"
SWIN_B = "swin_base_patch4_window7_224_22k.pth"


def load_initial(model: SegmentationModel, files: Sequence[Path]) -> list[str]:
    """Give a network the weights that a recipe starts from, and return the names in the files that serve for nothing.

    Raises:
        ArtefactError: a file is missing or damaged, lacks a tensor, or is of another network.
        UsageError: the network takes no such files, or another number of them.
    """
    for kind, load in LOADERS.items():
        if isinstance(model, kind):
            return load(model, files)
    raise UsageError(
        f"{model.spec.architecture} starts from random weights: leave --weights out, --set pretrained=none"
    )


def _load_transunet(model: TransUNet, files: Sequence[Path]) -> list[str]:
    (path,) = _require_count(files, 1, "R50+ViT-B_16.npz")
    return load_encoder(model, path)


def _load_swin_unet(model: SwinUNet, files: Sequence[Path]) -> list[str]:
    (path,) = _require_count(files, 1, SWIN_T)
    sources: dict[str, str] = {}
    for name in model.state_dict():
        decoder = re.match(r"layers_up\.([1-3])\.(blocks\..+)", name)
        if decoder is not None:
            sources[name] = f"layers.{3 - int(decoder[1])}.{decoder[2]}"
        elif name.startswith(("patch_embed.", "layers.", "norm.")):
            sources[name] = name
    return _fill(model, sources, read_swin(path), path, model.spec.architecture)


def _load_ds_transunet(model: DSTransUNet, files: Sequence[Path]) -> list[str]:
    states = [(path, read_swin(path)) for path in _require_count(files, 2, f"{SWIN_B} and {SWIN_T}")]
    widths = [len(state[STEM]) for _, state in states]
    encoders = (model.encoder, model.encoder2)
    if widths[0] < widths[1]:
        states.reverse()
    unused: list[str] = []
    for encoder, (path, state) in zip(encoders, states, strict=True):
        unused += _fill(encoder, _ds_places(encoder, state), state, path, model.spec.architecture)
    return unused


def _ds_places(encoder: SwinEncoder, state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return what of an encoder is in a file: not the norms of the stages, nor the projection of larger patches."""
    own = encoder.state_dict()
    names = [name for name in own if not re.match(r"norm\d\.", name)]
    return {name: name for name in names if name != STEM or own[STEM].shape[2:] == state[STEM].shape[2:]}


LOADERS: Mapping[type[SegmentationModel], Callable[..., list[str]]] = {
    TransUNet: _load_transunet,
    SwinUNet: _load_swin_unet,
    DSTransUNet: _load_ds_transunet,
}


def read_swin(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a Swin transformer under Microsoft's names, without what can be computed.

    Raises:
        ArtefactError: the file is missing or damaged, or of another network.
    """
    if not path.is_file():
        raise ArtefactError(f"{path} does not exist; give a Swin transformer: {SWIN_T}, or timm's .safetensors")
    if path.suffix.lower() == ".safetensors":
        with open_safetensors(path) as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # safe_open is no mapping
    else:
        state = named_tensors(load_pickled(path, "Swin transformer"), path)
    if STEM not in state or state[STEM].dim() != 4:
        raise ArtefactError(f"{path} has no {STEM} with 4 axes; it is no Swin transformer: {SWIN_T}")
    if "layers.3.downsample.norm.weight" in state:  # timm's: of stage i + 1, what is of stage i elsewhere
        state = {
            re.sub(
                r"^layers\.(\d)\.downsample\.", lambda match: f"layers.{int(match[1]) - 1}.downsample.", name
            ): tensor
            for name, tensor in state.items()
        }
    return {name: tensor for name, tensor in state.items() if not COMPUTED.fullmatch(name)}


def _one_stage_earlier(match: re.Match[str]) -> str:
    return f"layers.{int(match[1]) - 1}.downsample."


def resized_table(table: Tensor, rows: int) -> Tensor:
    """Return the bias table of another window: every head's square, resized with bicubic interpolation.

    Args:
        table: (offsets, heads), the offsets those of a square window.
        rows: offsets of the other window.

    Source: microsoft/Swin-Transformer ``utils.py``, ``load_pretrained``.
    """
    side, target = isqrt(len(table)), isqrt(rows)
    squares = table.float().T.reshape(1, -1, side, side)
    resized = F.interpolate(squares, size=(target, target), mode="bicubic")
    return resized.flatten(2)[0].T


def _fill(
    module: torch.nn.Module, sources: Mapping[str, str], state: Mapping[str, Tensor], path: Path, architecture: str
) -> list[str]:
    """Copy every tensor to its place, once all of them are known to fit, and return the names that were not used."""
    own = module.state_dict()
    if missing := sorted(set(sources.values()) - state.keys()):
        raise ArtefactError(f"{path} is no encoder of {architecture}: {len(missing)} missing, {', '.join(missing[:3])}")
    taken: dict[str, Tensor] = {}
    for ours, theirs in sources.items():
        tensor, like = state[theirs], own[ours]
        if ours.endswith(TABLE) and tensor.dim() == 2 and isqrt(len(tensor)) ** 2 == len(tensor) > 0:
            tensor = tensor if tensor.shape == like.shape else resized_table(tensor, len(like))
        if tensor.shape != like.shape:
            raise ArtefactError(
                f"{path} is no encoder of {architecture}: {theirs} is {tuple(state[theirs].shape)}, "
                f"but {tuple(like.shape)} is asked for"
            )
        if not is_finite(tensor):
            raise ArtefactError(f"{path}: {theirs} holds values that are not finite")
        taken[ours] = tensor
    resized = sum(ours.endswith(TABLE) and taken[ours] is not state[theirs] for ours, theirs in sources.items())
    if resized:
        LOG.info("%s: %d bias tables are resized to the network's windows", path.name, resized)
    with torch.no_grad():
        for ours, tensor in taken.items():
            own[ours].copy_(tensor)
    random = sorted(own.keys() - sources.keys())
    unused = sorted(state.keys() - set(sources.values()))
    LOG.info("%s: %d tensors; random: %s", path.name, len(sources), ", ".join(random) or "none")
    LOG.info("%s: unused: %s", path.name, ", ".join(unused) or "none")
    return unused


def _require_count(files: Sequence[Path], count: int, names: str) -> Sequence[Path]:
    if len(files) != count:
        raise UsageError(f"{len(files)} file(s) of weights, but {count} are needed: {names}; repeat --weights for each")
    return files
