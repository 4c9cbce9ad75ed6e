"""The radius over time, and when to perturb. Functions of the step alone, so that a resumed run continues them."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable

import torch
from transformers import get_scheduler

RHO_SCHEDULES = ("constant", "linear", "cosine", "polynomial", "lr", "warmup", "cosine_up")

Schedule = Callable[[int, int], float]
"""A schedule of one's own: `(step, steps of the run) -> what ρ is multiplied by`."""


def rho_factor(name: str | Schedule, max_steps: int, warmup_steps: int = 0) -> Callable[[int, float], float]:
    """What ρ is multiplied by: `(step, learning rate as a share of its peak) -> factor`.

    Args:
        name: a decay of `transformers.get_scheduler` (`constant`, `linear`, `cosine`, `polynomial`); `lr`, which ties
            ρ to the learning rate, as GSAM does (Zhuang et al. 2022, arXiv 2203.08065, section 4); `warmup`, which
            grows over `warmup_steps` and stays; `cosine_up`, ½(1 − cos πt/T), which grows over the run; or a function.
        max_steps: optimizer steps of the run.
        warmup_steps: the learning rate's.

    Raises:
        ValueError: if there is no such schedule, or nothing to warm up over.
    """
    check_schedule(name)
    if callable(name):
        return lambda step, lr_share: _checked(name(step, max_steps), step)
    if name == "lr":
        return lambda step, lr_share: lr_share
    if name == "constant":
        return lambda step, lr_share: 1.0
    if name == "cosine_up":
        return lambda step, lr_share: (1 - math.cos(math.pi * step / max_steps)) / 2
    if name == "warmup":
        if not warmup_steps:
            raise ValueError(
                "rho_scheduler_type: `warmup` grows over warmup_steps, which is 0; set warmup_steps, or choose "
                "cosine_up, which grows over the run."
            )
        return lambda step, lr_share: min(1.0, step / warmup_steps)
    unit_lr = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    decay = get_scheduler(name, unit_lr, num_warmup_steps=0, num_training_steps=max_steps).lr_lambdas[0]
    return lambda step, lr_share: decay(step)


def check_schedule(name: str | Schedule) -> None:
    """Refuse a schedule that does not exist, and a function that could not be saved with the arguments.

    Raises:
        ValueError: naming it.
    """
    if callable(name):
        try:
            pickle.dumps(name)
        except (pickle.PicklingError, AttributeError, TypeError):
            raise ValueError(
                f"rho_scheduler_type: {name!r} cannot be saved with the run's arguments; define it by `def` at the "
                "top of a module."
            ) from None
    elif name not in RHO_SCHEDULES:
        listed = ", ".join(RHO_SCHEDULES)
        raise ValueError(f"rho_scheduler_type: `{name}` does not exist; choose one of {listed}, or a function.")


def _checked(factor: float, step: int) -> float:
    if not 0 <= factor < math.inf:
        raise ValueError(
            f"rho_scheduler_type: the function gives {factor} for step {step}; return a finite number from 0."
        )
    return float(factor)


def first_ascent(start: float, max_steps: int) -> int:
    """The step at which perturbing starts: `start` itself, or that share of `max_steps`, rounded, where it is below 1.

    Raises:
        ValueError: if the run would end before.
    """
    step = min(round(start * max_steps), max_steps - 1) if start < 1 else int(start)
    if step >= max_steps:
        raise ValueError(
            f"ascent_start: {start:g} is step {step} of a run of {max_steps} steps, so nothing would ever be "
            "perturbed; choose an earlier step, or a ratio below 1."
        )
    return step


def is_ascent_step(step: int, start: int, interval: int) -> bool:
    """Whether step `step` (from 0) perturbs: the first one that may, and each `interval`-th after it."""
    return step >= start and (step - start) % interval == 0
