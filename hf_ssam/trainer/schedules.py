"""The radius over time, and when to perturb. Functions of the step alone, so that a resumed run continues them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import get_scheduler

RHO_SCHEDULES = ("constant", "linear", "cosine", "polynomial", "lr")


def rho_factor(name: str, max_steps: int) -> Callable[[int, float], float]:
    """What ρ is multiplied by: `(step, learning rate as a share of its peak) -> factor`.

    Args:
        name: a decay of `transformers.get_scheduler` (`constant`, `linear`, `cosine`, `polynomial`), or `lr`, which
            ties ρ to the learning rate, as GSAM does (Zhuang et al. 2022, arXiv 2203.08065, section 4).
        max_steps: optimizer steps of the run.

    Raises:
        ValueError: if there is no such schedule.
    """
    if name not in RHO_SCHEDULES:
        raise ValueError(f"rho_scheduler_type: `{name}` does not exist; choose one of {', '.join(RHO_SCHEDULES)}.")
    if name == "lr":
        return lambda step, lr_share: lr_share
    if name == "constant":
        return lambda step, lr_share: 1.0
    unit_lr = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    decay = get_scheduler(name, unit_lr, num_warmup_steps=0, num_training_steps=max_steps).lr_lambdas[0]
    return lambda step, lr_share: decay(step)


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
