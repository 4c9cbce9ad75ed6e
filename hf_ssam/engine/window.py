"""What a step remembers between its passes: each micro-batch as its first pass saw it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..rules.tensors import ParameterSpace, Vector
from .forward_recorder import RecordedForward
from .ranks import Ranks
from .replay import RandomState, Replay

RunPass = Callable[..., Tensor]
"""`() -> loss`, forward and backward; `(indices) -> loss` on some of its samples, for methods that select."""


@dataclass
class MicroBatchRecord:
    """One micro-batch.

    Attributes:
        run: its pass.
        rng: the generators as its first pass found them; None where they are not replayed.
        ids: dataset indices of its samples, where the method asks for them.
        index: which samples both passes run on; None: all.
        sight: the first pass's call of the model, where the method looks.
        rises: what the second pass's losses were above the first's, one a sample of `index`.
        first, second, looks: cost of its passes and of forwards without gradient, as shares of its samples.
    """

    run: RunPass
    rng: RandomState | None
    ids: Tensor | None = None
    index: Tensor | None = None
    sight: RecordedForward | None = None
    rises: Tensor | None = None
    first: float = 1.0
    second: float = 0.0
    looks: float = 0.0

    def rewind(self) -> None:
        """Put the generators to where the first pass found them."""
        if self.rng is not None:
            self.rng.restore()


@dataclass
class AccumulationWindow:
    """The passes that ascend together: all micro-batches of a step, or one of them under `micro_batch`."""

    buffers_seen: Any
    buffers_due: bool
    loss_scale: float | Tensor | None
    passes: list[MicroBatchRecord] = field(default_factory=list)
    loss: Tensor | float = 0.0
    share: float | Tensor = 0.0
    anticipated: Vector = field(default_factory=dict)
    examples: int = 0

    def unit(self, scope: str) -> float | Tensor:
        """What the window's gradient is a multiple of: the loss scale, and its share where it ascends by itself."""
        share = 1.0 if scope == "global" else self.share
        if isinstance(share, Tensor):  # of no counted item: its gradient is zero in any unit
            share = torch.where(share == 0, torch.ones_like(share), share)
        return share if self.loss_scale is None else share * self.loss_scale

    def cost(self) -> tuple[float, float]:
        """Forward-backward passes and forwards, each in units of the whole batch."""
        n = len(self.passes)
        passes = sum(s.first + s.second for s in self.passes) / n
        if self.examples:
            passes += self.examples / sum(s.sight.size for s in self.passes)
        return passes, passes + sum(s.looks for s in self.passes) / n


def squared_gradients(
    window: AccumulationWindow, space: ParameterSpace, ranks: Ranks, replay: Replay
) -> Callable[[Vector, int], Vector]:
    """`(v, samples) -> Σ (∂ℓ_i)²` by one backward pass a sample, with its true label, at the weights as they are.

    As many samples as asked for, of all ranks together (rounded up to as many on each), or what the step has. Nobody
    sees these passes: generators, buffers and `.grad` are as before. BatchNorm normalises by its running statistics,
    since one sample has no others (the official code lets each sample be its own batch, and move them). Only the
    proportions of the result mean something: losses carry their scale and share.
    """

    def fisher(v: Vector, samples: int) -> Vector:
        grads = {n: p.grad for n, p in space.params.items()}
        total = {n: torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for n, t in v.items()}
        left = math.ceil(samples / ranks.world_size)
        try:
            with replay.replaying(window.buffers_seen), replay.single_samples():
                for seen in window.passes:
                    for i in range(min(left, seen.sight.size)):
                        _add_square(total, seen, i, space, ranks)
                        window.examples += 1
                        left -= 1
        finally:
            for name, p in space.params.items():
                p.grad = grads[name]
        return {n: ranks.summed(t) for n, t in total.items()}

    return fisher


def _add_square(total: Vector, seen: MicroBatchRecord, i: int, space: ParameterSpace, ranks: Ranks) -> None:
    space.clear_grads()
    seen.rewind()
    with ranks.deferred(), _one_sample_at_a_time():
        seen.run(torch.tensor([i]))
    grads = {n: g.to(total[n].dtype).nan_to_num(0.0, 0.0, 0.0) for n, g in space.grads().items() if n in total}
    squares = list(grads.values())
    torch._foreach_addcmul_([total[n] for n in grads], squares, squares)


@contextlib.contextmanager
def _one_sample_at_a_time() -> Iterator[None]:
    try:
        yield
    except ValueError as error:  # what a norm over the batch without running statistics raises
        raise ValueError(
            f"optim_args: mask=fisher runs the model on one sample at a time, which it cannot do in training mode "
            f"({error}); choose mask=dynamic."
        ) from error
