"""What a step reports: numbers that stay on the device until somebody logs them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did. Tensors have shape () and stay on the device; a pass that did not run leaves None.

    Attributes:
        loss: sum of what the first passes returned.
        ascent_loss: sum of what the second passes returned, at `w + e`.
        grad_norm: `‖g‖`, loss scale undone.
        ascent_grad_norm: `‖ĝ‖`, loss scale undone.
        perturbation_norm: `‖e‖ = ρ ‖u‖`.
        scale: γ, the factor applied to `ĝ`; 1 where the method does not renormalise.
        passes: forward-backward passes over the batch: where a pass runs on some of the samples, their share counts.
        forwards: the same for forwards; above `passes` where a method looks at losses without a gradient.
        skipped: bool; whether a loss or a norm was not finite, so that this gradient must not be applied.

    Under `micro_batch` losses are summed and the other fields averaged over the micro-batches.
    """

    loss: Tensor
    grad_norm: Tensor
    skipped: Tensor
    ascent_loss: Tensor | None = None
    ascent_grad_norm: Tensor | None = None
    perturbation_norm: Tensor | None = None
    scale: Tensor | float = 1.0
    passes: float = 1.0
    forwards: float = 1.0


def merged(reports: list[StepReport]) -> StepReport:
    """One report of several windows: losses add up, the rest is averaged, one skip skips all."""

    def values(name: str) -> list:
        return [v for r in reports if (v := getattr(r, name)) is not None]

    def mean(name: str) -> Any:
        return sum(values(name)) / len(values(name)) if values(name) else None

    return StepReport(
        loss=sum(values("loss")),
        grad_norm=mean("grad_norm"),
        skipped=torch.stack(values("skipped")).any(),
        ascent_loss=sum(values("ascent_loss")) if values("ascent_loss") else None,
        ascent_grad_norm=mean("ascent_grad_norm"),
        perturbation_norm=mean("perturbation_norm"),
        scale=mean("scale"),
        passes=mean("passes"),
        forwards=mean("forwards"),
    )
