"""Each method the slow way: float64, one flat vector, straight from its equation. Nothing of hf_ssam is used here.

A reference is `(g, w, state, **options) -> d` on flat vectors: `w` the weights, `g(w)` the gradient there as a
function, `state` a dictionary it may keep. Options have the names and defaults of the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Gradient = Callable[[Tensor], Tensor]


def _renormalized(g: Tensor, d: Tensor, max_scale: float) -> Tensor:
    """SSAM (arXiv 2401.07250): γ = min(max_scale, ‖g‖/(‖d‖ + 1e-12))."""
    return min(max_scale, (g.norm() / (d.norm() + 1e-12)).item()) * d


def ssam(
    gradient: Gradient, w: Tensor, state: dict, rho: float, *, is_weight: Tensor | None = None, **o: Any
) -> Tensor:
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


def _descended(d: Tensor, g: Tensor, o: Mapping[str, Any]) -> Tensor:
    return _renormalized(g, d, o.get("max_scale", math.inf)) if o.get("renormalize") else d


def _unit(v: Tensor) -> Tensor:
    return v / (v.norm() + 1e-12)


def friendly_sam(gradient: Gradient, w: Tensor, state: dict, rho: float, **o: Any) -> Tensor:
    """Friendly SAM (arXiv 2403.12350): q = g − σ m before or after m is updated; the first step perturbs along g."""
    sigma, lam = o.get("sigma", 1.0), o.get("lam", 0.9)
    g = gradient(w)
    if "m" not in state:
        q = state["m"] = g
    else:
        after = lam * state["m"] + (1 - lam) * g
        q = g - sigma * (after if o.get("ema_order") == "paper" else state["m"])
        state["m"] = after
    return _descended(gradient(w + rho * _unit(q)), g, o)


def vasso(gradient: Gradient, w: Tensor, state: dict, rho: float, *, theta: float = 0.9, **o: Any) -> Tensor:
    """VaSSO (arXiv 2309.15639): e = ρ d/‖d‖ with d ← (1 − θ) d + θ g."""
    g = gradient(w)
    state["d"] = (1 - theta) * state["d"] + theta * g if "d" in state else g
    return _descended(gradient(w + rho * _unit(state["d"])), g, o)


def looksam(
    gradient: Gradient,
    w: Tensor,
    state: dict,
    rho: float,
    *,
    k: int = 5,
    alpha: float = 0.1,
    ascent: Any = None,
    **o: Any,
) -> Tensor:
    """LookSAM (arXiv 2203.02714), with global norms."""
    t = state["t"] = state.get("t", -1) + 1
    g = gradient(w)
    if t % k:
        return _descended(g + alpha * g.norm() * _unit(state["gv"]), g, o)
    u = _unit(g) if ascent is None else ascent(g, w)
    d = gradient(w + rho * u)
    state["gv"] = d - (d @ g) / (g @ g) * g
    return _descended(d, g, o)


def look_layersam(gradient: Gradient, w: Tensor, state: dict, rho: float, *, sizes: list[int], **o: Any) -> Tensor:
    """The same with e_l = ρ ‖w_l‖ g_l/‖g_l‖, or without ‖w_l‖; `sizes` are the tensors' numbers of entries."""
    by_weight = o.get("layer_scale", "weight") == "weight"

    def ascent(g: Tensor, w: Tensor) -> Tensor:
        layers = zip(g.split(sizes), w.split(sizes), strict=True)
        return torch.cat([_unit(g_l) * (w_l.norm() if by_weight else 1.0) for g_l, w_l in layers])

    return looksam(gradient, w, state, rho, ascent=ascent, **o)


def gsam(gradient: Gradient, w: Tensor, state: dict, rho: float, *, alpha: float = 0.4, **o: Any) -> Tensor:
    """GSAM (arXiv 2203.08065): d = ĝ − α g⊥."""
    g = gradient(w)
    second = gradient(w + rho * _unit(g))
    return _descended(second - alpha * (g - (g @ second) / (second @ second) * second), g, o)


def wsam(gradient: Gradient, w: Tensor, state: dict, rho: float, *, gamma: float = 0.6, **o: Any) -> Tensor:
    """WSAM (arXiv 2305.15817), coupled."""
    kappa = gamma / (1 - gamma)
    g = gradient(w)
    return _descended((1 - kappa) * g + kappa * gradient(w + rho * _unit(g)), g, o)


