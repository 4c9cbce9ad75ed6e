"""Plain torch loops, alike in one process and in several."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from hf_ssam import TwoPass
from hf_ssam.methods import Method
from hf_ssam.trainer.checkpoints import Settings

SETTINGS = Settings("friendly_sam", {}, 0.1, "global")


def narrow() -> nn.Module:
    """Layers whose tensors do not divide by two, down to one entry: some rank's shard is empty."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))


def batches(rank: int, steps: int, micro: int, size: int = 3) -> list[list[Tensor]]:
    """`steps` lists of `micro` batches of shape (size, 5), other ones for each rank."""
    generator = torch.Generator().manual_seed(rank)
    return [[torch.randn(size, 5, generator=generator) for _ in range(micro)] for _ in range(steps)]


def own_batches(step: int, rank: int) -> list[Tensor]:
    """One batch for rank 0 and two for rank 1, of which the second is not finite in step 1."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    xs = [torch.randn(3, 5, generator=generator) for _ in range(rank + 1)]
    return [*xs[:-1], xs[-1] * torch.inf] if (step, rank) == (1, 1) else xs


def squared(called: nn.Module, x: Tensor, n: int) -> Tensor:
    """Forward and backward of one of `n` micro-batches."""
    loss = called(x).square().mean() / n
    loss.backward()
    return loss


class Interrupted(Exception):
    """Raised by a pass that a test breaks."""


def loop(
    called: nn.Module,
    model: nn.Module,
    steps: list[list[Tensor]],
    method: str | Method = "ssam",
    scope: str = "global",
    break_at: Callable[[int], bool] = lambda calls: False,
) -> TwoPass:
    """Train `model` by calling `called`, with AdamW and a list of micro-batches a step; a step broken off is repeated.

    Args:
        called: the model, or its wrapper.
        model: the owner of the parameters.
        steps: batches, by step and micro-batch.
        method: what TwoPass takes.
        scope: likewise.
        break_at: whether to raise between forward and backward of the pass with this number, from 0.
    """
    two_pass = TwoPass(called, method, 0.1, scope=scope)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    calls = 0

    def forward_backward(x: Tensor, n: int) -> Tensor:
        nonlocal calls
        calls += 1
        loss = called(x).square().mean() / n
        if break_at(calls - 1):
            raise Interrupted
        loss.backward()
        return loss

    for step in steps:
        runs = [partial(forward_backward, x, len(step)) for x in step]
        try:
            two_pass.step(runs)
        except Interrupted:
            two_pass.step(runs)
        optimizer.step()
        optimizer.zero_grad()
    return two_pass


def alone(method: str = "friendly_sam") -> TwoPass:
    """One process and the batches of both ranks, each row weighing the same."""
    model = narrow()
    pairs = zip(batches(0, 5, 2), batches(1, 5, 2), strict=True)
    return loop(model, model, [[torch.cat(both) for both in zip(*pair, strict=True)] for pair in pairs], method)
