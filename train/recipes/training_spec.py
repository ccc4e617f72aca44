"""What a training run is made of: plain frozen data, which a recipe fills in."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from medseg_trt.metrics.protocols import METRICS
from medseg_trt.spec import InsertSpec, Preprocessing, Resize
from medseg_trt.train.datasets.options import DataOptions
from medseg_trt.train.models.external import is_external, parse_external
from medseg_trt.train.models.frozen import FROZEN_DTYPES
from medseg_trt.train.models.model import MODELS
from medseg_trt.train.recipes.augment import SHAPE_CHANGING, Step
from medseg_trt.train.recipes.loss_spec import LossSpec
from medseg_trt.train.recipes.schedules import SCHEDULES, ScheduleStep

InputScale = Literal["own", "unit", "imagenet", "unext"]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
INPUT_SCALES: Mapping[InputScale, Mapping[str, Any]] = {
    "own": {},
    "unit": {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)},
    "imagenet": {"mean": IMAGENET_MEAN, "std": IMAGENET_STD},
    "unext": {"mean": IMAGENET_MEAN, "std": tuple(255 * value for value in IMAGENET_STD)},  # divides by 255 once more
}
OPTIMIZERS = ("adamw", "adam", "sgd")
AUTOCASTS: Mapping[str, torch.dtype | None] = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


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
    schedule_step: ScheduleStep = "before"  # when the rate changes
    warmup_steps: int = 0
    max_gradient_norm: float | None = None
    max_gradient: float | None = None  # of every single value
    loss: LossSpec = field(default_factory=LossSpec)
    drop_last: bool = True  # leave out a last batch that is short, unless it is the only one
    validate_every: int = 1  # epochs
    validate_with: str = "volume"  # a key of METRICS
    best: Literal["dice", "iou", "last"] = "dice"  # what best.pt is: the highest mean, or the latest epoch
    first_of_equals: bool = False  # of equally good epochs, and then never the untrained model
    keep_epochs: tuple[int, ...] = ()  # that are also kept as epoch-N.pt
    rng: Literal["per-sample", "faithful"] = "per-sample"  # see augment.worker_steps
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
        if self.validate_with not in METRICS:
            raise ValueError(f"no metric is called {self.validate_with!r}; choose one of: {', '.join(METRICS)}")
        if self.best == "iou" and self.validate_with == "volume_transunet":
            raise ValueError("volume_transunet has no IoU; choose train.best=dice")
        if self.epochs < 0 or self.batch_size < 1 or self.validate_every < 1:
            raise ValueError("epochs must be 0 or more, batch_size and validate_every 1 or more")
        if self.seed < 0 or self.workers < 0 or self.warmup_steps < 0:
            raise ValueError("seed, workers and warmup_steps must be 0 or more")
        if self.learning_rate <= 0 or (self.slices_per_epoch is not None and self.slices_per_epoch < 1):
            raise ValueError("learning_rate must be positive, slices_per_epoch 1 or more")
        for field_name, name, known in (
            ("autocast", self.autocast, AUTOCASTS),
            ("frozen_dtype", self.frozen_dtype, FROZEN_DTYPES),
        ):
            if name not in known:
                raise ValueError(f"{field_name} cannot be {name!r}; choose one of: {', '.join(known)}")
        if not 1 <= self.accumulate <= self.batch_size:
            raise ValueError(f"accumulate is {self.accumulate}; it must be 1 … batch_size, {self.batch_size}")
        if self.save_every_steps is not None and self.save_every_steps < 1:
            raise ValueError("save_every_steps must be 1 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Everything about a training run but the data and the frozen block.

    ``insert``, ``rotary`` and ``causal`` change how an LLM-TransUNet uses its language block, and their defaults are
    the published model: ``--set insert.residual=out``, ``--set insert.weights=shuffled --set insert.seed=3``,
    ``--set insert.placement=6``, ``--set rotary=true``.

    ``input_scale`` gives ``preprocessing.mean`` and ``std`` by name: "unit" leaves 0 … 1; "imagenet" takes ImageNet's
    mean and deviation; "unext" divides the latter's result by 255, as UNeXt does; "own" is what ``preprocessing`` says.

    ``augment_at``: slices are augmented as the network takes them, or at their source's size, before they are resized;
    then ``training_resize`` is how they are resized in training alone, where the code that is followed does that
    otherwise than in its test.

    ``preprocessing.windows`` trains on random windows of slices instead of whole slices, for images that are large or
    whose details are lost by resizing: ``--set preprocessing.windows={}``. With ``train.balance_classes`` a window
    holds a pixel of the class that was drawn.

    ``pretrained``: "file" asks for the encoder's weights, ``--weights FILE``.
    """

    architecture: str  # a key of MODELS, or a network from elsewhere as in train.models.external
    preprocessing: Preprocessing
    augmentation: tuple[Step, ...] = ()
    train: TrainSpec
    insert: InsertSpec = field(default_factory=InsertSpec)
    rotary: bool = False
    causal: bool = False
    data: DataOptions = field(default_factory=DataOptions)
    input_scale: InputScale = "own"
    augment_at: Literal["network", "source"] = "network"
    training_resize: Resize | None = None
    pretrained: Literal["none", "file"] = "none"

    __pydantic_config__ = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if is_external(self.architecture):
            parse_external(self.architecture)
        elif self.architecture not in MODELS:
            raise ValueError(f"no architecture is called {self.architecture!r}; choose one of: {', '.join(MODELS)}")
        if self.insert.trainable and self.train.frozen_dtype != "fp32":
            raise ValueError(
                f"frozen_dtype={self.train.frozen_dtype} is for a block that is frozen; insert.trainable=true trains it"
            )
        own = {"mean": self.preprocessing.mean, "std": self.preprocessing.std}
        if self.input_scale != "own" and own not in (INPUT_SCALES["unit"], INPUT_SCALES[self.input_scale]):
            raise ValueError(f"input_scale={self.input_scale} sets mean and std; to give others: input_scale=own")
        if self.training_resize is not None and self.augment_at != "source":
            raise ValueError("training_resize is for slices that are augmented first: augment_at=source")
        if self.augment_at == "source" and self.preprocessing.spacing_mm is not None:
            raise ValueError("augment_at=source turns slices before they are resized; spacing_mm must be unset")
        if self.preprocessing.windows is not None:
            self._check_windows()
        turning = [step.name for step in self.augmentation if step.name in SHAPE_CHANGING]
        if turning and self.augment_at == "network" and len(set(self.preprocessing.image_size)) > 1:
            raise ValueError(f"{turning[0]} turns pictures on their side; image_size must be square")
        if self.train.rng == "faithful" and [step.name for step in self.augmentation] != ["turn_or_rotate"]:
            raise ValueError("rng=faithful repeats TransUNet's loader; augmentation must be turn_or_rotate alone")

    def _check_windows(self) -> None:
        if self.augment_at == "source":
            raise ValueError("augment_at=source augments whole slices; preprocessing.windows must be unset")
        if METRICS[self.train.validate_with].unit != "case":
            raise ValueError(
                f"{self.train.validate_with} scores masks of the network's size, and windows make none; "
                "choose train.validate_with=volume"
            )

    @property
    def contract(self) -> Preprocessing:
        """The preprocessing with the input scale that is named."""
        return replace(self.preprocessing, **INPUT_SCALES[self.input_scale])
