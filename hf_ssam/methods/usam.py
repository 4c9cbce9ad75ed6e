"""Unnormalised SAM (Andriushchenko and Flammarion, ICML 2022).

e = ρ g        d = ∇L(w + e)
"""

from __future__ import annotations

from .method import Method, Paper, Rules

PAPER = Paper(
    "Towards Understanding Sharpness-Aware Minimization",
    "Andriushchenko, Maksym and Flammarion, Nicolas",
    "International Conference on Machine Learning",
    2022,
    "2206.06232",
    "andriushchenko2022understanding",
)


def usam() -> Rules:
    """`e = ρ g`, and `d = ĝ`: no rule at all."""
    return Rules()


METHOD = Method(
    "usam",
    "Unnormalised SAM: the gradient at w + ρ g.",
    usam,
    rho=0.05,
    paper=PAPER,
    when="To compare with theory, which is mostly about this form. Its ρ depends on the scale of the gradient.",
)
