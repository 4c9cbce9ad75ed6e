"""Which coordinates are perturbed: `u = v ⊙ M` with a boolean mask that is kept between steps.

    Fisher     M = the coordinates with the largest F_j = Σ_i (∂ℓ_i/∂w_j)²      (Mi et al. 2022, arXiv 2210.05177)
    dynamic    M drops its smallest |g| and grows at random, as in sparse training         (the same paper)
    tensor     whole tensors, by their mean F                                    (Mi et al. 2023, arXiv 2306.17504)
    N:M        of every M coordinates that meet in a product, the N with the largest F     (the same paper)
    random     each coordinate with probability β, divided by β: E[u] = v      (ESAM's SWP, Du et al. 2022, 2110.03141)

`v` is normalised by the norm of all of it beforehand and not again, so that `‖e‖ ≤ ρ`, as in the official code. Masks
come from reduced gradients and from seeds that the step alone determines: ranks and shards agree on them without a
word.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .context import Rule, StepContext
from .space import ParameterSpace
from .tensors import Vector, multiplied

Refresh = Callable[[Vector, Vector, StepContext], Vector]
"""`(v, mask, context) -> mask`, where the old mask is empty before the first refresh."""


def masked(refresh: Refresh, every: int) -> Rule:
    """`v ⊙ M`, with M refreshed at the method's first step and at each `every`-th.

    Until a finite step has made a mask, all is perturbed: an overflow must not turn SAM off until the next refresh.
    """

    def rule(v: Vector, context: StepContext) -> Vector:
        mask = context.state.read("mask")
        if context.step % every == 0 or any(n not in mask for n in v):
            mask = refresh(v, {n: m for n, m in mask.items() if n in v}, context)
            context.state.stage("mask", mask)
            return multiplied(v, mask)
        unknown = context.state.filled("mask") == 0
        return multiplied(v, {n: mask[n] | unknown.to(mask[n].device) for n in v})

    return rule


def largest(space: ParameterSpace, scores: Vector, keep: int, among: Vector | None = None) -> Vector:
    """The mask of the `keep` largest scores, over all tensors and shards: exactly as many, ties to those that come
    first.

    Non-negative floats are ordered as the integers that their bits spell. So the threshold is found in 31 halvings,
    each a count over all shards, without sorting and without the host.

    Args:
        space: the parameters that the scores belong to.
        scores: non-negative.
        keep: from 0 to the number of coordinates in `among`.
        among: the mask of those that may be chosen; None: all.
    """
    order = {n: t.float().contiguous().view(torch.int32) for n, t in scores.items()}
    if among is not None:
        order = {n: t.masked_fill(~among[n], -1) for n, t in order.items()}
    device = next(iter(order.values())).device
    low, high = (torch.full((), x, dtype=torch.int64, device=device) for x in (0, 2**31 - 1))
    for _ in range(31):
        middle = (low + high + 1) // 2
        enough = space.counts({n: t >= middle.to(t.device) for n, t in order.items()}).sum() >= keep
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle - 1)
    above = {n: t > low.to(t.device) for n, t in order.items()}
    tied = {n: t == low.to(t.device) for n, t in order.items()}
    room = keep - space.counts(above).sum()
    return {n: above[n] | (tied[n] & (place <= room.to(place.device))) for n, place in _places(space, tied).items()}


def _places(space: ParameterSpace, mask: Vector) -> Vector:
    """For each true entry of `mask` how many true ones there are up to it, over tensors and shards in order."""
    counts = space.counts(mask)
    earlier = counts.cumsum(0) - counts + space.counts_before(mask)
    return {
        n: t.flatten().cumsum(0).view(t.shape) + offset.to(t.device)
        for (n, t), offset in zip(mask.items(), earlier, strict=True)
    }


def n_of_m(score: Tensor, n: int, m: int, transposed: bool = False) -> Tensor:
    """The mask with the `n` largest of every `m` neighbours among the inputs of each output.

    Args:
        score: of a weight (out, in, ...): a convolution's inputs are flattened as its matrix product has them; vectors
            are kept whole.
        n: kept in each group.
        m: size of a group; divides the number of inputs.
        transposed: whether the weight is (in, out, ...).
    """
    if score.dim() < 2:
        return torch.ones_like(score, dtype=torch.bool)
    rows = score.movedim(0, -1) if transposed else score.flatten(1)
    groups = rows.reshape(-1, m)
    mask = torch.zeros_like(groups, dtype=torch.bool)
    mask.scatter_(1, groups.topk(n, dim=1).indices, True)
    mask = mask.view(rows.shape)
    return (mask.movedim(-1, 0) if transposed else mask.view(score.shape)).contiguous()


def kept_count(space: ParameterSpace, v: Vector, sparsity: float) -> int:
    """`⌊N (1 − s)⌋`, by way of nine digits: 10 · (1 − 0.9) is 0.9999999999999998 in floating point."""
    return int(round(space.numel(v) * (1 - sparsity), 9))
