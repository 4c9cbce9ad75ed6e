"""The mathematics of a step: from the gradient `g` at `w` to the gradient `d` that the optimizer sees."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..methods.method import Rules
from ..rules.context import Clock, StepContext
from ..rules.space import ParameterSpace
from ..rules.state import MethodState
from ..rules.tensors import Vector, copied, parts, restricted, scaled
from .passes import Passes
from .report import StepReport
from .window import AccumulationWindow, Offset


class Unit:
    """What gradients are a multiple of.

    Args:
        size: a number, or a tensor of shape ().
    """

    def __init__(self, size: float | Tensor):
        self.size, self.inverse = size, 1 / size

    def removed(self, gradient: Vector) -> Vector:
        """`gradient`, in units of the loss."""
        return scaled(gradient, self.inverse)

    def restored(self, d: Vector) -> Vector:
        """The inverse of `removed`: to the bit where `d` is what came out of it, which a product would not be."""
        tensors, factor = parts(d)
        return scaled(tensors, 1.0 if factor is self.inverse else factor * self.size)


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

    def begin(self, rho: float, clock: Clock, state: MethodState) -> Offset:
        """A window begins: what its first passes are displaced by; nothing for most methods."""
        adapters, offset = self._passes.adapters, self._rules.first_offset
        if rho == 0 or (adapters is None and offset is None):
            return Offset()
        context = self._context(self.space.weights(self.perturbed), {}, torch.zeros(()), rho, clock, state)
        if adapters is not None:
            adapters.begin(context, clock)
        if offset is None:
            return Offset()
        u = offset({}, context)
        return Offset(u, rho * context.norm(u))

    def close(self, window: AccumulationWindow, clock: Clock, state: MethodState) -> StepReport:
        """Go from `g` in `.grad` to `d` in `.grad`, and leave what the method keeps in `state`."""
        unit = _unit(window, self._ranks.scope)
        g = self._gradient(unit)
        grad_norm = self.space.norm(g)
        targets = restricted(g, self.perturbed) if window.rho > 0 else {}
        if not targets:
            finite = self._agreed(_all_finite(window.loss, grad_norm))
            if window.loss_scale is not None:  # another rank's overflow must stop this one's scaler too
                self._hand_on(g, unit, window, finite)
            return StepReport(window.loss, grad_norm, ~finite)
        context = self._context(self.space.weights(parts(targets)[0]), g, grad_norm, window.rho, clock, state)
        if self._rules.needs_loss:
            context.loss = self._loss(window)
        if self._rules.per_example:
            context.fisher = self._passes.squared_gradients(window, self.space)
        window.at_work = True
        del g, targets  # the context alone holds on to the gradient, and lets go of it before the second pass
        if not self._rules.second_pass.taken(clock.steps):
            return self._with_one(window, context, unit)
        return self._with_two(window, context, unit)

    def _with_one(self, window: AccumulationWindow, context: StepContext, unit: Unit) -> StepReport:
        """A window that takes no second pass."""
        finite = self._agreed(_all_finite(window.loss, context.grad_norm))
        moved = self._moved(window, context, unit, finite)
        self._hand_on(self._rules.reuse(context.g, context), unit, window, finite)
        context.state.commit(finite)
        return StepReport(window.loss, context.grad_norm, ~finite, perturbation_norm=moved, scale=context.scale)

    def _moved(self, window: AccumulationWindow, context: StepContext, unit: Unit, finite: Tensor) -> Tensor | None:
        """How far from the model's own weights the first passes were taken; None where they were taken at `w`."""
        if self._passes.adapters is not None:
            return self._passes.adapters.finish(context.g, context, finite, unit.inverse)
        return window.first_offset.length

    def _with_two(self, window: AccumulationWindow, context: StepContext, unit: Unit) -> StepReport:
        """A window that takes a second pass, at `w + ρ u`."""
        keeps = self._rules.keeps_gradient
        if keeps and self._ranks.overwrites_gradients:
            context.g = copied(context.g)
        targets = restricted(context.g, self.perturbed)
        u = self._rules.ascent(targets, context)
        perturbation_norm = context.rho * context.norm(u)
        spent = not keeps and parts(u)[0] is parts(targets)[0]  # u is a multiple of g, and g is read no more
        with self._passes.displacement.by(u, context.rho, spent, context.w):
            del u, targets  # a model's worth of memory each
            context.release(keeps)
            self.space.clear_grads()
            ascent_loss = self._passes.second(window)
        second = self._gradient(unit)
        ascent_grad_norm = context.norm(second)
        finite = self._agreed(_all_finite(window.loss, ascent_loss, context.grad_norm, ascent_grad_norm))
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
            *_cost(window),
        )

    def _loss(self, window: AccumulationWindow) -> Tensor:
        """The mean loss of the samples that ascend together, shape ()."""
        if self._ranks.scope != "global":
            return window.loss / _share(window, self._ranks.scope)
        loss = window.loss.clone()
        self._ranks.average_over_data([loss])
        return loss

    def _gradient(self, unit: Unit) -> Vector:
        """What is in `.grad`, in the units of the loss.

        Raises:
            ValueError: if the passes left no gradient at all, or a sparse one.
        """
        grads = self.space.grads()
        sparse = next((n for n, t in grads.items() if t.layout != torch.strided), None)
        if sparse is not None:
            raise ValueError(
                f"model: the gradient of `{sparse}` is sparse, which has no norm to perturb by; call embedding with "
                "sparse=False."
            )
        if not grads:
            raise ValueError(
                "run_pass: no parameter has a gradient after it; let it call `loss.backward()` (or "
                "`accelerator.backward(loss)`) before it returns the loss."
            )
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
        return StepContext(self.space, w, g, grad_norm, rho, clock.steps, state, clock.progress, clock.lr or 0.0)


def _share(window: AccumulationWindow, scope: str) -> float | Tensor:
    """What the window's loss is a multiple of: its share of the batch, where it ascends by itself."""
    share = 1.0 if scope == "global" else window.share
    if isinstance(share, Tensor):  # of no counted item: its loss and gradient are zero in any unit
        share = torch.where(share == 0, torch.ones_like(share), share)
    return share


def _unit(window: AccumulationWindow, scope: str) -> Unit:
    """What the window's gradient is a multiple of: the loss scale, and its share where it ascends by itself."""
    share = _share(window, scope)
    return Unit(share if window.loss_scale is None else share * window.loss_scale)


def _cost(window: AccumulationWindow) -> tuple[float, float]:
    """Forward-backward passes and forwards, each in units of the whole batch."""
    n = len(window.records)
    passes = sum(r.first + r.second for r in window.records) / n
    if window.examples:
        passes += window.examples / sum(r.forward.size for r in window.records)
    return passes, passes + sum(r.looks for r in window.records) / n


def _all_finite(*values: Tensor) -> Tensor:
    """Whether every one of some tensors of shape () is finite, decided on the first one's device."""
    return torch.stack([torch.isfinite(v.detach()).to(values[0].device) for v in values]).all()
