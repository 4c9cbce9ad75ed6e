"""Bi-LoRA (Liu, Li, Huang, Yang, Huang, ICLR 2026).

    W = W₀ + s B₁ A₁ + B₂ A₂        one backward: A₁, B₁ descend and A₂, B₂ ascend
    then, with c = √(Σ over layers ‖B₂ A₂‖²_F):   if c > ρ:  B₂, A₂ ← √(ρ/c) B₂, √(ρ/c) A₂

SAM on A and B perturbs the merged weight within their row and column spaces alone, and takes two passes. A second
adapter that ascends by itself perturbs it elsewhere too, and one pass serves both. The bound is one for all layers.

The second adapter is no part of the model: it is added to the frozen layers' outputs in the passes of a step and
nowhere else. No evaluation, no `max_grad_norm` and no saved file ever sees it, and nothing must be removed at the end;
a checkpoint keeps it with the method's own state. Its optimizer is Adam (or gradient ascent) with the step's learning
rate, on gradients that are averaged over the ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..rules.adapters import AdapterLayer, AdapterRule, Average, Base
from ..rules.context import NEVER, StepContext
from ..rules.tensors import EPS, Vector
from .esam import SEED
from .method import Method, Paper, Rules
from .options import Option

PAPER = Paper(
    "Bi-LoRA: Efficient Sharpness-Aware Minimization for Fine-Tuning Large-Scale Models",
    "Liu, Yuhang and Li, Tao and Huang, Zhehao and Yang, Zuopeng and Huang, Xiaolin",
    "International Conference on Learning Representations",
    2026,
    "2508.19564",
    "liu2026bilora",
)

BETA1, BETA2, ADAM_EPS = 0.9, 0.999, 1e-8
"""Adam's, as in `torch.optim`."""

COUNT = "ascent.count"


class AscendingAdapter(AdapterRule):
    """The second adapter, a pair `A₂, B₂` a layer: A₂ uniform and B₂ zero at first, as LoRA begins.

    Args:
        r: its rank r₂.
        lr_ratio: η₂/η₁.
        adam: whether it ascends by Adam; otherwise along the gradient.
        seed: of A₂.
    """

    replaces_output = True
    needs_lr = True

    def __init__(self, r: int, lr_ratio: float, adam: bool, seed: int):
        super().__init__()
        self._r, self._lr_ratio, self._adam, self._seed = r, lr_ratio, adam, seed
        self._start: dict[str, Tensor] = {}
        self._factors: dict[str, Tensor] = {}

    def begin(self, context: StepContext) -> None:
        """Take up the adapter as the last applied step left it, to collect gradients."""
        if not self._start:
            for index, layer in enumerate(self.layers):
                self._start |= start(layer, self._r, self._seed * 1_000_003 + index)
        count = context.state.plain(COUNT)
        begun = None if count is None else count > 0
        self._factors = {}
        for name, first in self._start.items():
            kept = context.state.plain(name)
            if begun is None or kept is None:
                self._factors[name] = first.clone().requires_grad_()
            else:
                now = torch.where(begun.to(first.device), kept.to(first), first)
                self._factors[name] = now.requires_grad_()

    def output(self, index: int, x: Tensor, base: Base) -> Tensor:
        """`W x + b + B₂ A₂ x`."""
        y, (a, b) = base(x), self._pair(index)
        return y + F.linear(F.linear(x.to(a.dtype), a), b).to(y.dtype)

    def finish(self, g: Vector, context: StepContext, finite: Tensor, average: Average) -> Tensor:
        """Ascend, and clip; returns c of this step's passes."""
        factors = list(self._factors.values())
        size = self._size([t.detach() for t in factors])
        gradients = [torch.zeros_like(t) if t.grad is None else t.grad for t in factors]
        average(gradients)
        with torch.no_grad():
            new = list(torch._foreach_add([t.detach() for t in factors], self._ascent(gradients, context)))
            length = self._size(new)
            shrunk = torch.sqrt(torch.clamp(context.rho / (length + EPS), max=1.0))
            new = [t * shrunk.to(t.device, t.dtype) for t in new]
        context.state.stage_plain(dict(zip(self._factors, new, strict=True)))
        return size

    def _ascent(self, gradients: list[Tensor], context: StepContext) -> list[Tensor]:
        """What the factors go up by."""
        lr = context.lr * self._lr_ratio
        count = context.state.plain(COUNT)
        count = torch.zeros_like(gradients[0][0, 0]) if count is None else count
        count = count + 1
        context.state.stage_plain({COUNT: count})
        if not self._adam:
            return list(torch._foreach_mul(gradients, lr))
        first, second = (self._moments(slot, gradients, context) for slot in ("first", "second"))
        torch._foreach_lerp_(first, gradients, 1 - BETA1)
        torch._foreach_lerp_(second, torch._foreach_mul(gradients, gradients), 1 - BETA2)
        for slot, moments in (("first", first), ("second", second)):
            context.state.stage_plain({f"{n}.{slot}": t for n, t in zip(self._factors, moments, strict=True)})
        return [
            lr * (m / (1 - BETA1**count).to(m.device)) / ((v / (1 - BETA2**count).to(v.device)).sqrt() + ADAM_EPS)
            for m, v in zip(first, second, strict=True)
        ]

    def _moments(self, slot: str, gradients: list[Tensor], context: StepContext) -> list[Tensor]:
        kept = [context.state.plain(f"{n}.{slot}") for n in self._factors]
        return [torch.zeros_like(g) if m is None else m.clone() for m, g in zip(kept, gradients, strict=True)]

    def _pair(self, index: int) -> tuple[Tensor, Tensor]:
        a, b = names_of(self.layers[index])
        return self._factors[a], self._factors[b]

    def _size(self, factors: list[Tensor]) -> Tensor:
        """`√(Σ ‖B₂ A₂‖²_F)` over the pairs, shape ()."""
        squares = [product_square(a, b) for a, b in zip(factors[::2], factors[1::2], strict=True)]
        return torch.stack([s.to(squares[0].device) for s in squares]).sum().sqrt()


