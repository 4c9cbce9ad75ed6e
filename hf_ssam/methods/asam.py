"""Adaptive SAM (Kwon, Kim, Park, Choi, ICML 2021).

    e = ρ T²g/‖T g‖,  T = |w| + η        d = ∇L(w + e)

No rescaling of a layer that leaves the network's function alone changes what it does.
"""

from __future__ import annotations

from ..rules import ascent
from .method import Method, Paper, Rules
from .options import Option

PAPER = Paper(
    "ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep Neural Networks",
    "Kwon, Jungmin and Kim, Jeongseop and Park, Hyunseo and Choi, In Kwon",
    "International Conference on Machine Learning",
    2021,
    "2102.11600",
    "kwon2021asam",
)

ETA = Option(0.01, "η in T = |w| + η (official ASAM code)", 0.0)


def asam(eta: float, weights_only: bool) -> Rules:
    """`e = ρ T²g/‖T g‖`, and `d = ĝ`."""
    return Rules(ascent=ascent.direction(metric=ascent.adaptive(eta, weights_only)))


METHOD = Method(
    "asam",
    "Adaptive SAM: the gradient at w + ρ T²g/‖T g‖ with T = |w| + η, which no rescaling of a layer changes.",
    asam,
    rho=0.5,
    paper=PAPER,
    when="Layers of very different scale, networks trained from scratch. Its ρ is about ten times that of `sam`.",
    options={
        "eta": ETA,
        "weights_only": Option(
            False, "T on parameters with `weight` in their name only, as the official ASAM code has it"
        ),
    },
)
