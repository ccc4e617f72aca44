"""Learning-rate schedules: functions of the completed fraction of a training run."""

import math
from collections.abc import Callable, Mapping
from typing import Literal

ScheduleStep = Literal["before", "after", "epoch"]
Schedule = Callable[[float], float]  # completed fraction after warm-up, 0 … 1 -> factor of the learning rate


def cosine(done: float) -> float:
    """Fall from 1 to 0 along half a cosine."""
    return 0.5 * (1 + math.cos(math.pi * done))


def poly(done: float) -> float:
    """Fall as in TransUNet: ``(1 - done) ** 0.9``."""
    return (1 - done) ** 0.9


def constant(done: float) -> float:
    """Stay at 1."""
    return 1.0


def cosine_five_times(done: float) -> float:
    """Fall, climb, fall, climb and fall along half a cosine each: PyTorch's cosine annealing, never restarted."""
    return 0.5 * (1 + math.cos(5 * math.pi * done))


SCHEDULES: Mapping[str, Schedule] = {
    "cosine": cosine,
    "cosine_five_times": cosine_five_times,
    "poly": poly,
    "constant": constant,
}


def learning_rate(step: int, total_steps: int, *, schedule: str, peak: float, floor: float, warmup_steps: int) -> float:
    """Return the learning rate of one optimiser step.

    Args:
        step: the next step, counted from 0.
        total_steps: number of steps of the run.
        schedule: a key of ``SCHEDULES``.
        peak: the rate after warm-up.
        floor: the final rate.
        warmup_steps: number of steps with a linear increase from ``peak / warmup_steps`` to ``peak``.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return floor + (peak - floor) * SCHEDULES[schedule](done)


def scheduled_step(step: int, steps_per_epoch: int, when: ScheduleStep) -> int:
    """Return the step whose learning rate an optimiser step uses.

    Args:
        step: the next step, counted from 0.
        steps_per_epoch: number of steps of an epoch.
        when: "before": the step itself. "after": the previous step, so that the first two steps have the same rate
            (Beckschen/TransUNet ``trainer.py``). "epoch": the first step of the epoch.
    """
    return {"before": step, "after": max(step - 1, 0), "epoch": step - step % steps_per_epoch}[when]
