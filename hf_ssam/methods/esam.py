"""ESAM (Du et al., ICLR 2022).

    e = (ρ/β) M ⊙ g/‖g‖,  M random        d = the gradient at w + e of the γ|B| samples whose loss rose most

Stochastic weight perturbation and sharpness-sensitive data selection, in the paper's words.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..rules.ascent import normalize
from ..rules.context import Rule, StepContext, chain
from ..rules.noise import thinned
from ..rules.selection import Selection, kept
from ..rules.tensors import Vector
from .method import Method, Paper, Rules
from .options import Option

PAPER = Paper(
    "Efficient Sharpness-aware Minimization for Improved Training of Neural Networks",
    "Du, Jiawei and Yan, Hanshu and Feng, Jiashi and Zhou, Joey Tianyi and Zhen, Liangli and Goh, Rick Siow "
    "Mong and Tan, Vincent Y. F.",
    "International Conference on Learning Representations",
    2022,
    "2110.03141",
    "du2022efficient",
)

SEED = Option(0, "of the method's own random draws", 0, 10_000_000)


def random_subset(beta: float, seed: int) -> Rule:
    """`v ⊙ M / β`, each coordinate of M drawn anew at each step with probability β, so that `E[u] = v`.

    Per coordinate as in the paper. The official code (dydjw9/Efficient_SAM) draws whole tensors and takes the norm of
    those drawn, which makes `E[e]` something else than SAM's e.
    """

    def rule(v: Vector, context: StepContext) -> Vector:
        return thinned(v, context, beta, seed)

    return rule


def largest_loss_increase(gamma: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The `max(1, ⌈γ B⌉)` samples whose loss rose most: exactly as many, also where losses are equal."""

    def between(at_w: Tensor, at_e: Tensor) -> Tensor:
        return (at_e - at_w).topk(kept(gamma, len(at_w))).indices.sort().values

    return between


def esam(beta: float, gamma: float, seed: int) -> Rules:
    """A random share of the coordinates, and the samples whose loss rose most; β = γ = 1 is SAM."""
    subset = () if beta == 1 else (random_subset(beta, seed),)
    picks = Selection(between=largest_loss_increase(gamma)) if gamma < 1 else None
    return Rules(chain(normalize, *subset), selection=picks)


METHOD = Method(
    "esam",
    "ESAM: a random share β of the coordinates is perturbed; pass 2 takes the γ|B| samples that rose most.",
    esam,
    rho=0.05,
    paper=PAPER,
    options={
        "beta": Option(0.6, "β: share of the coordinates perturbed (official run.sh)", 2.0**-16, 1.0),
        "gamma": Option(0.5, "γ: share of the samples in the second pass (official run.sh)", 0.0, 1.0, True),
        "seed": SEED,
    },
    passes="1 + γ, and one forward",
)
