"""Whether ρ is too large for this run: how far its first ascents raise the loss.

    r = (L(w + e) − L(w)) / L(w)         e = ρ u, so to first order r = ρ ⟨∇L(w), u⟩ / L(w)

A method's direction u does not depend on ρ, normalised or not, so to first order r grows in proportion to ρ, and
`ρ · 0.1/r` is the radius at which the ascent would raise the loss by a tenth. Both losses are in every step's report;
they are kept on the device and read where the Trainer reads its own, at a log entry.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from ..engine.radius import TARGET
from ..engine.report import StepReport

STEPS = 20
"""Perturbed steps from the beginning of a run whose median is judged."""

TOO_FAR = 0.5
"""Share of the loss above which the median rise is warned of."""


class AscentRise:
    """Watches the first `STEPS` perturbed steps of a run, and then no more.

    Args:
        seen: perturbed steps that a resumed run had taken before.
        comparable: whether both passes run on the same samples, so that their losses can be compared.
    """

    def __init__(self, seen: int = 0, comparable: bool = True):
        self._left = max(STEPS - seen, 0) if comparable else 0
        self._losses: list[Tensor] = []

    def add(self, report: StepReport) -> None:
        """Take one step's losses, without reading them; a step without a second pass has none to compare."""
        if self._left and report.ascent_loss is not None:
            self._left -= 1
            self._losses.append(torch.stack([report.loss.float(), report.ascent_loss.to(report.loss.device).float()]))

    def judge(self, mean_over_ranks: Callable[[Tensor], Tensor], rho: float) -> str | None:
        """What there is to say about `rho`, once, when the last of the steps has been taken; None: nothing.

        Args:
            mean_over_ranks: averages a tensor over the ranks; all ranks come here at the same step.
            rho: radius ρ that the run was given.
        """
        if self._left or not self._losses:
            return None
        pairs = mean_over_ranks(torch.stack(self._losses)).tolist()
        self._losses = []
        rises = [(there - here) / here for here, there in pairs if here > 0 and there < float("inf")]
        return too_far(statistics.median(rises), len(rises), rho) if rises else None


def too_far(rise: float, steps: int, rho: float) -> str | None:
    """The sentence for a median rise of the loss, as a share of it; None where that is no reason to worry."""
    if not rise > TOO_FAR:
        return None
    return (
        f"rho={rho:g} may be too large: over the first {steps} perturbed steps the ascent raises the loss by "
        f"{rise:.0%} (median), where about {TARGET:.0%} is usual; to first order the rise is proportional to rho, so "
        f"rho={rho * TARGET / rise:.2g} would give that (rho · {TARGET:g}/{rise:.2g})."
    )
