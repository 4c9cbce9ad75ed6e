"""Where to look: rules that turn the gradient `g` into a direction `u`, so that the perturbation is `e = ρ u`.

    SAM            u = g / ‖g‖            chain(normalize)
    USAM           u = g                  chain()
    ASAM           u = T² g / ‖T g‖       chain(adaptive(), normalize, adaptive())
    adaptive USAM  u = T² g               chain(adaptive(), adaptive())

The radius ρ is to `u` what a learning rate is to an update, so no rule knows it. Norms run over the perturbed
parameters only: a perturbation of a part of the network still has length ρ (mueller-mp/SAM-ON, issue 1). What only one
paper has stands in that paper's file.
"""

from __future__ import annotations

import torch

from .context import Rule, StepContext, chain
from .tensors import EPS, Vector, copied, multiplied, restricted, scaled


def normalize(v: Vector, context: StepContext) -> Vector:
    """`v / (‖v‖ + 1e-12)`: Foret et al. 2021 (arXiv 2010.01412, eq. 2), with the epsilon of the official SSAM code."""
    return scaled(v, 1.0 / (context.norm(v) + EPS))


def adaptive(eta: float = 0.01, weights_only: bool = False) -> Rule:
    """`T v` with `T = |w| + η`: the normalisation operator of ASAM (Kwon et al. 2021, arXiv 2102.11600, section 3).

    Args:
        eta: η ≥ 0; above 0 it lets a weight at 0 move, such as LoRA's zero-initialised B.
        weights_only: the official code's form (SamsungLabs/ASAM, `asam.py`): T = |w| + η on parameters with `weight`
            in their name (LSTM's `weight_ih_l0` and attention's `in_proj_weight` too), the identity elsewhere.
    """

    def rule(v: Vector, context: StepContext) -> Vector:
        adapted = restricted(v, [n for n in v if not weights_only or "weight" in n])
        moved = multiplied(adapted, _operator(restricted(context.w, adapted), eta))
        return moved if len(moved) == len(v) else {**v, **moved}

    return rule


def _operator(w: Vector, eta: float) -> Vector:
    """`|w| + η`, in memory of its own."""
    magnitudes = copied(w)
    if magnitudes:
        torch._foreach_abs_(list(magnitudes.values()))
        torch._foreach_add_(list(magnitudes.values()), eta)
    return magnitudes


def direction(normalized: bool = True, metric: Rule | None = None) -> Rule:
    """The ascent of SAM and USAM, in the Euclidean geometry or in the one that `metric` (T) gives."""
    first = () if metric is None else (metric,)
    return chain(*first, *((normalize,) if normalized else ()), *first)
