"""WSAM, in its coupled form (Yue et al., KDD 2023).

e = ρ g/‖g‖        d = (1 − κ) g + κ ĝ,  κ = γ/(1 − γ)
"""

from __future__ import annotations

from ..rules.ascent import normalize
from ..rules.context import Rule, StepContext
from ..rules.tensors import Vector, added, scaled
from .method import Method, Paper, Rules
from .options import Option

PAPER = Paper(
    "Sharpness-Aware Minimization Revisited: Weighted Sharpness as a Regularization Term",
    "Yue, Yun and Jiang, Jiadi and Ye, Zhiling and Gao, Ning and Liu, Yongchao and Zhang, Ke",
    "ACM SIGKDD Conference on Knowledge Discovery and Data Mining",
    2023,
    "2305.15817",
    "yue2023sharpness",
)


def weighted(kappa: float) -> Rule:
    """`d = (1 − κ) g + κ ĝ`: the sharpness term is inside the step.

    Args:
        kappa: κ = γ/(1 − γ) ≥ 0; 0 is the base optimizer and 1 is SAM.
    """

    def rule(v: Vector, context: StepContext) -> Vector:
        return added(scaled(context.g, 1.0 - kappa), v, kappa)

    return rule


def wsam(gamma: float) -> Rules:
    """`d = (1 − κ) g + κ ĝ` with κ = γ/(1 − γ)."""
    return Rules(normalize, weighted(gamma / (1 - gamma)), keeps_gradient=True)


METHOD = Method(
    "wsam",
    "WSAM, coupled form: d = (1 − κ) g + κ ĝ with κ = γ/(1 − γ).",
    wsam,
    rho=0.05,
    paper=PAPER,
    when="To turn sharpness up or down by γ at a fixed ρ, between the base optimizer and beyond SAM.",
    options={
        "gamma": Option(0.6, "γ: 0 is the base optimizer, 0.5 is SAM; 0.9, the decoupled code's, diverged", 0.0, 0.99)
    },
)