def names_of(layer: AdapterLayer) -> tuple[str, str]:
    """What the state calls the second adapter's A and B of `layer`."""
    return f"ascent.{layer.name}.A", f"ascent.{layer.name}.B"


def start(layer: AdapterLayer, r: int, number: int) -> dict[str, Tensor]:
    """A₂ from `U(−1/√n, 1/√n)`, as PEFT draws A, and B₂ zero, in float32 or wider."""
    like = layer.factors()[0]
    dtype = torch.promote_types(like.dtype, torch.float32)
    bound = 1 / math.sqrt(layer.in_features)
    generator = torch.Generator(like.device).manual_seed(number)
    a = torch.empty(r, layer.in_features, dtype=dtype, device=like.device)
    b = torch.zeros(layer.out_features, r, dtype=dtype, device=like.device)
    return dict(zip(names_of(layer), (a.uniform_(-bound, bound, generator=generator), b), strict=True))


def product_square(a: Tensor, b: Tensor) -> Tensor:
    """`‖B A‖²_F = tr(BᵀB A Aᵀ)`, by matrices of the rank's size; never below zero."""
    return ((b.T @ b) * (a @ a.T)).sum().clamp(min=0)


def bi_lora(r: int, lr_ratio: float, ascent_optim: str, seed: int) -> Rules:
    """One pass; the auxiliary adapter is bounded by ρ."""
    adapter: Callable[[], Any] = lambda: AscendingAdapter(r, lr_ratio, ascent_optim == "adam", seed)  # noqa: E731
    return Rules(second_pass=NEVER, adapter=adapter, stateful=True)


METHOD = Method(
    "bi_lora",
    "Bi-LoRA: a second adapter ascends in the same backward, within ‖B₂A₂‖ ≤ ρ over all layers, and is no part of "
    "the model.",
    bi_lora,
    rho=0.05,
    paper=PAPER,
    when="LoRA on language models: SAM's effect on the merged weight in one pass.",
    options={
        "r": Option(8, "r₂: rank of the second adapter (the paper's)", 1),
        "lr_ratio": Option(1.0, "η₂/η₁: its learning rate in units of the run's (the paper's)", 0.0, above=True),
        "ascent_optim": Option("adam", "by Adam, or along the gradient", choices=("adam", "sgd")),
        "seed": SEED,
    },
    passes="1",
    renormalizes=False,
)
