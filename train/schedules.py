"""How the learning rate changes over a training run; a schedule is a function of the share of the run that is done."""

import math
from collections.abc import Callable, Mapping
from typing import Literal

ScheduleStep = Literal["before", "after", "epoch"]
Schedule = Callable[[float], float]  # 0 … 1 of the run after warm-up -> factor on the learning rate


def cosine(done: float) -> float:
    """Fall along half a cosine from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * done))


def poly(done: float) -> float:
    """Fall as TransUNet does: ``(1 - done) ** 0.9``."""
    return (1 - done) ** 0.9


def constant(done: float) -> float:
    """Stay at 1."""
    return 1.0


SCHEDULES: Mapping[str, Schedule] = {"cosine": cosine, "poly": poly, "constant": constant}


def learning_rate(step: int, total_steps: int, *, schedule: str, peak: float, floor: float, warmup_steps: int) -> float:
    """Return the learning rate of one optimiser step.

    Args:
        step: the step about to be taken, counted from 0.
        total_steps: how many there are in the whole run.
        schedule: a key of ``SCHEDULES``.
        peak: the rate after warm-up.
        floor: the rate that the schedule falls to.
        warmup_steps: how many steps climb in equal parts from ``peak / warmup_steps`` to ``peak``.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return floor + (peak - floor) * SCHEDULES[schedule](done)


def scheduled_step(step: int, steps_per_epoch: int, when: ScheduleStep) -> int:
    """Return the step whose rate an optimiser step takes.

    Args:
        step: the step about to be taken, counted from 0.
        steps_per_epoch: how many there are in an epoch.
        when: "before": its own. "after": the rate changes after every step, to that of the step just taken, so that the
            first two are the same (Beckschen/TransUNet ``trainer.py``). "epoch": that of the epoch's first step.
    """
    return {"before": step, "after": max(step - 1, 0), "epoch": step - step % steps_per_epoch}[when]
