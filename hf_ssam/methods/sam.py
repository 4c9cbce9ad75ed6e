"""SAM (Foret, Kleiner, Mobahi, Neyshabur, ICLR 2021).

e = ρ g/‖g‖        d = ∇L(w + e)
"""

from __future__ import annotations

from ..rules.ascent import normalize
from .method import Method, Paper, Rules

PAPER = Paper(
    "Sharpness-Aware Minimization for Efficiently Improving Generalization",
    "Foret, Pierre and Kleiner, Ariel and Mobahi, Hossein and Neyshabur, Behnam",
    "International Conference on Learning Representations",
    2021,
    "2010.01412",
    "foret2021sam",
)


def sam() -> Rules:
    """`e = ρ g/‖g‖`, and `d = ĝ`."""
    return Rules(ascent=normalize)


METHOD = Method(
    "sam",
    "SAM: the gradient at w + ρ g/‖g‖.",
    sam,
    rho=0.05,
    paper=PAPER,
    when="To compare with what papers report, and over AdamW, which takes out most of what `ssam` adds.",
)
