"""Random weight perturbation (Bisla, Wang, Choromanska, AISTATS 2022, and others): the control of claims about SAM.

    d = ∇L(w + e)        e_ij ~ N(0, σ² ‖w_i‖²/n) for each row i of each weight, n its length

One gradient, at a random neighbour of `w`: descent on the loss smoothed by a Gaussian, as LPF-SGD has it with one
sample. The noise of a row is as long as σ times the row, the filter-wise form of the paper's code up to the factor √n,
which makes σ a relative size. `rho` is σ. Every micro-batch of a step and every replica sees the same noise. The
running statistics of BatchNorm are those of the one pass there is, at `w + e`.
"""

from __future__ import annotations

from ..rules.context import NEVER
from ..rules.noise import filterwise
from ..rules.rows import whole_rows
from .esam import SEED
from .method import Method, Paper, Rules

PAPER = Paper(
    "Low-Pass Filtering SGD for Recovering Flat Optima in the Deep Learning Optimization Landscape",
    "Bisla, Devansh and Wang, Jing and Choromanska, Anna",
    "International Conference on Artificial Intelligence and Statistics",
    2022,
    "2201.08025",
    "bisla2022low",
)


def random_perturbation(seed: int) -> Rules:
    """One pass, at `w + e`; nothing is kept."""
    return Rules(second_pass=NEVER, first_offset=filterwise(seed), checks=(whole_rows,))


METHOD = Method(
    "random_perturbation",
    "Random weight perturbation: one gradient, at w + e with e_ij ~ N(0, σ²‖w_i‖²/n) row by row; rho is σ.",
    random_perturbation,
    rho=0.05,
    paper=PAPER,
    when="The control for claims about SAM: noise in place of the ascent, in one pass.",
    options={"seed": SEED},
    passes="1",
    renormalizes=False,
)
