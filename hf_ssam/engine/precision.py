"""Whether low-precision weights can hold the perturbation at all.

Spacing of bfloat16 near 0.02 is 1.2e-4, while ρ = 0.05 over 1e8 weights is about 5e-6 a coordinate: `w + e` rounds
back to `w`, the second pass repeats the first, and the run is plain training at twice the price.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..rules.tensors import Vector

COSINE_WARNED_BELOW = 0.9


@dataclass(frozen=True)
class Survival:
    """What rounding left of a perturbation.

    Attributes:
        moved: share of the coordinates asked to move that did, from 0 to 1.
        cosine: cosine between the step that landed and the one asked for.
    """

    moved: float
    cosine: float


def is_low_precision(tensors: Sequence[Tensor]) -> bool:
    """Whether any of `tensors` has fewer than 16 digits of mantissa: bfloat16, float16, float8."""
    return any(t.is_floating_point() and torch.finfo(t.dtype).eps > 1e-5 for t in tensors)


def survival(w: Vector, before: Sequence[Tensor], u: Vector, rho: float) -> Survival:
    """Compare `w − before` with `e = ρ u`, on this rank's part; reads four numbers back to the host.

    Args:
        w: local weights as perturbed.
        before: their copies from before, in the order of `u`.
        u: direction of the perturbation.
        rho: its length in units of `u`.
    """
    totals = torch.zeros(5, dtype=torch.float64)
    for name, old in zip(u, before, strict=True):
        asked = u[name].double() * rho
        landed = w[name].double() - old.to(w[name].device).double()
        should, did = asked != 0, (landed != 0) & (asked != 0)
        sums = [should.sum(), did.sum(), (asked * landed).sum(), asked.square().sum(), landed.square().sum()]
        totals += torch.stack([s.double() for s in sums]).cpu()
    asked_n, moved_n, dot, asked_sq, landed_sq = totals.tolist()
    cosine = dot / (asked_sq * landed_sq) ** 0.5 if asked_sq * landed_sq > 0 else 0.0
    return Survival(moved_n / asked_n if asked_n else 0.0, cosine)


def warn_if_lost(found: Survival, dtype: torch.dtype, rho: float) -> None:
    """Say so, with the numbers and the remedies, where most of the perturbation was rounded away."""
    if found.cosine < COSINE_WARNED_BELOW:
        warnings.warn(
            f"rho={rho:g} is below what {str(dtype).removeprefix('torch.')} weights resolve: {found.moved:.1%} of the "
            f"perturbed coordinates moved and the step that landed has cosine {found.cosine:.2f} with the one asked "
            "for; load the model with dtype=float32 and train under autocast (bf16=True), train a LoRA adapter in "
            "float32, or choose a larger rho.",
            UserWarning,
            stacklevel=2,
        )
