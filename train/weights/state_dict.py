"""Find the state dict in what others save: under a key beside other things, and with prefixes before its names.

``{"epoch": …, "model_state_dict": …}`` is PyTorch's tutorial, ``{"state_dict": …}`` Lightning and many others; names
begin with ``module.`` (DataParallel), ``_orig_mod.`` (torch.compile), ``model.`` or ``net.`` (the attribute of a class
around the network), or with several of these.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from medseg_trt.errors import ArtefactError
from medseg_trt.progress import LOG
from medseg_trt.train.weights.weight_files import is_plain

WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "network_weights", "weights")
MAX_NAMED = 8
MAX_WRAPPERS = 4  # one in the other
PREFIXES = re.compile(r"((module|_orig_mod|model|net|network)\.)+")
COMPILED = "._orig_mod."  # of a part of the network that was compiled alone
NETWORK_PARTS = ("transformer.", "decoder.", "segmentation_head.")  # how names of TransUNet and LLM4MedSeg begin
NO_CHECKPOINT = "it is no checkpoint of TransUNet or LLM4MedSeg"


def named_tensors(content: Any, path: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by the names that the network gives them.

    What is no part of the network, such as the epoch and the optimiser's state, is left out.

    Args:
        content: what ``torch.save`` has written.
        path: where it was read, for messages.

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
    """Return the innermost dictionary that lies under keys such as ``state_dict``.

    Raises:
        ArtefactError: there are two of them, or a part of the network lies beside one.
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
    """Return a name without what DataParallel, torch.compile and classes around the network put before it."""
    prefix = PREFIXES.match(key)
    return key[prefix.end() if prefix else 0 :].replace(COMPILED, ".")
