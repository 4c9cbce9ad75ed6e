"""How far a method's ascent raises the loss, by ρ, and the ρ that raises it by a tenth.

    r(ρ) = (L(w + ρ u) − L(w)) / L(w)         u the method's own ascent direction on the batch

A step of the engine reports both losses, so a step at each ρ of a grid measures r: by the method's own rules, under
the dropout and the batch statistics of training, on any model that the engine trains.

r depends on how far the model has been trained: with a new head it asks for a ρ that harms the run (`examples/guides/
rho.md`). So a model that training is to change much is first trained plainly on the same few batches, until its loss
is a sixth of what it was; all of that is undone.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..methods.method import Method, Rules, checked_rho
from ..rules.context import ALWAYS
from .replay import unchanged
from .report import StepReport
from .two_pass import TwoPass
from .window import RunPass

TARGET = 0.1
"""What the ascent of a well-chosen ρ adds to the loss, as a share of it; 0.05 to 0.2 is usual."""

GRID = (0.25, 0.5, 1.0, 2.0, 4.0)
"""The radii that are measured on every step, in units of the one that fits the first step."""

FALL = 1 / 6
"""Plain training before the measurement ends where the loss has fallen to this share of what it was."""

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

Step = Sequence[RunPass]
"""The passes of one optimizer step: one callable for each micro-batch."""


@dataclass(frozen=True)
class RhoSuggestion:
    """The radius that raises the loss by `target`, with what it is read from.

    Attributes:
        rho: ρ, two digits; the median over the steps.
        low, high: smallest and largest ρ of a step: how sure `rho` is.
        target: rise asked for, as a share of the loss.
        method: its name.
        losses: the loss at w of each step.
        rises: by ρ of the grid, the rise of each step as a share of its loss.
        plain_steps: how many steps of plain training came before.
    """

    rho: float
    low: float
    high: float
    target: float
    method: str
    losses: tuple[float, ...]
    rises: dict[float, tuple[float, ...]]
    plain_steps: int = 0

    def __str__(self) -> str:
        after = f" after {self.plain_steps} plain steps, undone" if self.plain_steps else ""
        batches = f"{len(self.losses)} batches of loss {statistics.mean(self.losses):.2g}{after}"
        spread = f"{self.low:.2g} to {self.high:.2g} over {batches}"
        return f"rho {self.rho:g}: the ascent of {self.method} raises the loss by {self.target:.0%} ({spread})"


def suggested(
    model: nn.Module,
    method: Method,
    steps: Sequence[Step],
    *,
    target: float = TARGET,
    start: float | None = None,
    optimizer: MakeOptimizer | None = None,
    rounds: int = 12,
    mean_over_ranks: Callable[[Tensor], Tensor] = lambda t: t,
    **engine: Any,
) -> RhoSuggestion:
    """Measure `steps` at a grid of ρ; the model is left as it was to the bit.

    Args:
        model: as it is called, as `TwoPass` takes it; in the mode that it should be measured in.
        method: with its options. Whatever samples or steps it would leave out take part here: what is measured is
            its ascent.
        steps: the passes of a few optimizer steps, which the method sees in this order, each at the same weights.
        target: rise of the loss, as a share of it.
        start: ρ at which the search begins; the method's default where None or 0.
        optimizer: parameters -> an optimizer that trains the model plainly before; None: it is measured as it is.
        rounds: times that this goes over the steps, at most.
        mean_over_ranks: averages a tensor over the ranks, which all call this in step.
        **engine: as `TwoPass` takes it.

    Raises:
        ValueError: for a method without an ascent, a target that is not positive, a loss that is not positive, or an
            ascent that does not raise it.
    """
    whole = _whole_ascent(method)
    if not 0 < target < math.inf:
        raise ValueError(f"target: {target} is not allowed; choose a share of the loss above 0, such as {TARGET}.")

    def rises(rho: float, of: Sequence[Step]) -> list[tuple[float, float]]:
        two_pass = TwoPass(model, whole, rho, **engine)
        return _read([_measured(two_pass, step) for step in of], mean_over_ranks)

    with _as_it_was(model):
        plain_steps = 0 if optimizer is None else _train(model, optimizer, steps, rounds, mean_over_ranks)
        middle = _fitting(lambda rho: rises(rho, steps[:1])[0][1], checked_rho(start, method) or method.rho, target)
        grid = [middle * factor for factor in GRID]
        table = [rises(rho, steps) for rho in grid]
    losses = tuple(loss for loss, _ in table[0])
    curves = {rho: tuple(rise for _, rise in row) for rho, row in zip(grid, table, strict=True)}
    each = [crossing(grid, [curves[rho][i] for rho in grid], target) for i in range(len(steps))]
    rho = float(f"{statistics.median(each):.2g}")
    return RhoSuggestion(rho, min(each), max(each), target, method.name, losses, curves, plain_steps)


def crossing(rhos: Sequence[float], rises: Sequence[float], target: float) -> float:
    """The smallest ρ at which the rise is `target`: between two of `rhos` by powers of ρ, outside in proportion to ρ.

    Args:
        rhos: ascending.
        rises: one for each of them.
        target: above 0.
    """
    above = next((i for i, rise in enumerate(rises) if not rise < target), None)
    if above is None:
        return rhos[-1] * target / rises[-1] if rises[-1] > 0 else math.inf
    before = rises[above - 1] if above else 0.0
    if before <= 0 or not math.isfinite(rises[above]):
        return rhos[above] * (target / rises[above] if math.isfinite(rises[above]) else 0.5)
    power = math.log(target / before) / math.log(rises[above] / before)
    return rhos[above - 1] * (rhos[above] / rhos[above - 1]) ** power


def _whole_ascent(method: Method) -> Method:
    """The method with a second pass in every step, on every sample of the first."""
    if method.build().second_pass.interval is None:
        raise ValueError(
            f"method: `{method.name}` takes no second pass, so no rise of the loss shows its rho; leave it at "
            f"{method.rho:g}, or choose a method that ascends, such as ssam."
        )

    def rules(**values: Any) -> Rules:
        return replace(method.rules(**values), selection=None, second_pass=ALWAYS)

    return replace(method, rules=rules)


def _train(
    model: nn.Module,
    make: MakeOptimizer,
    steps: Sequence[Step],
    rounds: int,
    mean_over_ranks: Callable[[Tensor], Tensor],
) -> int:
    """Train plainly until the loss has fallen to `FALL` of what it was; the number of steps."""
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    seen: list[float] = []
    while len(seen) < rounds and (not seen or seen[-1] > FALL * seen[0]):
        losses = []
        for step in steps:
            losses.append(torch.stack([run().detach().float() for run in step]).sum())
            optimizer.step()
            optimizer.zero_grad()
        seen.append(mean_over_ranks(torch.stack(losses).mean()).item())
    return len(seen) * len(steps)


def _measured(two_pass: TwoPass, step: Step) -> StepReport:
    report = two_pass.step(step)
    two_pass.space.clear_grads()
    return report


def _read(reports: Sequence[StepReport], mean_over_ranks: Callable[[Tensor], Tensor]) -> list[tuple[float, float]]:
    """Loss and rise of each step; a rise that is not finite is infinite."""
    both = ((r.loss.float(), r.ascent_loss.to(r.loss.device).float()) for r in reports if r.ascent_loss is not None)
    pairs = torch.stack([torch.stack(pair) for pair in both])
    found = []
    for here, there in mean_over_ranks(pairs).tolist():
        if not 0 < here < math.inf:
            raise ValueError(
                f"batches: their loss is {here:.3g}, and a rise is measured as a share of a positive one; choose rho "
                "by hand, or measure a loss that is positive."
            )
        found.append((here, (there - here) / here if math.isfinite(there) else math.inf))
    return found


def _fitting(rise_at: Callable[[float], float], rho: float, target: float) -> float:
    """A ρ whose rise is within a factor of 2 of `target`, found by steps in proportion to it."""
    tried = {}
    for _ in range(12):
        tried[rho] = rise = rise_at(rho)
        if target / 2 <= rise <= target * 2:
            return rho
        rho *= min(max(target / rise, 0.01), 100.0) if rise > 0 else 10.0
    seen = ", ".join(f"{rise:.2g} at {rho:.2g}" for rho, rise in tried.items())
    raise ValueError(f"rho: no radius raises the loss by {target:.0%} of itself; it rises by {seen}.")


@contextlib.contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Weights, gradients, buffers and generators are put back."""
    grads = [(p, p.grad) for p in model.parameters()]
    weights = [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad]
    for p, _ in grads:
        p.grad = None
    try:
        with unchanged(model):
            yield
    finally:
        with torch.no_grad():
            for p, weight in weights:
                p.copy_(weight)
        for p, grad in grads:
            p.grad = grad
