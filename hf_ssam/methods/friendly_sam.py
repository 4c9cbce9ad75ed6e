"""Friendly SAM (Li, Zhou, He, Cheng, Huang, CVPR 2024).

    q = g − σ m,  m ← λ m + (1 − λ) g        e = ρ q/‖q‖        d = ∇L(w + e)

The moving average m stands for the gradient of the whole data set; what is left of g is the batch's noise.
"""

from __future__ import annotations

from ..rules.ascent import normalize
from ..rules.context import Rule, StepContext, chain, ema
from ..rules.tensors import Vector, added, restricted, scaled
from .method import Method, Paper, Rules
from .options import Option

PAPER = Paper(
    "Friendly Sharpness-Aware Minimization",
    "Li, Tao and Zhou, Pan and He, Zhengbao and Cheng, Xinwen and Huang, Xiaolin",
    "IEEE/CVF Conference on Computer Vision and Pattern Recognition",
    2024,
    "2403.12350",
    "li2024friendly",
)


def friendly(sigma: float, lam: float, order: str) -> Rule:
    """`q = v − σ m` with `m` a moving average of the gradients.

    The first step, with nothing averaged yet, perturbs along `v` in both orders. Where `v = m` to the bit, as on a
    whole batch with unmoved weights, q is 0 (σ = 1): the average is updated by a difference, which rounds nothing.

    Args:
        sigma: σ ≥ 0, how much of the average is taken out; 0 is SAM.
        lam: λ in [0, 1), weight of the past in `m ← λ m + (1 − λ) v`.
        order: `code` subtracts the average of the steps before (nblt/F-SAM, `optimizers`); `paper` updates it first
            (as third parties restate the paper's algorithm). At σ = 1 both give the same direction, since then
            `v − m ← λ (v − m)`.
    """
    average = ema("average", 1.0 - lam)

    def rule(v: Vector, context: StepContext) -> Vector:
        before, after = average(v, context)
        mean = before if order == "code" else restricted(after, before)
        return added(v, scaled(mean, sigma * context.state.filled("average")), -1.0) if before else v

    return rule


def friendly_sam(sigma: float, lam: float, ema_order: str) -> Rules:
    """`e = ρ q/‖q‖`, and `d = ĝ`; σ = 0 is SAM."""
    first = () if sigma == 0 else (friendly(sigma, lam, ema_order),)
    return Rules(ascent=chain(*first, normalize), stateful=sigma > 0)


METHOD = Method(
    "friendly_sam",
    "Friendly SAM: the gradient at w + ρ q/‖q‖ with q = g − σ m, m a moving average of the gradients.",
    friendly_sam,
    rho=0.05,
    paper=PAPER,
    when="Small or noisy batches: the ascent leaves out what the batches have in common.",
    options={
        "sigma": Option(1.0, "σ: how much of the average is taken out; 0 is SAM (official code)", 0.0),
        "lam": Option(0.9, "λ: weight of the past in the average (official code)", 0.0, 0.9999),
        "ema_order": Option("code", "whether m is updated after q (`code`) or before", choices=("code", "paper")),
    },
)
