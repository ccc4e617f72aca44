"""The recipes by name, and the change of any field of them from the command line."""

import difflib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from medseg_trt.errors import ArtefactError, UsageError
from medseg_trt.files import parse_json, read_limited
from medseg_trt.spec import Preprocessing, from_dict, to_dict
from medseg_trt.train.models.external import allow_own_code
from medseg_trt.train.recipes.augment import Step
from medseg_trt.train.recipes.baseline_recipes import ds_transunet_polyps, swin_unet_synapse
from medseg_trt.train.recipes.demo_recipes import cells_demo, organs_demo, tumours_demo
from medseg_trt.train.recipes.paper_recipes import acdc, lesions, synapse
from medseg_trt.train.recipes.training_spec import Recipe, TrainSpec

RECIPE_FILE = "recipe.json"  # in a run folder
MAX_BYTES = 1 << 20  # of it
MAX_NEAR = 3  # names of fields, in a message about an unknown one


def folder() -> Recipe:
    """Anyone's own pictures and masks, at the paper's image size, with the full TransUNet."""
    return Recipe(
        architecture="transunet",
        preprocessing=Preprocessing(image_size=(256, 256)),
        augmentation=(Step(name="rotate90", probability=0.5), Step(name="flip", probability=0.5)),
        train=TrainSpec(
            epochs=200, batch_size=8, optimizer="adam", learning_rate=1e-4, min_learning_rate=1e-5, weight_decay=1e-4
        ),
    )


RECIPES: Mapping[str, Callable[[], Recipe]] = {
    "folder": folder,
    "organs-demo": organs_demo,
    "tumours-demo": tumours_demo,
    "cells-demo": cells_demo,
    "isic2017": partial(lesions, "isic2017"),
    "busi": partial(lesions, "busi"),
    "clinicdb": partial(lesions, "clinicdb"),
    "colondb": partial(lesions, "colondb"),
    "synapse": synapse,
    "acdc": acdc,
    "swin-unet-synapse": swin_unet_synapse,
    "ds-transunet-polyps": ds_transunet_polyps,
}


def recipe(name: str, changes: Sequence[str] = ()) -> Recipe:
    """Return a named recipe with fields changed.

    Args:
        name: a key of ``RECIPES``.
        changes: ``field=value`` or ``part.field=value``; a value is JSON, or plain text where it is not JSON.

    Raises:
        UsageError: no such recipe or field, or a value that it cannot take.
    """
    if name not in RECIPES:
        raise UsageError(f"no recipe is called {name!r}; choose one of: {', '.join(RECIPES)}")
    fields = to_dict(RECIPES[name]())
    for change in changes:
        path, equals, value = change.partition("=")
        if not equals:
            raise UsageError(f"--set {change}: write it as field=value, for example train.epochs=5")
        *parents, last = path.split(".")
        part: Any = fields
        for parent in parents:
            part = part.get(parent) if isinstance(part, dict) else None
        if not isinstance(part, dict) or last not in part:
            near = difflib.get_close_matches(path, list(_paths(fields)), MAX_NEAR, 0.5)
            near = near or [name for name in _paths(fields) if last in name][:MAX_NEAR] or list(fields)
            raise UsageError(f"--set {change}: there is no field {path}; the nearest are: {', '.join(near)}")
        part[last] = _value(value)
    try:
        chosen = from_dict(Recipe, fields, "--set " + " ".join(changes))
    except ArtefactError as error:
        raise UsageError(str(error)) from error
    allow_own_code(chosen.architecture)  # the user has typed it
    return chosen


def _paths(fields: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the full names of all fields that ``--set`` changes."""
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from _paths(cast("dict[str, Any]", value), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def recorded_recipe(run: Path) -> Recipe:
    """Return the recipe that a run was started with.

    Raises:
        UsageError: the folder holds no run.
        ArtefactError: the file is damaged.
    """
    path = run / RECIPE_FILE
    if not path.is_file():
        raise UsageError(
            f"{run} holds no run to resume; start one: medseg-trt train --recipe folder --data DIR -o {run}"
        )
    return from_dict(Recipe, parse_json(path, read_limited(path, MAX_BYTES)), str(path))


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
