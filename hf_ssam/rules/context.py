"""What a rule is: a pure function of a vector and of the step it is applied in.

`ascent` rules turn the gradient `g` into the direction `u` of the perturbation `e = ρ u`; `descent` rules turn the
second gradient `ĝ` into the gradient `d` that the optimizer sees. Both are `(v, context) -> v`, so a method is a chain
of them and a new paper is one more function. A rule keeps nothing itself: what must survive the step goes through
`context.state`. It may edit `v` in place and return it, or return other tensors; it must not edit anything else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from .space import ParameterSpace
from .state import MethodState
from .tensors import Vector, added, copied, parts, restricted, times


@dataclass
class Clock:
    """Where a run is.

    Attributes:
        steps: how many steps the method has been at work in, ρ above 0.
        elapsed: how many steps there have been in all.
        total: length of the run; None where it is not known.
        lr: learning rate of the step; None where the host did not say.
    """

    steps: int = 0
    elapsed: int = 0
    total: int | None = None
    lr: float | None = None

    def tick(self, at_work: bool) -> None:
        """One step is over, in which the method was at work or not."""
        self.steps += at_work
        self.elapsed += 1

    @property
    def progress(self) -> float:
        """Share of the run that is over, from 0 to 1; 0 where its length is not known."""
        return min(1.0, self.elapsed / self.total) if self.total else 0.0


@dataclass(frozen=True)
class SecondPass:
    """At which of the steps that a method is at work in it takes a second pass.

    Attributes:
        interval: at every `interval`-th; None: never.
    """

    interval: int | None

    def taken(self, step: int) -> bool:
        """Whether step `step` (from 0) takes a second pass."""
        return self.interval is not None and step % self.interval == 0

    @property
    def varies(self) -> bool:
        """Whether steps differ in their passes, so that something is handed on from one to the next."""
        return self.interval is not None and self.interval > 1


ALWAYS = SecondPass(1)
NEVER = SecondPass(None)


def every(k: int) -> SecondPass:
    """A second pass at every `k`-th step, the first one included."""
    return SecondPass(k)


@dataclass
class StepContext:
    """The step that a rule is applied in.

    Attributes:
        space: norms and inner products, whole across shards.
        w: local weights at which `g` was taken, of the parameters that are perturbed.
        g: gradient of the first pass, all trainable parameters; empty before the first pass, and in the descent unless
            the method keeps it.
        grad_norm: `‖g‖` over all trainable parameters, shape ().
        rho: radius ρ of this step.
        step: how many steps the method has been at work in before this one.
        state: what the method keeps between steps.
        progress: share of the run that is over, from 0 to 1; 0 where its length is not known.
        lr: the learning rate of this step; 0 where the host did not say.
        fisher: `(v, samples) -> Σ (∂ℓ_i)²` over that many samples of the step at `w`, of the shapes of `v`.
        loss: of the first pass, shape (), the same on every rank that ascends together; set where `Rules.needs_loss`.
        scale: the factor γ that `descent.renormalize` applied, shape (); 1 elsewhere.
    """

    space: ParameterSpace
    w: Vector
    g: Vector
    grad_norm: Tensor
    rho: float
    step: int = 0
    state: MethodState = field(default_factory=MethodState)
    progress: float = 0.0
    lr: float = 0.0
    fisher: Callable[[Vector, int], Vector] = None  # type: ignore[assignment]  # set where `Rules.per_example`
    loss: Tensor = None  # type: ignore[assignment]  # set where `Rules.needs_loss`
    scale: Tensor | float = 1.0
    _norm: tuple[Vector, list[int], Tensor] | None = None

    def __post_init__(self) -> None:
        tensors, factor = parts(self.g)
        self._norm = (tensors, _versions(tensors), times(self.grad_norm, 1 / factor))

    def norm(self, v: Vector) -> Tensor:
        """`‖v‖`, shape (); asked twice of the same tensors, or of multiples of them, computed once."""
        tensors, factor = parts(v)
        if self._norm is None or self._norm[0] is not tensors or self._norm[1] != _versions(tensors):
            self._norm = (tensors, _versions(tensors), self.space.norm(tensors))
        return times(self._norm[2], factor)

    def release(self, keep_gradient: bool) -> None:
        """Let go of `g` before the second pass, unless the descent reads it: it is a model's worth of memory."""
        self._norm = None
        if not keep_gradient:
            self.g = {}


Rule = Callable[[Vector, StepContext], Vector]


def chain(*rules: Rule) -> Rule:
    """The rule that applies `rules` from left to right; of none, the identity."""

    def chained(v: Vector, context: StepContext) -> Vector:
        for rule in rules:
            v = rule(v, context)
        return v

    return chained


def ema(slot: str, new_weight: float) -> Callable[[Vector, StepContext], tuple[Vector, Vector]]:
    """A moving average `m ← m + new_weight · (v − m)` in `slot`, from the first finite `v` on: exact where `v = m`.

    A parameter whose first gradient comes later starts at that gradient (at zero, if that step is not finite). Returns
    `(v, context) -> (m before, m after)`; before the first finite `v` the former is zero, and it lacks the names that
    are new.
    """

    def update(v: Vector, context: StepContext) -> tuple[Vector, Vector]:
        before = restricted(context.state.read(slot), v)
        after = copied({n: v[n] for n in v if n not in before}) if len(before) < len(v) else {}
        if before:
            weight = 1.0 - (1.0 - new_weight) * context.state.filled(slot)
            after = {**after, **added(before, added(restricted(v, before), before, -1.0), weight)}
        context.state.stage(slot, after)
        return before, after

    return update


def _versions(v: Vector) -> list[int]:
    """The tensors' version counters: an edit in place is seen."""
    return [t._version for t in v.values()]
