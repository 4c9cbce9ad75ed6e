"""The mathematics of a step: from the gradient `g` at `w` to the gradient `d` that the optimizer sees."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..methods.method import Rules
from ..rules.context import StepContext
from ..rules.space import ParameterSpace
from ..rules.state import MethodState
from ..rules.vectors import Vector, copied, parts, restricted, scaled
from . import checks
from .clock import Clock
from .passes import Passes
from .report import StepReport, all_finite
from .window import AccumulationWindow, Unit


class Gradients:
    """Applies a method's rules to the gradients that passes leave in `.grad`.

    Args:
        rules: the method's.
        space: the parameters that train.
        perturbed: names of those that are perturbed.
        passes: runs the second pass.
    """

    def __init__(self, rules: Rules, space: ParameterSpace, perturbed: tuple[str, ...], passes: Passes):
        self._rules, self.space, self.perturbed = rules, space, perturbed
        self._passes, self._ranks = passes, passes.ranks

    def first_offset(self, rho: float, clock: Clock, state: MethodState) -> Vector:
        """What the first passes are displaced by, in units of ρ; empty for most methods."""
        if self._rules.first_offset is None or rho == 0:
            return {}
        w = self.space.weights(self.perturbed)
        return self._rules.first_offset({}, self._context(w, {}, torch.zeros(()), rho, clock, state))

    def close(self, window: AccumulationWindow, clock: Clock, state: MethodState) -> StepReport:
        """Go from `g` in `.grad` to `d` in `.grad`, and leave what the method keeps in `state`."""
        unit = window.unit(self._ranks.scope)
        g = self._gradient(unit)
        grad_norm = self.space.norm(g)
        targets = restricted(g, self.perturbed) if window.rho > 0 else {}
        if not targets:
            return StepReport(window.loss, grad_norm, ~self._agreed(all_finite(window.loss, grad_norm)))
        context = self._context(self.space.weights(parts(targets)[0]), g, grad_norm, window.rho, clock, state)
        context.fisher = self._passes.squared_gradients(window, self.space)
        window.at_work = True
        if not self._rules.second_pass.taken(clock.steps):
            return self._with_one(window, context, unit)
        return self._with_two(window, context, targets, unit)

    def _with_one(self, window: AccumulationWindow, context: StepContext, unit: Unit) -> StepReport:
        """A window that takes no second pass."""
        finite = self._agreed(all_finite(window.loss, context.grad_norm))
        self._hand_on(self._rules.reuse(context.g, context), unit, window, finite)
        context.state.commit(finite)
        moved = None if self._rules.first_offset is None else context.rho * context.norm(window.first_offset)
        return StepReport(window.loss, context.grad_norm, ~finite, perturbation_norm=moved, scale=context.scale)

    def _with_two(self, window: AccumulationWindow, context: StepContext, targets: Vector, unit: Unit) -> StepReport:
        """A window that takes a second pass, at `w + ρ u`."""
        keeps = self._rules.keeps_gradient
        if keeps and self._ranks.overwrites_gradients:
            context.g = copied(context.g)
        u = self._rules.ascent(targets, context)
        perturbation_norm = context.rho * context.norm(u)
        spent = not keeps and parts(u)[0] is parts(targets)[0]  # u is a multiple of g, and g is read no more
        with self._passes.displacement.by(u, context.rho, spent):
            del u, targets  # a model's worth of memory each
            context.release(keeps)
            self.space.clear_grads()
            ascent_loss = self._passes.second(window)
        second = self._gradient(unit)
        ascent_grad_norm = context.norm(second)
        finite = self._agreed(all_finite(window.loss, ascent_loss, context.grad_norm, ascent_grad_norm))
        self._hand_on(self._rules.descent(second, context), unit, window, finite)
        self._passes.learn(window, context.state)
        context.state.commit(finite)
        return StepReport(
            window.loss,
            context.grad_norm,
            ~finite,
            ascent_loss,
            ascent_grad_norm,
            perturbation_norm,
            context.scale,
            *window.cost(),
        )

    def _gradient(self, unit: Unit) -> Vector:
        """What is in `.grad`, in the units of the loss."""
        grads = self.space.grads()
        checks.check_backward(grads)
        return unit.removed(grads)

    def _hand_on(self, d: Vector, unit: Unit, window: AccumulationWindow, finite: Tensor) -> None:
        """Write `d` to `.grad` in the loss's scale; under a loss scale a step to be skipped is made non-finite."""
        d = unit.restored(d)
        if window.loss_scale is not None:
            d = scaled(d, torch.where(finite, 1.0, torch.nan))
        self.space.write_grads(d)

    def settled(self, report: StepReport) -> StepReport:
        """Under `micro_batch` ranks agree once a step: they may hold unequal numbers of micro-batches."""
        if self._ranks.scope != "micro_batch":
            return report
        return replace(report, skipped=~self._ranks.agreed(~report.skipped))

    def _agreed(self, finite: Tensor) -> Tensor:
        """Whether `finite` holds on every rank; under `micro_batch` on this one, and `settled` asks once a step."""
        return finite if self._ranks.scope == "micro_batch" else self._ranks.agreed(finite)

    def _context(
        self, w: Vector, g: Vector, grad_norm: Tensor, rho: float, clock: Clock, state: MethodState
    ) -> StepContext:
        return StepContext(self.space, w, g, grad_norm, rho, clock.steps, state, clock.progress, clock.lr)
