"""The state of a training run besides the weights, which a checkpoint holds to be resumed from."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from types import UnionType
from typing import Any

from torch import Tensor

from medseg_trt.errors import ArtefactError


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """The progress within an incomplete epoch."""

    epoch: int
    losses: tuple[float, ...]  # of the completed steps
    random_state: Mapping[str, Tensor]  # before the next step


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerState:
    """The state dictionaries of PyTorch that change with every step."""

    optimizer: Mapping[str, Any]
    scaler: Mapping[str, Any] = field(default_factory=dict[str, Any])  # of float16's gradients; empty if unused


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingState:
    """Everything besides the weights that resuming needs."""

    optimizer_state: OptimizerState
    epoch: int  # the last complete one
    progress: Progress | None = None  # in the epoch after it

    def to_dict(self) -> dict[str, Any]:
        """Return the stored form: plain data and tensors."""
        state = self.optimizer_state
        stored = {"optimizer": dict(state.optimizer), "scaler": dict(state.scaler), "epoch": self.epoch}
        return stored | ({"progress": asdict(self.progress)} if self.progress is not None else {})


FIELDS: Mapping[str, type | UnionType] = {"optimizer": dict, "scaler": dict, "epoch": int, "progress": dict | None}
PROGRESS_FIELDS: Mapping[str, type | UnionType] = {"epoch": int, "losses": tuple | list, "random_state": dict}


def parse_training_state(values: Mapping[str, Any], source: str) -> TrainingState:
    """Return the state whose stored form was read from ``source``; ``scaler`` and ``progress`` may be absent.

    Raises:
        ArtefactError: a field is missing, unknown or of the wrong type.
    """
    stored = {"scaler": {}, "progress": None, **values}
    _check_fields(stored, FIELDS, source)
    progress = stored["progress"]
    if progress is not None:
        _check_fields(progress, PROGRESS_FIELDS, source)
        progress = Progress(**{**progress, "losses": tuple(progress["losses"])})
    return TrainingState(
        optimizer_state=OptimizerState(optimizer=stored["optimizer"], scaler=stored["scaler"]),
        epoch=stored["epoch"],
        progress=progress,
    )


def _check_fields(values: Mapping[str, Any], kinds: Mapping[str, type | UnionType], source: str) -> None:
    wrong = [name for name in {**kinds, **values} if name not in kinds or name not in values]
    wrong += [name for name, kind in kinds.items() if name in values and not isinstance(values[name], kind)]
    if wrong:
        raise ArtefactError(f"{source}: the training state is damaged: {', '.join(map(repr, wrong))}")
