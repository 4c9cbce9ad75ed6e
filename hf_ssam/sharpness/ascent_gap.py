"""How much the loss rises inside a ball round the weights: the sharpness that SAM itself lowers.

    max_{‖T⁻¹e‖ ≤ ρ} L(w + e) − L(w)         T = 1, or T = |w| + η for the adaptive ball (ASAM, arXiv 2102.11600)

SAM replaces the maximum by that of the linearised loss, `e = ρ T²g/‖Tg‖`, and so does this. More steps linearise
again at the last `w + e`: the conditional gradient method with steps of length 1, which climbs as long as the loss is
convex. m-sharpness (Foret et al. 2021, arXiv 2010.01412, section 4.1) averages the rise over shards of m rows, each
with a perturbation of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.batches import split
from .arithmetic import length
from .objective import Objective
from .probe import Batches

Metric = Callable[[Tensor], Tensor]
"""A vector multiplied by T, in place."""


@dataclass(frozen=True)
class AscentSharpness:
    """What `ascent_sharpness` returns.

    Attributes:
        value: rise of the loss, a lower bound of the maximum over the ball.
        loss: the loss at w.
        rho, adaptive, m, steps: what was asked for.
        passes: gradients and losses evaluated, each over one shard.
        precision: as in `Eigenvalues`.
    """

    value: float
    loss: float
    rho: float
    adaptive: bool
    m: int | None
    steps: int
    passes: int
    precision: str


def ascent_sharpness(
    model: nn.Module,
    batches: Batches,
    rho: float = 0.05,
    *,
    adaptive: bool = False,
    eta: float = 0.01,
    m: int | None = None,
    steps: int = 1,
    **probe: Any,
) -> AscentSharpness:
    """Largest rise of the loss found in a ball of radius `rho`.

    Args:
        model: any model; it is left as it was to the bit (`w + e` lives in tensors of its own).
        batches: see `Objective`.
        rho: radius ρ > 0.
        adaptive: the ball of ASAM, in which T = |w| + `eta`.
        eta: η ≥ 0.
        m: rows a shard, Foret's m; None for one perturbation over all batches. A run trained with `m` rows a
            micro-batch and `ascent_scope=micro_batch` lowers this m-sharpness.
        steps: ascent steps; 1 is SAM's perturbation, more come nearer to the maximum.
        **probe: as in `top_eigenvalues`. With `m`, every rank averages over its own shards (`distributed=False`).

    Raises:
        ValueError: for a radius, m or number of steps out of range, and as `Objective`.
    """
    if not rho > 0 or steps < 1 or (m is not None and m < 1):
        raise ValueError(f"rho, steps, m: {rho}, {steps} and {m} are not allowed; choose rho > 0, steps and m from 1.")
    objective = Objective(model, batches, **({"distributed": False} if m else {}) | probe)
    metric = partial(_adaptive_, objective, eta) if adaptive else _plain_
    rise = base = 0.0
    passes = 0
    for shard, share in _shards(objective, m):
        shard.losses = shard.gradients = 0
        loss = shard.value()
        rise += share * (_highest(shard, rho, metric, steps) - loss)
        base += share * loss
        passes += shard.losses + shard.gradients
    objective.close()
    return AscentSharpness(rise, base, rho, adaptive, m, steps, passes, objective.precision)


def _shards(objective: Objective, m: int | None) -> Iterator[tuple[Objective, float]]:
    """Each shard's loss and its share of the mean; a shard without items has none and is left out."""
    if m is None:
        yield objective, 1.0
        return
    for batch in objective.batches():
        for rows in split(batch, m):
            shard = objective.over(rows)
            if shard.total:
                yield shard, shard.total / objective.total


def _highest(shard: Objective, rho: float, metric: Metric, steps: int) -> float:
    """Highest loss met at a perturbation of full length, each in the direction of the gradient at the one before."""
    offset, highest = None, -float("inf")
    for _ in range(steps):
        offset = _direction_(shard.gradient(offset), metric).mul_(rho)
        highest = max(highest, shard.value(offset))
    return highest


def _direction_(g: Tensor, metric: Metric) -> Tensor:
    """`T²g/‖Tg‖` in place of g, which maximises `⟨g, e⟩` over the ball of radius 1; zero where the gradient is."""
    scaled = metric(g)
    return metric(scaled.div_(length(scaled).clamp_min(torch.finfo(g.dtype).tiny)))


def _plain_(vector: Tensor) -> Tensor:
    return vector


def _adaptive_(objective: Objective, eta: float, vector: Tensor) -> Tensor:
    """`(|w| + η) · vector`, in place, weight by weight."""
    for part, w in zip(objective.split(vector), objective.weights().values(), strict=True):
        part.mul_((w.abs() + eta).to(part.device))
    return vector
