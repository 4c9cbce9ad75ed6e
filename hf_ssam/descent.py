"""What to hand on: rules that turn the second gradient `ĝ` into the gradient `d` that the optimizer sees.

    SAM     d = ĝ                                     chain()
    SSAM    d = γ ĝ,  γ = ‖g‖ / ‖ĝ‖                   chain(renormalize())
"""

from __future__ import annotations

import math

import torch

from .rules import At, Rule
from .tensors import EPS, Vector, scaled


def renormalize(max_scale: float = math.inf) -> Rule:
    """`d = γ v` with `γ = min(max_scale, ‖g‖ / (‖v‖ + 1e-12))`: SSAM (Tan et al., JMLR 26, 24-0065, 2025).

    The step at `w + e` keeps the direction it found and takes back the length of the gradient at `w`. `max_scale=1` is the
    truncated form that the official code (cltan023/stablesam2024, `sam.py`) carries as a comment.

    Args:
        max_scale: largest γ; infinity leaves it free.
    """

    def rule(v: Vector, at: At) -> Vector:
        at.scale = torch.clamp(at.grad_norm / (at.norm(v) + EPS), max=max_scale)
        return scaled(v, at.scale)

    return rule