def momentum_sam(gradient: Gradient, w: Tensor, state: dict, rho: float, *, momentum: float = 0.9, **o: Any) -> Tensor:
    """Momentum-SAM (arXiv 2401.12033): the gradient at w − ρ v/‖v‖, v = μ v + g."""
    v = state.get("v", torch.zeros_like(w))
    g = gradient(w - rho * _unit(v))
    state["v"] = momentum * v + g
    return g


def stale_sam(gradient: Gradient, w: Tensor, state: dict, rho: float, **o: Any) -> Tensor:
    """The gradient at w + ρ d/‖d‖ with the d of the step before (as restated from S²-SAM and arXiv 2503.11147)."""
    d = gradient(w + rho * _unit(state["d"])) if "d" in state else gradient(w)
    state["d"] = d
    return d


def functional_sam(gradient: Gradient, w: Tensor, state: dict, rho: float, **o: Any) -> Tensor:
    """Functional SAM (arXiv 2502.02407): J(w + e)ᵀ G with G = ∂L/∂logits at w and J the Jacobian of the logits."""
    model, logits = gradient.model, []

    def see(module: nn.Module, args: Any, out: Any) -> None:
        logits.append(out if isinstance(out, Tensor) else out["logits"])

    g, hook = gradient(w), model.register_forward_hook(see)
    load(model, w)
    derivatives = torch.autograd.grad(gradient.loss(), logits)
    before = len(logits)
    load(model, w + rho * _unit(g))
    gradient.loss()
    hook.remove()
    through = sum((now * then).sum() for now, then in zip(logits[before:], derivatives, strict=True))
    d = flat(torch.autograd.grad(through, [p for p in model.parameters() if p.requires_grad]))
    return _descended(d, g, o)


def random_perturbation(
    gradient: Gradient, w: Tensor, state: dict, rho: float, *, shapes: list, seed: int = 0, **o: Any
) -> Tensor:
    """Row by row: the gradient at w + e, e_ij ~ N(0, ρ²‖w_i‖²/n), from the stream that `rules.noise` promises."""
    step = state["t"] = state.get("t", -1) + 1
    stream, e = torch.Generator().manual_seed((seed * 1_000_003 + step) * 1_000_003), []
    for w_l, shape in zip(w.split([math.prod(shape) for shape in shapes]), shapes, strict=True):
        noise = torch.randn(shape, dtype=w.dtype, generator=stream)
        rows = w_l.view(shape[0] if len(shape) > 1 else 1, -1)
        for row, drawn in zip(rows, noise.view_as(rows), strict=True):
            e.append(rho * row.norm() / math.sqrt(len(row)) * drawn)
    return gradient(w + torch.cat(e))


REFERENCES: Mapping[str, Callable[..., Tensor]] = {
    "ssam": _preset(renormalize=True),
    "sam": _preset(),
    "usam": _preset(normalize=False),
    "asam": _preset(adaptive=True),
    "friendly_sam": friendly_sam,
    "looksam": looksam,
    "look_layersam": look_layersam,
    "gsam": gsam,
    "wsam": wsam,
    "vasso": vasso,
    "momentum_sam": momentum_sam,
    "random_perturbation": random_perturbation,
    "stale_sam": stale_sam,
    "functional_sam": functional_sam,
    "adasam": _preset(),
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

    gradient.model, gradient.loss = model, loss  # for a method that needs more than a gradient
    return gradient


def weight_mask(model: nn.Module) -> Tensor:
    """Which coordinates belong to parameters named `weight`."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return flat(torch.full_like(p, float(n.endswith("weight"))) for n, p in named).bool()


def sgd(
    method: str, model: nn.Module, losses: list[Callable[[], Tensor]], rho: float, lr: float, **options: Any
) -> Tensor:
    """The weights after plain SGD along the method's gradient, one step for each loss."""
    w, state = flat(p for p in model.parameters() if p.requires_grad), {}
    shapes = [p.shape for p in model.parameters() if p.requires_grad]
    layout = {"is_weight": weight_mask(model), "shapes": shapes, "sizes": [math.prod(shape) for shape in shapes]}
    for loss in losses:
        w = w - lr * REFERENCES[method](gradient_of(model, loss), w, state, rho, **layout, **options)
    return w
