"""How a model is trained: named recipes as functions, and the change of any field of them from the command line."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from medseg_trt.errors import ArtefactError, UsageError
from medseg_trt.spec import InsertSpec, Preprocessing, from_dict, to_dict
from medseg_trt.train.augment import Step
from medseg_trt.train.datasets.options import DataOptions
from medseg_trt.train.engine import AUTOCASTS
from medseg_trt.train.frozen import FROZEN_DTYPES
from medseg_trt.train.model import MODELS
from medseg_trt.train.schedules import SCHEDULES

OPTIMIZERS = ("adamw", "adam", "sgd")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSpec:
    """The numbers of a training run."""

    epochs: int = 100
    batch_size: int = 8
    slices_per_epoch: int | None = None  # None: every slice once
    balance_classes: bool = False  # draw a class first, then a slice that holds it
    optimizer: str = "adamw"  # one of OPTIMIZERS
    learning_rate: float = 1e-3
    min_learning_rate: float = 0.0
    momentum: float = 0.9  # of sgd
    weight_decay: float = 1e-2
    schedule: str = "cosine"  # a key of SCHEDULES
    warmup_steps: int = 0
    max_gradient_norm: float | None = None
    validate_every: int = 1  # epochs
    seed: int = 1234
    workers: int = 0  # processes that load data beside the main one
    autocast: str = "no"  # a key of AUTOCASTS: what a training step computes in
    frozen_dtype: str = "fp32"  # a key of FROZEN_DTYPES: what the frozen block is kept and computed in while training
    accumulate: int = 1  # micro-batches that a batch is computed in, one after the other
    save_every_steps: int | None = None  # also write last.pt in the middle of an epoch

    __pydantic_config__ = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"no optimiser is called {self.optimizer!r}; choose one of: {', '.join(OPTIMIZERS)}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"no schedule is called {self.schedule!r}; choose one of: {', '.join(SCHEDULES)}")
        if self.epochs < 0 or self.batch_size < 1 or self.validate_every < 1:
            raise ValueError("epochs must be 0 or more, batch_size and validate_every 1 or more")
        if self.seed < 0 or self.workers < 0 or self.warmup_steps < 0:
            raise ValueError("seed, workers and warmup_steps must be 0 or more")
        if self.learning_rate <= 0 or (self.slices_per_epoch is not None and self.slices_per_epoch < 1):
            raise ValueError("learning_rate must be positive, slices_per_epoch 1 or more")
        for what, name, known in (
            ("autocast", self.autocast, AUTOCASTS), ("frozen_dtype", self.frozen_dtype, FROZEN_DTYPES)
        ):  # fmt: skip
            if name not in known:
                raise ValueError(f"{what} cannot be {name!r}; choose one of: {', '.join(known)}")
        if not 1 <= self.accumulate <= self.batch_size:
            raise ValueError(f"accumulate is {self.accumulate}; it must be 1 … batch_size, {self.batch_size}")
        if self.save_every_steps is not None and self.save_every_steps < 1:
            raise ValueError("save_every_steps must be 1 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Everything about a training run but the data and the frozen block.

    The fields from ``insert`` on change how an LLM-TransUNet uses its language block, and their defaults are the
    published model: ``--set insert.residual=out``, ``--set insert.weights=shuffled --set insert.seed=3``,
    ``--set insert.placement=6``, ``--set rotary=true``.
    """

    architecture: str  # a key of MODELS
    preprocessing: Preprocessing
    augmentation: tuple[Step, ...] = ()
    train: TrainSpec
    insert: InsertSpec = field(default_factory=InsertSpec)
    rotary: bool = False
    causal: bool = False
    data: DataOptions = field(default_factory=DataOptions)

    __pydantic_config__ = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if self.architecture not in MODELS:
            raise ValueError(f"no architecture is called {self.architecture!r}; choose one of: {', '.join(MODELS)}")
        if self.insert.trainable and self.train.frozen_dtype != "fp32":
            raise ValueError(
                f"frozen_dtype={self.train.frozen_dtype} is for a block that is frozen; insert.trainable=true trains it"
            )


def organs_demo() -> Recipe:
    """Abdominal organs on CT slices of 3 mm pixels, in minutes on two CPU cores.

    No mirroring: it would turn a left kidney into a right one. Classes are drawn evenly, since most slices hold none of
    the small organs; 128 x 128 pixels make 64 tokens.
    """
    return Recipe(
        architecture="llm-transunet-small",
        preprocessing=Preprocessing(image_size=(128, 128), window=(-125.0, 275.0), spacing_mm=3.0),
        augmentation=(
            Step(name="affine", options={"degrees": 15.0, "scale": 1.25, "shift": 0.09}),
            Step(name="intensity", options={"gamma": 1.35, "contrast": 1.18, "brightness": 0.25}),
            Step(name="noise", probability=0.5, options={"deviation": 0.2}),
        ),
        train=TrainSpec(
            epochs=10, batch_size=8, slices_per_epoch=400, balance_classes=True, learning_rate=1e-3, weight_decay=1e-2,
            min_learning_rate=1e-5, warmup_steps=50, max_gradient_norm=1.0,
        ),
    )  # fmt: skip


def tumours_demo() -> Recipe:
    """One tumour in MR or CT against everything else, in minutes on two CPU cores.

    Half of the slices that are drawn at the least hold the tumour; in the training scans a fifth does. A fixed window
    serves both kinds: in CT, -200 … 1200 Hounsfield units cut off air and lung; in MR the unit is arbitrary, and a scan
    of small numbers comes out dark. The stem's kernels have a mean of zero and its norms divide by the spread, so that
    the network sees little of a slice's level and contrast; ``intensity`` changes them further. Slices are stretched to
    the image: the smallest scan would be 12 x 32 of the pixels of 2.5 mm that the largest needs.
    """
    return Recipe(
        architecture="llm-transunet-small",
        preprocessing=Preprocessing(image_size=(128, 128), window=(-200.0, 1200.0)),
        augmentation=(
            Step(name="flip", probability=0.5),
            Step(name="affine", options={"degrees": 30.0, "scale": 1.4, "shift": 0.15}),
            Step(name="intensity", options={"gamma": 1.5, "contrast": 1.5, "brightness": 0.5}),
            Step(name="noise", probability=0.5, options={"deviation": 0.2}),
        ),
        train=TrainSpec(
            epochs=10, batch_size=8, slices_per_epoch=400, balance_classes=True, learning_rate=1e-3, weight_decay=1e-2,
            min_learning_rate=1e-5, warmup_steps=50, max_gradient_norm=1.0,
        ),
    )  # fmt: skip


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
