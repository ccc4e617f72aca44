"""Compare the tensors of a foreign checkpoint with those of a network, and take them once all of them fit."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from medseg_trt.errors import ArtefactError, UsageError
from medseg_trt.progress import LOG
from medseg_trt.spec import Classes
from medseg_trt.train.datasets import acdc
from medseg_trt.train.datasets.mask_classes import LESION
from medseg_trt.train.datasets.synapse import ORGANS
from medseg_trt.train.tensor_files.weight_files import is_finite

NAMED = 4  # keys in a message
OTHER_SIZE = "it is a network of another size; give its --architecture if it is one of those that train builds"
USUAL_CLASSES = (Classes(names=ORGANS["transunet"]), acdc.CLASSES, LESION)  # of the data sets that the authors used


def named_classes(classes: Classes | None, num_logits: int, path: Path) -> Classes:
    """Return the classes of a network, by default those of the authors' data set with as many, or else numbers.

    Raises:
        UsageError: the classes that are given are more or fewer.
    """
    if classes is None:
        usual = next((classes for classes in USUAL_CLASSES if classes.num_logits == num_logits), None)
        if usual is not None:
            LOG.warning("the classes are taken to be %s; if not, --classes", ", ".join(usual.names))
            return usual
        LOG.warning("the classes have no names; give them, the background first: --classes background,liver,…")
        count = max(num_logits, 2)
        return Classes(names=("background", *(f"class {label}" for label in range(1, count))))
    if classes.num_logits != num_logits:
        raise UsageError(
            f"{path} answers with {num_logits} logit(s), but {len(classes.names)} classes need {classes.num_logits}; "
            "count the background as a class"
        )
    return classes


def require_same_names(missing: Sequence[str], unknown: Sequence[str], architecture: str, path: Path) -> None:
    """Refuse a file that lacks tensors of a network or has others.

    Raises:
        ArtefactError: there are any.
    """
    if missing or unknown:
        parts = [
            f"{len(names)} {problem}: {', '.join(names[:NAMED])}{' …' if len(names) > NAMED else ''}"
            for problem, names in (("missing", missing), ("unknown", unknown))
            if names
        ]
        raise ArtefactError(f"{path} is no checkpoint of {architecture}: {'; '.join(parts)}")


def matching_tensor(
    stored: Tensor, like: Tensor, name: str, architecture: str, path: Path, remedy: str | None = None
) -> Tensor:
    """Return a stored tensor in the type of ours.

    Raises:
        ArtefactError: it has another shape, which ``remedy`` helps against, or values that are not finite.
    """
    if stored.shape != like.shape:
        raise ArtefactError(
            f"{path}: {name} is {tuple(stored.shape)}, but that of {architecture} is {tuple(like.shape)}; "
            f"{remedy or OTHER_SIZE}"
        )
    if not is_finite(stored):
        raise ArtefactError(f"{path}: {name} holds values that are not finite")
    return stored.to(like.dtype)
