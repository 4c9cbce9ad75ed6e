"""What to hand on: rules that turn the second gradient `ĝ` into the gradient `d` that the optimizer sees.

    SAM     d = ĝ                           chain()
    SSAM    d = γ ĝ,  γ = ‖g‖ / ‖ĝ‖         chain(renormalize())

What only one paper has stands in that paper's file.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .context import Rule, StepContext
from .tensors import EPS, Vector, added, parts, scaled


def renormalize(max_scale: float = math.inf) -> Rule:
    """`d = γ v` with `γ = min(max_scale, ‖g‖ / (‖v‖ + 1e-12))`: SSAM (Tan et al., JMLR 26, 24-0065, 2025).

    The step at `w + e` keeps the direction it found and takes back the length of the gradient at `w`. `max_scale=1` is
    the truncated form that the official code (cltan023/stablesam2024, `sam.py`) carries as a comment. Both norms are
    plain ones, also with an adaptive ascent, where the official code weights them by |w|.

    Args:
        max_scale: largest γ; infinity leaves it free.
    """

    def rule(v: Vector, context: StepContext) -> Vector:
        context.scale = torch.clamp(context.grad_norm / (context.norm(v) + EPS), max=max_scale)
        return scaled(v, context.scale)

    return rule


def orthogonal(v: Vector, to: Vector, context: StepContext) -> Vector:
    """The part of `v` that is orthogonal to `to`, by global inner products; all of `v` where `to` is zero.

    What rounding leaves of a parallel `v` is put to zero: its direction would be noise. Noise is
    `√Σ_l (16 eps_l ‖v_l‖)²` over the tensors, each with the eps of its own precision: in bfloat16 that is an eighth of
    a tensor's `‖v_l‖`, so LookSAM wants float32 weights.
    """
    norm = context.norm(to)
    rest = added(v, to, -context.space.dot(v, to) / (norm.square() + EPS * EPS))
    return scaled(rest, (context.space.norm(rest) > _rounding(v, context)).to(norm.dtype))


def _rounding(v: Vector, context: StepContext) -> Tensor:
    norms = context.space.norms(v)
    eps = torch.tensor([16 * torch.finfo(t.dtype).eps for t in parts(v)[0].values()], dtype=norms.dtype)
    return torch.linalg.vector_norm(norms * eps.to(norms.device, non_blocking=True))
