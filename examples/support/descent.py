"""Gradient descent without momentum by `TwoPass`: what the studies of a method's own dynamics share."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hf_ssam import METHODS, TwoPass


def descent(
    model: nn.Module, losses: Callable[[int], Tensor], settings: dict[str, Any], learning_rate: float
) -> Iterator[float]:
    """Take steps for ever: yields the loss at the weights before each step, once the step is taken.

    Args:
        model: what trains.
        losses: the loss of step t, with its graph.
        settings: `method` (gradient descent where there is none), `rho`, and options of the method among others.
        learning_rate: η of plain gradient descent.
    """
    name = settings.get("method")
    options = {key: settings[key] for key in METHODS[name].options if key in settings} if name else {}
    two_pass = TwoPass(model, name or "sam", settings["rho"] if name else 0.0, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    step = 0

    def forward_backward() -> Tensor:
        loss = losses(step)
        loss.backward()
        return loss

    while True:
        optimizer.zero_grad()
        report = two_pass.step(forward_backward)
        optimizer.step()
        yield float(report.loss)
        step += 1


class Point(nn.Module):
    """A point in the plane, in double precision, with a loss on it."""

    def __init__(self, start: list[float], loss: Callable[[Tensor], Tensor]):
        super().__init__()
        self.at = nn.Parameter(torch.tensor(start, dtype=torch.float64))
        self.loss = loss

    def forward(self) -> Tensor:
        """The loss at the point."""
        return self.loss(self.at)
