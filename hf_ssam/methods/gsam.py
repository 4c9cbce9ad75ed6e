"""GSAM (Zhuang et al., ICLR 2022).

    e = ρ g/‖g‖        d = ĝ − α g⊥,  g⊥ the part of g orthogonal to ĝ

It lowers the perturbed loss and, without harm to it, the gap to the loss at `w`.
"""

from __future__ import annotations

from ..rules.ascent import normalize
from ..rules.context import Rule, StepContext
from ..rules.descent import orthogonal
from ..rules.tensors import Vector, added
from .method import Method, Paper, Rules
from .options import Option

PAPER = Paper(
    "Surrogate Gap Minimization Improves Sharpness-Aware Training",
    "Zhuang, Juntang and Gong, Boqing and Yuan, Liangzhe and Cui, Yin and Adam, Hartwig and Dvornek, Nicha "
    "and Tatikonda, Sekhar and Duncan, James and Liu, Ting",
    "International Conference on Learning Representations",
    2022,
    "2203.08065",
    "zhuang2022surrogate",
)


def subtract_orthogonal(alpha: float) -> Rule:
    """`d = ĝ − α g⊥` with g⊥ the part of g orthogonal to ĝ (section 4).

    Args:
        alpha: α ≥ 0; 0 is SAM.
    """

    def rule(v: Vector, context: StepContext) -> Vector:
        return added(v, orthogonal(context.g, v, context), -alpha)

    return rule


def gsam(alpha: float) -> Rules:
    """`d = ĝ − α g⊥`."""
    return Rules(normalize, subtract_orthogonal(alpha), keeps_gradient=True)


METHOD = Method(
    "gsam",
    "GSAM: d = ĝ − α g⊥, without a share of the part of g that is orthogonal to ĝ.",
    gsam,
    rho=0.05,
    paper=PAPER,
    when="Long training from scratch with `rho_scheduler_type=lr`, as its paper has it.",
    options={"alpha": Option(0.4, "α: share of g⊥ taken out; 0 is SAM", 0.0)},
)
