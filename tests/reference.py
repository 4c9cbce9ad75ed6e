"""Each method the slow way: float64, one flat vector, straight from its equation. Nothing of hf_ssam is used here.

A reference is `(g, w, state, **options) -> d` on flat vectors: `w` the weights, `g(w)` the gradient there as a function, `state` a
dictionary it may keep. Options have the names and defaults of the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Gradient = Callable[[Tensor], Tensor]


def _renormalized(g: Tensor, d: Tensor, max_scale: float) -> Tensor:
    """ALGORITHMS.md 1: γ = min(max_scale, ‖g‖/(‖d‖ + 1e-12))."""
    return min(max_scale, (g.norm() / (d.norm() + 1e-12)).item()) * d


def ssam(gradient: Gradient, w: Tensor, state: dict, rho: float, *, is_weight: Tensor | None = None, **o: Any) -> Tensor:
    """SAM, USAM, ASAM and their renormalised forms, told apart by their options."""
    g = gradient(w)
    metric = torch.ones_like(w)
    if o.get("adaptive"):
        metric = w.abs() + o.get("eta", 0.01)
        if o.get("weights_only"):
            metric = torch.where(is_weight, metric, 1.0)
    if o.get("normalize", True):
        e = rho * metric**2 * g / ((metric * g).norm() + 1e-12)
    else:
        e = rho * metric**2 * g
    d = gradient(w + e)
    return _renormalized(g, d, o.get("max_scale", math.inf)) if o.get("renormalize") else d


def _preset(**preset: Any) -> Callable[..., Tensor]:
    return lambda gradient, w, state, rho, **options: ssam(gradient, w, state, rho, **{**preset, **options})


REFERENCES: Mapping[str, Callable[..., Tensor]] = {
    "ssam": _preset(renormalize=True),
    "sam": _preset(),
    "usam": _preset(normalize=False),
    "asam": _preset(adaptive=True),
}


def flat(tensors) -> Tensor:
    """One vector of all entries."""
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def load(model: nn.Module, w: Tensor) -> None:
    """Write a flat vector into the model's trainable parameters."""
    params = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for p, part in zip(params, w.split([p.numel() for p in params]), strict=True):
            p.copy_(part.view_as(p))


def gradient_of(model: nn.Module, loss: Callable[[], Tensor]) -> Gradient:
    """The gradient of `loss()` in the model's trainable parameters, as a function of a flat vector."""
    params = [p for p in model.parameters() if p.requires_grad]

    def gradient(w: Tensor) -> Tensor:
        load(model, w)
        grads = torch.autograd.grad(loss(), params, allow_unused=True)
        return flat(torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True))

    return gradient


def weight_mask(model: nn.Module) -> Tensor:
    """Which coordinates belong to parameters named `weight`."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return flat(torch.full_like(p, float(n.endswith("weight"))) for n, p in named).bool()


def sgd(method: str, model: nn.Module, losses: list[Callable[[], Tensor]], rho: float, lr: float, **options: Any) -> Tensor:
    """The weights after plain SGD along the method's gradient, one step for each loss."""
    w, state = flat(p for p in model.parameters() if p.requires_grad), {}
    for loss in losses:
        w = w - lr * REFERENCES[method](
            gradient_of(model, loss), w, state, rho, is_weight=weight_mask(model), **options
        )
    return w
