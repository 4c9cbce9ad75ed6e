"""A radius that is a rise of the loss: `e` as long as the first-order expansion predicts a rise of ρ.

    ⟨g, e⟩ = ρ          LE-SAM's ρ_t = min(σ/‖g‖, ρ_max) where e is parallel to g (arXiv 2605.10183)
    ⟨g, e⟩ = ρ L        the same as a share of the loss

A rule after the method's own ascent, so that it goes with every method whose perturbation is made of a gradient.
"""

from __future__ import annotations

import torch

from .context import Rule, StepContext
from .tensors import EPS, Vector, parts, restricted, scaled

RHO_UNITS = ("weight", "loss", "relative_loss")


def predicted_rise(relative: bool, rho_max: float) -> Rule:
    """`v / |⟨g, v⟩|`, or that times the loss: `ρ` times it is predicted to change the loss by ρ, or by ρ L.

    Args:
        relative: whether ρ is a share of the loss.
        rho_max: the longest `‖e‖`, which binds where the gradient vanishes.
    """

    def rule(v: Vector, context: StepContext) -> Vector:
        norm = context.norm(v)
        rise = context.loss.abs().to(norm.device) if relative else torch.ones_like(norm)
        longest = rho_max / (context.rho * norm + EPS)
        return scaled(v, torch.minimum(rise / (_slope(v, context) + EPS), longest))

    return rule


def _slope(v: Vector, context: StepContext) -> torch.Tensor:
    """`|⟨g, v⟩|`, shape (); of a multiple of g by the norms that are known."""
    g = restricted(context.g, v)
    if parts(v)[0] is parts(g)[0]:
        return context.norm(g) * context.norm(v)
    return context.space.dot(g, v).abs()
