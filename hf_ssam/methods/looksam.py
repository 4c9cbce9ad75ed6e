"""LookSAM and Look-LayerSAM (Liu, Mai, Chen, Hsieh, You, CVPR 2022).

    every k-th step   e = ρ g/‖g‖,  d = ĝ,  g_v = ĝ − (⟨ĝ, g⟩/‖g‖²) g
    between           d = g + α (‖g‖/‖g_v‖) g_v

What SAM's gradient has beside the plain one changes slowly, so it serves for k steps. The layer-wise form gives each
tensor a perturbation of its own; which one the paper has could not be read at its source.
"""

from __future__ import annotations

import torch

from ..rules.ascent import normalize
from ..rules.context import Rule, StepContext, every
from ..rules.descent import orthogonal
from ..rules.tensors import EPS, Vector, added_, copied, restricted
from .method import Method, Paper, Rules
from .options import Option

PAPER = Paper(
    "Towards Efficient and Scalable Sharpness-Aware Minimization",
    "Liu, Yong and Mai, Siqi and Chen, Xiangning and Hsieh, Cho-Jui and You, Yang",
    "IEEE/CVF Conference on Computer Vision and Pattern Recognition",
    2022,
    "2203.02714",
    "liu2022towards",
)


def keep_orthogonal(v: Vector, context: StepContext) -> Vector:
    """`d = ĝ`, and `g_v = ĝ − (⟨ĝ, g⟩/‖g‖²) g` is kept for `look` (figure 3)."""
    context.state.stage("orthogonal", copied(orthogonal(v, context.g, context)))
    return v


def look(alpha: float) -> Rule:
    """`d = g + α (‖g‖/‖g_v‖) g_v`, with global norms; `d = g` while `g_v` is zero (algorithm 1).

    A parameter that the batch did not use stays without a gradient.

    Args:
        alpha: α ≥ 0; the step then differs from g by exactly `α ‖g‖`.
    """

    def rule(v: Vector, context: StepContext) -> Vector:
        kept = restricted(context.state.read("orthogonal"), v)
        if not kept or alpha == 0:
            return v
        return added_(v, kept, alpha * context.norm(v) / (context.space.norm(kept) + EPS))

    return rule


def layerwise(by_weight: bool) -> Rule:
    """Each tensor by itself: `u_l = ‖w_l‖ v_l / ‖v_l‖`, or without `‖w_l‖`. A layer here is a parameter tensor.

    Public code has the plain one (NVIDIA PhysicsNeMo), from memory the paper has the weighted one, as LARS and LAMB
    do, and one public re-implementation has `min(20, ‖w_l‖/‖g_l‖) g_l/‖g‖`.

    Args:
        by_weight: whether `‖w_l‖` enters: ρ is then relative to each tensor, and a tensor of zeros stays where it is.
    """

    def rule(v: Vector, context: StepContext) -> Vector:
        norms = context.space.norms(v)
        factors = torch.where(norms > 0, 1.0 / (norms + EPS), 0.0)  # 1e12 is infinite in float16
        if by_weight:
            factors = factors * context.space.norms({n: context.w[n] for n in v}).to(factors.device)
        new = copied(v)
        for t, factor in zip(new.values(), factors, strict=True):
            t.mul_(factor.to(t.device, t.dtype))
        return new

    return rule


def looksam(k: int, alpha: float, ascent: Rule = normalize) -> Rules:
    """SAM every `k`-th step; between, `g` and a share of what the last second pass had orthogonal to it."""
    return Rules(ascent, keep_orthogonal, keeps_gradient=True, second_pass=every(k), reuse=look(alpha), stateful=True)


def look_layersam(k: int, alpha: float, layer_scale: str) -> Rules:
    """LookSAM with a perturbation of its own for each tensor."""
    return looksam(k, alpha, layerwise(by_weight=layer_scale == "weight"))


OPTIONS = {
    "k": Option(5, "k: a second pass every k-th step (reported for the paper)", 1),
    "alpha": Option(
        0.1, "α: share of g_v in the steps between; 0.7, reported for the paper, trained worse in re-runs", 0.0
    ),
}

METHOD = Method(
    "looksam",
    "LookSAM: SAM every k-th step; between, d = g + α (‖g‖/‖g_v‖) g_v, with g_v what SAM's had orthogonal to g.",
    looksam,
    rho=0.05,
    paper=PAPER,
    when="When two passes in every step are too dear, and some of the gain may go.",
    options=OPTIONS,
    passes="1 + 1/k",
)

LAYERWISE = Method(
    "look_layersam",
    "Look-LayerSAM: LookSAM with a perturbation of its own for each tensor, e_l = ρ ‖w_l‖ g_l/‖g_l‖.",
    look_layersam,
    rho=0.05,
    paper=PAPER,
    when="Large batches with LARS or LAMB, at the price of `looksam`.",
    options={
        **OPTIONS,
        "layer_scale": Option("weight", "e_l = ρ ‖w_l‖ g_l/‖g_l‖; `unit` drops ‖w_l‖", choices=("weight", "unit")),
    },
    passes="1 + 1/k",
    experimental="whether the paper's perturbation of a layer has ‖w_l‖ could not be read at its source",
)
