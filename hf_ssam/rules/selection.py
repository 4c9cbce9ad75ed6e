"""Which samples: rules that pick the part of a batch that a pass runs on.

    ESAM    pass 1 on B, pass 2 on the γ|B| samples whose loss rises most at w + e     (Du et al. 2022, 2110.03141)
    AUSAM   both passes on α|B| samples, drawn by how much theirs have risen so far    (Deng et al. 2024, 2406.08001)

They select within each micro-batch, and compare losses only between forwards of the same samples under the same
dropout.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .state import MethodState


@dataclass(frozen=True)
class Draw:
    """What a choice before the first pass may depend on.

    Attributes:
        ids: dataset indices of the micro-batch's samples, shape (B,), on the model's device.
        memory: what the method keeps between steps.
        step: how many steps the method has been at work in before this one.
        position: the micro-batch's place in the step, over all ranks.
    """

    ids: Tensor
    memory: MethodState
    step: int
    position: int


@dataclass(frozen=True)
class Selection:
    """What a method picks, and what it learns from the losses; a part that is None does not happen.

    Attributes:
        before: `draw -> indices` of both passes, shape (K,), ascending.
        between: `(losses at w, losses at w + e) -> indices` of the second pass.
        learn: `(ids, rises, sum over ranks, memory, size of the data set)`, after the second pass.
    """

    before: Callable[[Draw], Tensor] | None = None
    between: Callable[[Tensor, Tensor], Tensor] | None = None
    learn: Callable[[Tensor, Tensor, Callable[[Tensor], Tensor], MethodState, int], None] | None = None


def kept(share: float, size: int) -> int:
    """`⌈share · size⌉`, how many samples a share keeps: at least one.

    Rounded to nine digits before: 0.07 · 100 is 7.000000000000001 in floating point, which is not eight samples.
    """
    return max(1, math.ceil(round(share * size, 9)))


def largest_loss_increase(gamma: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The `max(1, ⌈γ B⌉)` samples whose loss rose most: exactly as many, also where losses are equal."""

    def between(at_w: Tensor, at_e: Tensor) -> Tensor:
        return (at_e - at_w).topk(kept(gamma, len(at_w))).indices.sort().values

    return between


def by_rise(alpha: float, s_min: float, s_max: float, seed: int) -> Callable[[Draw], Tensor]:
    """`⌈α B⌉` samples without replacement, with weights from `s_min` to `s_max` by their average rise so far.

    `p_i = s_min + (s_max − s_min)(a_i − min a)/(max a − min a)`, all `s_max` where the a are equal; a sample never
    seen counts as the batch's largest. The form is ours: the paper's own could not be read (its abstract says that
    samples are drawn by an average difference of losses). The mean over the drawn samples is taken unweighted: an
    importance weight (Horvitz-Thompson) would have to enter the loss, which belongs to the model. Drawn as the
    largest p_i / E_i with E_i exponential, which is drawing one after the other without replacement, and asks nothing
    of the host.
    """

    def before(draw: Draw) -> Tensor:
        mean, count = (read_scores(draw.memory, name, draw.ids) for name in ("mean", "count"))
        seen = count > 0
        low = mean.masked_fill(~seen, math.inf).min()
        high = mean.masked_fill(~seen, -math.inf).max()
        span = high - low
        place = torch.where(seen & (span > 0), (mean - low) / span, 1.0)
        generator = torch.Generator(draw.ids.device)
        generator.manual_seed((seed * 1_000_003 + draw.step) * 1_000_003 + draw.position)
        waits = torch.empty_like(mean).exponential_(generator=generator)
        weights = s_min + (s_max - s_min) * place
        return (weights / waits).topk(kept(alpha, len(mean))).indices.sort().values

    return before


def read_scores(memory: MethodState, name: str, ids: Tensor) -> Tensor:
    """The scores of samples `ids`, zero before the first finite step."""
    scores = memory.plain(f"samples.{name}")
    return torch.zeros(len(ids), device=ids.device) if scores is None else scores[ids]


def average_rise(
    ids: Tensor, rises: Tensor, summed: Callable[[Tensor], Tensor], memory: MethodState, size: int
) -> None:
    """Keep, for each sample, the average of its rises and how many there were, the same on every rank.

    Args:
        ids: dataset indices, shape (K,).
        rises: `ℓ_i(w + e) − ℓ_i(w)`, shape (K,).
        summed: adds a tensor up over the ranks.
        memory: takes the scores, two tensors of shape (size,).
        size: number of samples in the data set.
    """
    new = torch.zeros(2, size, device=ids.device)
    new[0].index_add_(0, ids, rises.float())
    new[1].index_add_(0, ids, torch.ones_like(rises, dtype=torch.float32))
    new = summed(new)
    every = torch.arange(size, device=ids.device)
    mean, count = (read_scores(memory, name, every) for name in ("mean", "count"))
    total = count + new[1]
    mean = mean + (new[0] - new[1] * mean) / total.clamp(min=1)
    memory.stage_plain({"samples.mean": mean, "samples.count": total})
