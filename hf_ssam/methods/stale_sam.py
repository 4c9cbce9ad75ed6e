"""Ascent along a stale gradient (Ji et al., S²-SAM, NeurIPS 2024; Jo, Lim, Lee, AsyncSAM, arXiv 2025).

    d_t = ∇L(w_t + ρ d_{t−1}/‖d_{t−1}‖)

SAM's perturbation follows the gradient of the step before, so that one pass is enough. The gradient that is kept is
the one that this step has: taken at the perturbed weights, as S²-SAM has it (AsyncSAM computes one at `w`, beside).
"""

from __future__ import annotations

import torch

from ..rules.ascent import normalize
from ..rules.context import NEVER, StepContext
from ..rules.tensors import Vector, copied, restricted
from .method import Method, Paper, Rules

PAPER = Paper(
    "Asynchronous Sharpness-Aware Minimization For Fast and Accurate Deep Learning",
    "Jo, Junhyuk and Lim, Jihyun and Lee, Sunwoo",
    "arXiv preprint",
    2025,
    "2503.11147",
    "jo2025asynchronous",
)


def along_the_last(v: Vector, context: StepContext) -> Vector:
    """`d/‖d‖` of the step before, over what is perturbed; nothing before the first step."""
    return normalize(restricted(context.state.read("gradient"), context.w), context)


def keep(v: Vector, context: StepContext) -> Vector:
    """`d = v`, kept for the next step; zero where this step has no gradient."""
    missing = (n for n in context.state.read("gradient") if n not in v)
    zeros = {n: torch.zeros_like(context.state.read("gradient")[n]) for n in missing}
    context.state.stage("gradient", {**zeros, **copied(v)})
    return v


def stale_sam() -> Rules:
    """One pass, at `w + ρ d/‖d‖` with the last step's d."""
    return Rules(second_pass=NEVER, reuse=keep, first_offset=along_the_last, stateful=True)


METHOD = Method(
    "stale_sam",
    "SAM along a stale gradient: one gradient, at w + ρ d/‖d‖ with d that of the step before.",
    stale_sam,
    rho=0.05,
    paper=PAPER,
    when="Any model, when one pass a step is all there is and batches are alike.",
    passes="1",
    renormalizes=False,
    experimental="the papers' algorithms were read where others restate them, not at their source",
)
