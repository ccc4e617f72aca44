"""Determine the classes from the masks if nothing names them."""

from collections.abc import Iterable

import numpy as np

from medseg_trt.errors import InputError
from medseg_trt.imaging.images import read_image, read_labels
from medseg_trt.imaging.label_values import looks_soft
from medseg_trt.progress import LOG, plural, track
from medseg_trt.spec import Classes
from medseg_trt.train.datasets.pairs import Pair

LESION = Classes(names=("background", "lesion"))
MAX_NAMED = 5


def count_classes(pairs: Iterable[Pair]) -> tuple[Classes, list[str]]:
    """Return the classes of all masks, and facts about how they are read.

    Raises:
        InputError: the values are neither consecutive from 0, nor 0 and 255, or look like soft edges.
    """
    values_of = {
        pair.mask.path: frozenset(np.unique(read_labels(pair.mask, read_image(pair.image), None)).tolist())
        for pair in track(list(pairs), "look for classes in the masks")
    }
    values = sorted(frozenset[int]().union(*values_of.values()))
    ones, brights = ([path for path, own in values_of.items() if {top} <= own <= {0, top}] for top in (1, 255))
    empty = sum(own <= {0} for own in values_of.values())
    if len(ones) + len(brights) + empty == len(values_of):
        mixed = (
            f"masks hold 0 and 1 in {plural(len(ones), 'file')} and 0 and 255 in {len(brights)}; both mean one class"
        )
        return LESION, [mixed] * bool(ones and brights)
    if looks_soft(np.array(values)):
        soft = [path for path, own in values_of.items() if not own <= {0, 1, 255}]
        raise InputError(
            f"{soft[0]} looks like 0/255 with soft edges; threshold it, or name the classes in dataset.json "
            f"({plural(len(soft), 'such mask')}, with {len(values)} values in all)"
        )
    names = ("background", *(f"class {value}" for value in range(1, max(values) + 1)))
    if missing := sorted(set(range(1, len(names))) - set(values)):
        raise InputError(
            f"the masks hold the values {_first(values)}, but not {_first(missing)}; renumber them "
            "0, 1, 2 …, or, if that is what they are, name every class in dataset.json"
        )
    LOG.info("the masks hold %d classes; name them in dataset.json", len(names) - 1)
    return Classes(names=names), []


def _first(values: list[int]) -> str:
    return ", ".join(map(str, values[:MAX_NAMED])) + (", …" if len(values) > MAX_NAMED else "")
