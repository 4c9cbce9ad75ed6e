"""Where to look: rules that turn the gradient `g` into a direction `u`, so that the perturbation is `e = ρ u`.

    SAM            u = g / ‖g‖                        chain(normalize)
    USAM           u = g                              chain()
    ASAM           u = T² g / ‖T g‖                   chain(adaptive, normalize, adaptive)
    adaptive USAM  u = T² g                           chain(adaptive, adaptive)
    F-SAM          u = (g − σ m) / ‖g − σ m‖          chain(friendly, normalize)
    VaSSO          u = d / ‖d‖, d ← (1 − θ) d + θ g   chain(smoothed, normalize)
    LayerSAM       u_l = ‖w_l‖ g_l / ‖g_l‖            layerwise

The radius ρ is to `u` what a learning rate is to an update, so no rule knows it. Norms run over the perturbed
parameters only: a perturbation of a part of the network still has length ρ (mueller-mp/SAM-ON, issue 1).
"""

from __future__ import annotations

import torch

from .context import Rule, StepContext, chain, ema
from .tensors import EPS, Vector, added, multiplied, scaled


def normalize(v: Vector, at: StepContext) -> Vector:
    """`v / (‖v‖ + 1e-12)`: Foret et al. 2021 (arXiv 2010.01412, eq. 2), with the epsilon of the official SSAM code."""
    return scaled(v, 1.0 / (at.norm(v) + EPS))


def adaptive(eta: float = 0.01, weights_only: bool = False) -> Rule:
    """`T v` with `T = |w| + η`: the normalisation operator of ASAM (Kwon et al. 2021, arXiv 2102.11600, section 3).

    Args:
        eta: η ≥ 0; above 0 it lets a weight at 0 move, such as LoRA's zero-initialised B.
        weights_only: the official code's form (SamsungLabs/ASAM, `asam.py`): T = |w| + η on parameters named
            `weight`, the identity elsewhere.
    """

    def rule(v: Vector, at: StepContext) -> Vector:
        adapted = [n for n in v if not weights_only or n.rsplit(".", 1)[-1] == "weight"]
        return {**v, **multiplied({n: v[n] for n in adapted}, {n: at.w[n].abs() + eta for n in adapted})}

    return rule


def direction(normalized: bool = True, metric: Rule | None = None) -> Rule:
    """The ascent of SAM and USAM, in the Euclidean geometry or in the one that `metric` (T) gives."""
    first = () if metric is None else (metric,)
    return chain(*first, *((normalize,) if normalized else ()), *first)


def friendly(sigma: float, lam: float, order: str) -> Rule:
    """`q = v − σ m` with `m` a moving average of the gradients: Friendly SAM (Li et al. 2024, arXiv 2403.12350).

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

    def rule(v: Vector, at: StepContext) -> Vector:
        before, after = average(v, at)
        mean = before if order == "code" else {n: after[n] for n in before}
        return added(v, scaled(mean, sigma * at.memory.filled("average")), -1.0) if before else v

    return chain() if sigma == 0 else rule


def smoothed(theta: float) -> Rule:
    """`d ← (1 − θ) d + θ v`, from the first `v` on: VaSSO (Li and Giannakis 2023, arXiv 2309.15639).

    Args:
        theta: θ in (0, 1]; 1 is SAM.
    """
    average = ema("average", theta)
    return chain() if theta == 1 else lambda v, at: average(v, at)[1]


def layerwise(by_weight: bool) -> Rule:
    """Each tensor by itself: `u_l = ‖w_l‖ v_l / ‖v_l‖`, or without `‖w_l‖`. A layer here is a parameter tensor.

    The layer-wise form of LookSAM (Liu et al. 2022, arXiv 2203.02714). Which of the two the paper has could not be
    read at its source: public code has the plain one (NVIDIA PhysicsNeMo), from memory the paper has the weighted one,
    as LARS and LAMB do, and one public re-implementation has `min(20, ‖w_l‖/‖g_l‖) g_l/‖g‖`.

    Args:
        by_weight: whether `‖w_l‖` enters: ρ is then relative to each tensor, and a tensor of zeros stays where it is.
    """

    def rule(v: Vector, at: StepContext) -> Vector:
        norms = at.space.norms(v)
        factors = torch.where(norms > 0, 1.0 / (norms + EPS), 0.0)  # 1e12 is infinite in float16
        if by_weight:
            factors = factors * at.space.norms({n: at.w[n] for n in v}).to(factors.device)
        return {n: t * f.to(t.device, t.dtype) for (n, t), f in zip(v.items(), factors, strict=True)}

    return rule


def anticipation(v: Vector, at: StepContext) -> Vector:
    """`−m / ‖m‖`: where momentum is about to take the weights; nothing before the first step.

    Momentum-SAM (Becker et al. 2024, arXiv 2401.12033) takes its one gradient at `w − ρ m/‖m‖` with m the momentum
    buffer of SGD. `descent.remember` keeps one of our own, so that any optimizer can follow.
    """
    m = {n: t for n, t in at.memory.read("momentum").items() if n in at.w}
    return scaled(normalize(m, at), -1.0)
