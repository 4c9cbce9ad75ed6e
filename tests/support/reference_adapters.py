"""The methods on LoRA the slow way: float64, whole matrices, from their equations. Nothing of hf_ssam is used here.

A problem is a loss as a function of the merged weights, one matrix a layer. What is drawn at random comes from the
streams that the methods' documentation promises: torch's generator, seeded by seed, step and layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Loss = Callable[[list[Tensor]], Tensor]
"""`merged weights -> loss`."""


@dataclass
class Factors:
    """What trains: W + s B A for each layer.

    Attributes:
        w: the frozen matrices, (out, in).
        a, b: the factors, (r, in) and (out, r).
        s: the scale.
    """

    w: list[Tensor]
    a: list[Tensor]
    b: list[Tensor]
    s: float

    def merged(self) -> list[Tensor]:
        return [w + self.s * b @ a for w, a, b in zip(self.w, self.a, self.b, strict=True)]

    def gradient(self, loss: Loss, extra: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """In A and B, at the merged weights plus `extra`."""
        for t in (*self.a, *self.b):
            t.requires_grad_()
        value = loss([m + e for m, e in zip(self.merged(), extra, strict=True)])
        grads = torch.autograd.grad(value, [*self.a, *self.b])
        for t in (*self.a, *self.b):
            t.requires_grad_(False)
        return list(grads[: len(self.a)]), list(grads[len(self.a) :])

    def step(self, grads: tuple[list[Tensor], list[Tensor]], lr: float) -> None:
        for factors, gradients in zip((self.a, self.b), grads, strict=True):
            factors[:] = [t - lr * g for t, g in zip(factors, gradients, strict=True)]


def flat_lora(
    x: Factors, losses: list[Loss], sigma: float, lr: float, *, growing: bool = True, seed: int = 0
) -> Factors:
    """Flat-LoRA (arXiv 2409.14396): E_ij ~ N(0, f²σ²‖W'_i‖²/n) on the merged weight, f = ½(1 − cos πt/T)."""
    for t, loss in enumerate(losses):
        f = (1 - math.cos(math.pi * t / len(losses))) / 2 if growing else 1.0
        noise = []
        for layer, merged in enumerate(x.merged()):
            stream = torch.Generator().manual_seed((seed * 1_000_003 + t) * 1_000_003 + layer)
            drawn = torch.randn(merged.shape, dtype=merged.dtype, generator=stream)
            rows = [f * sigma * row.norm() / math.sqrt(len(row)) * d for row, d in zip(merged, drawn, strict=True)]
            noise.append(torch.stack(rows))
        x.step(x.gradient(loss, noise), lr)
    return x


def bi_lora(
    x: Factors,
    losses: list[Loss],
    rho: float,
    lr: float,
    *,
    r: int = 8,
    lr_ratio: float = 1.0,
    ascent_optim: str = "adam",
    seed: int = 0,
) -> tuple[Factors, list[float]]:
    """Bi-LoRA (arXiv 2508.19564): a second adapter ascends by torch's own optimizer, with one bound; and its norms."""
    second_a, second_b, norms = [], [], []
    for layer, w in enumerate(x.w):
        stream = torch.Generator().manual_seed(seed * 1_000_003 + layer)
        bound = 1 / math.sqrt(w.shape[1])
        second_a.append(torch.empty(r, w.shape[1], dtype=w.dtype).uniform_(-bound, bound, generator=stream))
        second_b.append(torch.zeros(w.shape[0], r, dtype=w.dtype))
    params = [t.requires_grad_() for t in (*second_a, *second_b)]
    kind = torch.optim.Adam if ascent_optim == "adam" else torch.optim.SGD
    optimizer = kind(params, lr=lr * lr_ratio, maximize=True)
    for loss in losses:
        extra = [b @ a for a, b in zip(second_a, second_b, strict=True)]
        primary = x.gradient(loss, [e.detach() for e in extra])
        optimizer.zero_grad()
        loss([m + e for m, e in zip(x.merged(), extra, strict=True)]).backward()
        optimizer.step()
        x.step(primary, lr)
        with torch.no_grad():
            c = math.sqrt(sum((b @ a).square().sum().item() for a, b in zip(second_a, second_b, strict=True)))
            if c > rho:
                for t in params:
                    t.mul_(math.sqrt(rho / c))
            norms.append(math.sqrt(sum((b @ a).square().sum() for a, b in zip(second_a, second_b, strict=True))))
    return x, norms


def balanced(x: Factors, losses: list[Loss], mu: float, lr: float, by_gradient: bool) -> Factors:
    """nBAR and oBAR (arXiv 2410.14802), X = B and Y = Aᵀ, a = μ η, before the step."""
    a = mu * lr
    for loss in losses:
        grads = x.gradient(loss, [torch.zeros_like(w) for w in x.w])
        for layer, (g_y, g_x) in enumerate(zip(*grads, strict=True)):
            if by_gradient:
                sign = 1 if g_x.norm() >= g_y.norm() else -1
            else:
                sign = -1 if x.b[layer].norm() >= x.a[layer].norm() else 1
            x.b[layer] = (1 + sign * a) * x.b[layer]
            x.a[layer] = (1 - sign * a) * x.a[layer]
        x.step(grads, lr)
    return x
