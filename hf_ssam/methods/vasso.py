"""VaSSO (Li and Giannakis, NeurIPS 2023).

    d_t = (1 − θ) d_{t−1} + θ g        e = ρ d_t/‖d_t‖        d = ∇L(w + e)

A smoothed direction suppresses the variance of the batch's gradient.
"""

from __future__ import annotations

from ..rules.ascent import normalize
from ..rules.context import Rule, StepContext, chain, ema
from ..rules.tensors import Vector
from .method import Method, Paper, Rules
from .options import Option

PAPER = Paper(
    "Enhancing Sharpness-Aware Optimization Through Variance Suppression",
    "Li, Bingcong and Giannakis, Georgios B.",
    "Advances in Neural Information Processing Systems, 36",
    2023,
    "2309.15639",
    "li2023enhancing",
)


def smoothed(theta: float) -> Rule:
    """`d ← (1 − θ) d + θ v`, from the first `v` on.

    Args:
        theta: θ in (0, 1].
    """
    average = ema("average", theta)

    def rule(v: Vector, context: StepContext) -> Vector:
        return average(v, context)[1]

    return rule


def vasso(theta: float) -> Rules:
    """`e = ρ d/‖d‖`; θ = 1 is SAM."""
    first = () if theta == 1 else (smoothed(theta),)
    return Rules(ascent=chain(*first, normalize), stateful=theta < 1)


METHOD = Method(
    "vasso",
    "VaSSO: the gradient at w + ρ d/‖d‖ with d ← (1 − θ) d + θ g.",
    vasso,
    rho=0.2,
    paper=PAPER,
    when="Small batches, whose single gradient is a noisy direction to ascend in.",
    options={"theta": Option(0.9, "θ: weight of the new gradient; 1 is SAM (official README)", 0.0, 1.0, True)},
)
