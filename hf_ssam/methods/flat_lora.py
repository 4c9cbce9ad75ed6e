"""Flat-LoRA (Li, He, Li, Wang, Shang, Huang, ICML 2025).

    ∇_{A,B} L(W' + E),   W' = W + s B A,   E_ij ~ N(0, f_t² σ² ‖W'_i‖²/n),   f_t = ½ (1 − cos(π t/T))

A flat minimum of A and B alone may be sharp in the weight that they are merged into; noise on the merged weight asks
for one that is flat there. `rho` is σ, and f_t grows from 0 to 1 over the run.

The frozen W is never written: `W + E` is made for the product with a layer's input and let go, and made again from
seed, step and layer when the gradient comes back (W may be in four bits). The released code (nblt/Flat-LoRA) adds the
noise to W and subtracts it, so that W drifts in low precision, and reseeds the process's generator at every step.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ..rules.adapters import AdapterLayer, AdapterRule, Average, Base
from ..rules.context import NEVER, StepContext
from ..rules.noise import normal_
from ..rules.tensors import Vector, Workspace
from .esam import SEED
from .method import Method, Paper, Rules
from .options import Option

Made = Callable[[torch.dtype], AbstractContextManager[Tensor]]
"""A weight in a dtype, there inside a `with` block."""

PAPER = Paper(
    "Flat-LoRA: Low-Rank Adaptation over a Flat Loss Landscape",
    "Li, Tao and He, Zhengbao and Li, Yujun and Wang, Yasheng and Shang, Lifeng and Huang, Xiaolin",
    "International Conference on Machine Learning",
    2025,
    "2409.14396",
    "li2025flat",
)


class MergedNoise(AdapterRule):
    """Noise on the merged weights, the same in every micro-batch of a step and on every rank.

    Args:
        growing: whether f_t grows; otherwise it is 1.
        seed: of the draws.
    """

    replaces_output = True
    reads_weight = True

    def __init__(self, growing: bool, seed: int):
        super().__init__()
        self.needs_length = growing
        self._growing, self._seed = growing, seed
        self._workspace = Workspace()

    def begin(self, context: StepContext) -> None:
        """Forget the norms of the step before."""
        share = (1 - math.cos(math.pi * context.progress)) / 2 if self._growing else 1.0
        self._strength = share * context.rho
        self._number = (self._seed * 1_000_003 + context.step) * 1_000_003
        self._norms: dict[int, Tensor] = {}

    def output(self, index: int, x: Tensor, base: Base) -> Tensor:
        """`(W + E) x + b`."""
        if self._strength == 0:
            return base(x)
        layer, x = self.layers[index], autocast(x)
        if index not in self._norms:
            self._norms[index] = merged_row_norms(layer, self._workspace)
        y = _Product.apply(x, functools.partial(self._noisy, index))
        bias = layer.bias()
        return y if bias is None else y + bias.to(y.dtype)

    @contextlib.contextmanager
    def _noisy(self, index: int, dtype: torch.dtype) -> Iterator[Tensor]:
        """`W + E` of a layer as `dtype`, in memory that the next layer overwrites."""
        layer = self.layers[index]
        scales = self._norms[index] * (self._strength / math.sqrt(layer.in_features))
        try:
            yield noisy(layer.weight(), scales, self._number + index, self._workspace).to(dtype)
        finally:
            self._workspace.reclaim()

    def finish(self, g: Vector, context: StepContext, finite: Tensor, average: Average) -> Tensor:
        """The root of `E ‖E‖²`: f_t σ ‖W'‖ over the layers that were called."""
        if not self._norms:
            return torch.zeros((), device=finite.device)
        device = next(iter(self._norms.values())).device
        return self._strength * torch.linalg.vector_norm(torch.cat([n.to(device) for n in self._norms.values()]))


def autocast(x: Tensor) -> Tensor:
    """`x` as autocast gives it to a linear layer."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


@torch.no_grad()
def merged_row_norms(layer: AdapterLayer, workspace: Workspace) -> Tensor:
    """`‖W'_i‖`, shape (out,), float32 or wider, without making W':

    ‖W_i + s B_i A‖² = ‖W_i‖² + 2 s ⟨W_i Aᵀ, B_i⟩ + s² B_i A Aᵀ B_iᵀ
    """
    weight, (a, b) = layer.weight(), layer.factors()
    dtype, s = torch.promote_types(weight.dtype, torch.float32), layer.scaling
    wide = weight if weight.dtype == dtype else workspace.borrow(weight, dtype).copy_(weight)
    with torch.autocast(weight.device.type, enabled=False):  # it would round the products
        a, b = a.to(dtype), b.to(dtype)
        change = 2 * s * (wide @ a.T) + s**2 * (b @ (a @ a.T))
        squares = torch.linalg.vector_norm(wide, dim=1).square() + (change * b).sum(dim=1)
    workspace.reclaim()
    return squares.clamp(min=0).sqrt()


@torch.no_grad()
def noisy(weight: Tensor, scales: Tensor, number: int, workspace: Workspace) -> Tensor:
    """`W + scales ⊙ N` row by row, N standard normal numbers that `number` alone determines, of the scales' dtype."""
    generator = torch.Generator(weight.device).manual_seed(number)
    noise = normal_(workspace.borrow(weight, scales.dtype), generator)
    return torch.addcmul(weight, noise, scales[:, None], out=noise)


class _Product(torch.autograd.Function):
    """`x Wᵀ` for a weight that is made for each use and never kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, made: Made) -> Tensor:  # type: ignore[override]
        ctx.made = made
        with made(x.dtype) as weight:
            return torch.nn.functional.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:  # type: ignore[override]
        if not ctx.needs_input_grad[0]:
            return None, None
        with ctx.made(gradient.dtype) as weight:
            return gradient @ weight, None


def flat_lora(growing: bool, seed: int) -> Rules:
    """One pass, at `W' + E`."""
    return Rules(second_pass=NEVER, adapter=lambda: MergedNoise(growing, seed))


METHOD = Method(
    "flat_lora",
    "Flat-LoRA: the gradient of LoRA's A and B at W + sBA + E, with noise E on the merged weight; rho is σ.",
    flat_lora,
    rho=0.05,
    paper=PAPER,
    when="LoRA on language models, also on a 4-bit base: one pass, and nothing kept but a seed.",
    options={
        "growing": Option(True, "σ grows by ½(1 − cos πt/T) over the run, as in the paper; false: it is constant"),
        "seed": SEED,
    },
    passes="1",
    renormalizes=False,
)
