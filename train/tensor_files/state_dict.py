"""Find the state dict in checkpoints of other programs: under a key, and with prefixes before its names.

``{"epoch": …, "model_state_dict": …}`` is PyTorch's tutorial, ``{"state_dict": …}`` Lightning and many others; names
begin with ``module.`` (DataParallel), ``_orig_mod.`` (torch.compile), ``model.``, ``net.`` or ``swin_unet.`` (the
attribute of a class around the network), or with several of these.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from medseg_trt.errors import ArtefactError
from medseg_trt.progress import LOG
from medseg_trt.train.tensor_files.weight_files import is_plain

WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "network_weights", "weights")
MAX_NAMED = 8
MAX_WRAPPERS = 4  # nested
PREFIXES = re.compile(r"((module|_orig_mod|model|net|network|swin_unet)\.)+")
COMPILED = "._orig_mod."  # of a part of the network that was compiled alone
NETWORK_PARTS = (  # how names begin
    *("transformer.", "decoder.", "segmentation_head."),  # of TransUNet and LLM4MedSeg
    *("patch_embed.", "layers.", "layers_up.", "concat_back_dim.", "norm.", "norm_up.", "up.", "output."),  # Swin-UNet
    *("encoder.", "encoder2.", "cross_att_", "change", "final.", "loss1.", "loss2."),  # DS-TransUNet
    *("Conv1.", "Conv2.", "Conv3.", "Conv4.", "Conv5.", "Conv_1x1.", "Up_conv", "inc.", "outc."),  # U-Net
)
NO_CHECKPOINT = "it is no checkpoint of TransUNet, LLM4MedSeg, Swin-UNet, DS-TransUNet or U-Net"


def named_tensors(content: Any, path: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by the network's names.

    Other content, such as the epoch and the optimiser's state, is omitted.

    Args:
        content: as ``torch.save`` wrote it.
        path: of the file, for messages.

    Raises:
        ArtefactError: there are no named tensors, several state dicts, or a part of the network is no tensor.
    """
    entries = _unwrapped(content, path)
    if not entries or not all(isinstance(key, str) for key in entries):
        raise ArtefactError(f"{path} holds no named tensors; {NO_CHECKPOINT}")
    state: dict[str, Tensor] = {}
    others: list[str] = []
    for key, value in entries.items():
        name = _published(key)
        if not isinstance(value, Tensor) and not name.startswith(NETWORK_PARTS):
            others.append(key)  # an epoch, a score or an optimiser
            continue
        if not is_plain(value):
            raise ArtefactError(f"{path}: {key} is no plain tensor with all its values in the file")
        if name in state:
            raise ArtefactError(f"{path} holds a tensor twice, {name}, with different prefixes; save one model alone")
        state[name] = value
    if not state:
        raise ArtefactError(f"{path} holds no named tensors; {NO_CHECKPOINT}")
    if others:
        LOG.info("%s: left out beside the weights: %s", path, ", ".join(others[:MAX_NAMED]))
    return state


def _unwrapped(content: Any, path: Path) -> Mapping[Any, Any]:
    """Return the innermost dictionary under keys such as ``state_dict``.

    Raises:
        ArtefactError: two dictionaries, or a part of the network beside one.
    """
    for _ in range(MAX_WRAPPERS):
        if not isinstance(content, dict):
            break
        inside = [key for key in WRAPPERS if isinstance(content.get(key), dict)]
        if not inside:
            return content
        beside = [key for key in content if isinstance(key, str) and _published(key).startswith(NETWORK_PARTS)]
        if len(inside) > 1 or beside:
            raise ArtefactError(
                f"{path} holds weights under {' and '.join([*inside, *beside[:1]])}; save one of them alone: "
                f'torch.save(checkpoint["{inside[0]}"], "FILE")'
            )
        if others := [str(key) for key in content if key not in inside]:
            LOG.info("%s: the weights are those under %s; left out: %s", path, inside[0], ", ".join(others[:MAX_NAMED]))
        content = content[inside[0]]
    raise ArtefactError(f"{path} holds no named tensors; {NO_CHECKPOINT}")


def _published(key: str) -> str:
    """Return a name without the prefixes of DataParallel, torch.compile and wrapper classes."""
    prefix = PREFIXES.match(key)
    return key[prefix.end() if prefix else 0 :].replace(COMPILED, ".")
