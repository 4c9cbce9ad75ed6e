"""Balancedness-aware regularisation of LoRA: nBAR and oBAR (Li, Zhang, He, NeurIPS 2024).

    W + X Yᵀ, before the optimizer's step, with a = α_t η_t:
    nBAR    ‖g_X‖ ≥ ‖g_Y‖:   X ← (1 + a) X,  Y ← (1 − a) Y;   otherwise the other way round
    oBAR    ‖X‖ ≥ ‖Y‖:       X ← (1 − a) X,  Y ← (1 + a) Y;   otherwise the other way round

SAM on a product of two factors drives their norms together, most of all on noisy data; this does it without a second
pass. X is LoRA's B and Y its Aᵀ. The product changes by the factor 1 − a², which is what a pair gives up for balance.
`rho` is μ₀ in α_t = μ₀ × a decay to zero, which `rho_scheduler_type=linear` (or `cosine`) is; η_t is the learning rate
of the step. This is the one method that writes weights itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..rules.adapters import AdapterRule, Average
from ..rules.context import NEVER, StepContext
from ..rules.tensors import Vector, restricted
from .method import Method, Paper, Rules

PAPER = Paper(
    "Implicit Regularization of Sharpness-Aware Minimization for Scale-Invariant Problems",
    "Li, Bingcong and Zhang, Liang and He, Niao",
    "Advances in Neural Information Processing Systems, 37",
    2024,
    "2410.14802",
    "li2024implicit",
)

Choice = Callable[[StepContext, Vector, list[str], list[str]], Tensor]
"""`(context, g, names of X, names of Y) -> whether X grows`, bool, shape (pairs,)."""


def by_gradient(context: StepContext, g: Vector, xs: list[str], ys: list[str]) -> Tensor:
    """X grows where its gradient is the longer one: the factor with the longer gradient is the shorter factor."""
    return context.space.norms(restricted(g, xs)) >= context.space.norms(restricted(g, ys))


def by_weight(context: StepContext, g: Vector, xs: list[str], ys: list[str]) -> Tensor:
    """X grows where it is the shorter factor."""
    return context.space.norms(context.space.weights(xs)) < context.space.norms(context.space.weights(ys))


class Balance(AdapterRule):
    """Scales the factors of each pair that has gradients; a skipped step leaves them as they are.

    Args:
        choice: which factor grows.
    """

    needs_lr = True

    def __init__(self, choice: Choice):
        super().__init__()
        self._choice = choice

    def begin(self, context: StepContext) -> None:
        """Refuse a factor that would turn a matrix round.

        Raises:
            ValueError: if a = rho · lr is 1 or more.
        """
        if context.rho * context.lr >= 1:
            raise ValueError(
                f"rho: {context.rho:g} times the learning rate {context.lr:g} is the share by which a factor shrinks, "
                "and not below 1; choose a smaller rho, such as 0.5."
            )

    def finish(self, g: Vector, context: StepContext, finite: Tensor, average: Average) -> Tensor:
        """Write `(1 ± a) X` and `(1 ∓ a) Y`; returns the length of what they moved by."""
        pairs = [(p.B, p.A) for p in self.layers if p.B in g and p.A in g]
        xs, ys = [x for x, _ in pairs], [y for _, y in pairs]
        if not pairs:
            return torch.zeros((), device=finite.device)
        grows = self._choice(context, g, xs, ys).to(context.grad_norm.dtype)
        sign, a = 2 * grows - 1, finite.to(grows.device, grows.dtype) * (context.rho * context.lr)
        both = context.space.weights([*xs, *ys])
        moved = a * context.space.norm(both)
        factors = torch.cat([1 + a * sign, 1 - a * sign])
        with torch.no_grad():
            for t, factor in zip(both.values(), factors, strict=True):
                t.mul_(factor.to(t.device, torch.promote_types(t.dtype, torch.float32)))
        return moved


def nbar() -> Rules:
    """The factor with the longer gradient grows."""
    return Rules(second_pass=NEVER, adapter=lambda: Balance(by_gradient))


def obar() -> Rules:
    """The shorter factor grows."""
    return Rules(second_pass=NEVER, adapter=lambda: Balance(by_weight))


NBAR = Method(
    "nbar",
    "nBAR on LoRA: before each step the factor with the longer gradient is scaled by 1 + a, the other by 1 − a.",
    nbar,
    rho=0.5,
    paper=PAPER,
    when="LoRA at the price of LoRA: SAM's bias to balanced factors, without its passes.",
    passes="1",
    renormalizes=False,
)

OBAR = Method(
    "obar",
    "oBAR on LoRA: before each step the shorter factor is scaled by 1 + a and the longer by 1 − a.",
    obar,
    rho=0.5,
    paper=PAPER,
    when="As `nbar`, choosing by the factors' lengths and not by their gradients.",
    passes="1",
    renormalizes=False,
)
