"""Squared gradients of single samples, `Σ (∂ℓ_i)²`, for rules that ask where the Fisher information is."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import torch

from ..rules.space import ParameterSpace
from ..rules.tensors import Vector
from .ranks import Ranks
from .replay import Replay
from .window import AccumulationWindow, MicroBatchRecord


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
                for record in window.records:
                    for i in range(min(left, record.forward.size)):
                        _add_square(total, record, i, space, ranks)
                        window.examples += 1
                        left -= 1
        finally:
            for name, p in space.params.items():
                p.grad = grads[name]
        return {n: ranks.summed(t) for n, t in total.items()}

    return fisher


def _add_square(total: Vector, record: MicroBatchRecord, i: int, space: ParameterSpace, ranks: Ranks) -> None:
    space.clear_grads()
    if record.rng is not None:
        record.rng.restore()
    with ranks.deferred(), _one_sample_at_a_time():
        record.run(torch.tensor([i]))
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
