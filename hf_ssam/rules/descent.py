"""What to hand on: rules that turn the second gradient `ĝ` into the gradient `d` that the optimizer sees.

SAM     d = ĝ                                     chain()
SSAM    d = γ ĝ,  γ = ‖g‖ / ‖ĝ‖                   chain(renormalize())
GSAM    d = ĝ − α g⊥,  g⊥ ⟂ ĝ                     subtract_orthogonal(α)
WSAM    d = (1 − κ) g + κ ĝ                       weighted(κ)
LookSAM d = ĝ, or g + α (‖g‖ / ‖g_v‖) g_v         keep_orthogonal, look(α)
"""

from __future__ import annotations

import math

import torch

from .context import Rule, StepContext
from .tensors import EPS, Vector, added, scaled


def renormalize(max_scale: float = math.inf) -> Rule:
    """`d = γ v` with `γ = min(max_scale, ‖g‖ / (‖v‖ + 1e-12))`: SSAM (Tan et al., JMLR 26, 24-0065, 2025).

    The step at `w + e` keeps the direction it found and takes back the length of the gradient at `w`. `max_scale=1` is
    the truncated form that the official code (cltan023/stablesam2024, `sam.py`) carries as a comment.

    Args:
        max_scale: largest γ; infinity leaves it free.
    """

    def rule(v: Vector, at: StepContext) -> Vector:
        at.scale = torch.clamp(at.grad_norm / (at.norm(v) + EPS), max=max_scale)
        return scaled(v, at.scale)

    return rule


def orthogonal(v: Vector, to: Vector, at: StepContext) -> Vector:
    """The part of `v` that is orthogonal to `to`, by global inner products; all of `v` where `to` is zero.

    What rounding leaves of a parallel `v` is put to zero: its direction would be noise. In bfloat16 that is all below
    an eighth of `‖v‖`, so LookSAM wants float32 weights.
    """
    norm = at.norm(to)
    rest = added(v, scaled(to, at.space.dot(v, to) / (norm.square() + EPS * EPS)), -1.0)
    noise = 16 * torch.finfo(_coarsest(rest)).eps * at.space.norm(v)
    return scaled(rest, (at.space.norm(rest) > noise).to(noise.dtype))


def _coarsest(v: Vector) -> torch.dtype:
    return max((t.dtype for t in v.values()), key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


def subtract_orthogonal(alpha: float) -> Rule:
    """`d = ĝ − α g⊥` with g⊥ the part of g orthogonal to ĝ: GSAM (Zhuang et al. 2022, arXiv 2203.08065, section 4).

    Args:
        alpha: α ≥ 0; 0 is SAM.
    """

    def rule(v: Vector, at: StepContext) -> Vector:
        return added(v, orthogonal(at.g, v, at), -alpha)

    return rule


def weighted(kappa: float) -> Rule:
    """`d = (1 − κ) g + κ ĝ`: WSAM with its sharpness term inside the step (Yue et al. 2023, arXiv 2305.15817).

    Args:
        kappa: κ = γ/(1 − γ) ≥ 0; 0 is the base optimizer and 1 is SAM.
    """

    def rule(v: Vector, at: StepContext) -> Vector:
        return added(scaled(at.g, 1.0 - kappa), v, kappa)

    return rule


def keep_orthogonal(v: Vector, at: StepContext) -> Vector:
    """`d = ĝ`, and `g_v = ĝ − (⟨ĝ, g⟩/‖g‖²) g` is kept for `look` (Liu et al. 2022, arXiv 2203.02714, figure 3)."""
    at.memory.stage("orthogonal", orthogonal(v, at.g, at))
    return v


def look(alpha: float) -> Rule:
    """`d = g + α (‖g‖/‖g_v‖) g_v`, with global norms; `d = g` while `g_v` is zero (arXiv 2203.02714, algorithm 1).

    Args:
        alpha: α ≥ 0; the step then differs from g by exactly `α ‖g‖`.
    """

    def rule(v: Vector, at: StepContext) -> Vector:
        kept = at.memory.read("orthogonal")
        return added(v, scaled(kept, alpha * at.norm(v) / (at.space.norm(kept) + EPS))) if kept and alpha else v

    return rule


def remember(decay: float) -> Rule:
    """`d = v`, and the buffer `m ← decay · m + v` of SGD with momentum is kept for `ascent.anticipation`."""

    def rule(v: Vector, at: StepContext) -> Vector:
        at.memory.stage(
            "momentum", {n: t.clone() for n, t in added(scaled(at.memory.read("momentum"), decay), v).items()}
        )
        return v

    return rule
