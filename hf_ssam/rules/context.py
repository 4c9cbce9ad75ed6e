"""What a rule is: a pure function of a vector and of the place it is applied at.

`ascent` rules turn the gradient `g` into the direction `u` of the perturbation `e = ρ u`; `descent` rules turn the
second gradient `ĝ` into the gradient `d` that the optimizer sees. Both are `(v, at) -> v`, so a method is a chain of
them and a new paper is one more function. A rule keeps nothing itself: what must survive the step goes through
`at.memory`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from .state import MethodState
from .tensors import ParameterSpace, Vector, added, scaled


@dataclass
class StepContext:
    """Where a rule is applied.

    Attributes:
        space: norms and inner products, whole across shards.
        w: local weights at which `g` was taken, of the parameters that are perturbed.
        g: gradient of the first pass, all trainable parameters; empty in the descent unless the method keeps it.
        grad_norm: `‖g‖` over all trainable parameters, shape ().
        rho: radius ρ of this step.
        step: how many steps the method has been at work in before this one.
        memory: what the method keeps between steps.
        progress: share of the run that is over, from 0 to 1; 0 where its length is not known.
        fisher: `(v, samples) -> Σ (∂ℓ_i)²` over that many samples of the step at `w`, of the shapes of `v`.
        scale: the factor γ that `descent.renormalize` applied, shape (); 1 elsewhere.
    """

    space: ParameterSpace
    w: Vector
    g: Vector
    grad_norm: Tensor
    rho: float
    step: int = 0
    memory: MethodState = field(default_factory=MethodState)
    progress: float = 0.0
    fisher: Callable[[Vector, int], Vector] | None = None
    scale: Tensor | float = 1.0
    _normed: tuple[Vector, Tensor] | None = None

    def __post_init__(self) -> None:
        self._normed = (self.g, self.grad_norm)

    def norm(self, v: Vector) -> Tensor:
        """`‖v‖`, shape (); asked twice of the same vector, computed once."""
        if self._normed is None or self._normed[0] is not v:
            self._normed = (v, self.space.norm(v))
        return self._normed[1]

    def release(self, keep_gradient: bool) -> None:
        """Let go of `g` before the second pass, unless the descent reads it: it is a model's worth of memory."""
        self._normed = None
        if not keep_gradient:
            self.g = {}


Rule = Callable[[Vector, StepContext], Vector]


def ema(slot: str, new_weight: float) -> Callable[[Vector, StepContext], tuple[Vector, Vector]]:
    """A moving average `m ← m + new_weight · (v − m)` in `slot`, from the first finite `v` on: exact where `v = m`.

    A parameter whose first gradient comes later starts at that gradient (at zero, if that step is not finite). Returns
    `(v, at) -> (m before, m after)`; before the first finite `v` the former is zero, and it lacks the names that are
    new.
    """

    def update(v: Vector, at: StepContext) -> tuple[Vector, Vector]:
        before = {n: t for n, t in at.memory.read(slot).items() if n in v}
        after = {n: t.clone() for n, t in v.items() if n not in before}
        if before:
            weight = 1.0 - (1.0 - new_weight) * at.memory.filled(slot)
            after |= added(before, scaled(added({n: v[n] for n in before}, before, -1.0), weight))
        at.memory.stage(slot, after)
        return before, after

    return update


def chain(*rules: Rule) -> Rule:
    """The rule that applies `rules` from left to right; of none, the identity."""

    def chained(v: Vector, at: StepContext) -> Vector:
        for rule in rules:
            v = rule(v, at)
        return v

    return chained
