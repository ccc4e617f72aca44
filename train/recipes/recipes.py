"""The recipes by name, and the change of any field of them from the command line."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from medseg_trt.errors import ArtefactError, UsageError
from medseg_trt.spec import Preprocessing, from_dict, to_dict
from medseg_trt.train.augment import Step
from medseg_trt.train.recipes.demo_recipes import organs_demo, tumours_demo
from medseg_trt.train.recipes.paper_recipes import acdc, lesions, synapse
from medseg_trt.train.recipes.training_spec import Recipe, TrainSpec


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
    "isic2017": partial(lesions, "isic2017"),
    "busi": partial(lesions, "busi"),
    "clinicdb": partial(lesions, "clinicdb"),
    "colondb": partial(lesions, "colondb"),
    "synapse": synapse,
    "acdc": acdc,
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
            choices = ", ".join(part) if isinstance(part, dict) else ", ".join(fields)
            raise UsageError(f"--set {change}: there is no field {path}; choose one of: {choices}")
        part[last] = _value(value)
    try:
        return from_dict(Recipe, fields, "--set " + " ".join(changes))
    except ArtefactError as error:
        raise UsageError(str(error)) from error


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
