"""Momentum-SAM (Becker, Altrock, Risse, arXiv 2024).

    d = ∇L(w − ρ m/‖m‖)        m ← μ m + d

Its one gradient is taken where momentum is about to take the weights. m is the momentum buffer of SGD; one of our own
is kept, so that any optimizer can follow.
"""

from __future__ import annotations

from ..rules.ascent import normalize
from ..rules.context import NEVER, Rule, StepContext
from ..rules.tensors import Vector, added, copied, restricted, scaled
from .method import Method, Paper, Rules
from .options import Option

PAPER = Paper(
    "Momentum-SAM: Sharpness Aware Minimization without Computational Overhead",
    "Becker, Marlon and Altrock, Frederick and Risse, Benjamin",
    "arXiv preprint",
    2024,
    "2401.12033",
    "becker2024momentum",
)


def ahead(v: Vector, context: StepContext) -> Vector:
    """`−m / ‖m‖`; nothing before the first step."""
    return scaled(normalize(restricted(context.state.read("momentum"), context.w), context), -1.0)


def remember(decay: float) -> Rule:
    """`d = v`, and the buffer `m ← decay · m + v` is kept."""

    def rule(v: Vector, context: StepContext) -> Vector:
        kept = context.state.read("momentum")
        seen = added(restricted(v, kept), kept, decay)
        new = copied(restricted(v, [n for n in v if n not in kept]))
        context.state.stage("momentum", {**seen, **new})
        return v

    return rule


def momentum_sam(momentum: float) -> Rules:
    """One pass, at `w − ρ m/‖m‖`."""
    return Rules(second_pass=NEVER, reuse=remember(momentum), first_offset=ahead, stateful=True)


METHOD = Method(
    "momentum_sam",
    "Momentum-SAM: one gradient, at w − ρ m/‖m‖ with m a momentum buffer of its own.",
    momentum_sam,
    rho=1.0,
    paper=PAPER,
    when="When one pass a step is all there is; its ρ is on another scale.",
    options={"momentum": Option(0.9, "μ in m ← μ m + g", 0.0, 0.9999)},
    passes="1",
    renormalizes=False,
)
