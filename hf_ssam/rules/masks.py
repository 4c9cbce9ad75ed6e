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

import math
import re
from collections.abc import Callable

import torch
from torch import Tensor

from .context import Rule, StepContext
from .tensors import ParameterSpace, Vector, multiplied

Refresh = Callable[[Vector, Vector, StepContext], Vector]
"""`(v, mask, at) -> mask`, where the old mask is empty before the first refresh."""


def masked(refresh: Refresh, every: int) -> Rule:
    """`v ⊙ M`, with M refreshed at the method's first step and at each `every`-th.

    Until a finite step has made a mask, all is perturbed: an overflow must not turn SAM off until the next refresh.
    """

    def rule(v: Vector, at: StepContext) -> Vector:
        mask = at.memory.read("mask")
        if at.step % every == 0 or any(n not in mask for n in v):
            mask = refresh(v, {n: m for n, m in mask.items() if n in v}, at)
            at.memory.stage("mask", mask)
            return multiplied(v, mask)
        unknown = at.memory.filled("mask") == 0
        return multiplied(v, {n: mask[n] | unknown.to(mask[n].device) for n in v})

    return rule


def fisher(sparsity: float, samples: int) -> Refresh:
    """The `int(N (1 − s))` coordinates with the largest empirical Fisher information, over all tensors."""

    def refresh(v: Vector, mask: Vector, at: StepContext) -> Vector:
        return largest(at.space, at.fisher(v, samples), _kept(at.space, v, sparsity))

    return refresh


def fisher_tensors(sparsity: float, samples: int) -> Refresh:
    """Whole tensors in the order of their mean Fisher information, until `int(N (1 − s))` coordinates are reached."""

    def refresh(v: Vector, mask: Vector, at: StepContext) -> Vector:
        information = at.fisher(v, samples)
        sizes = torch.tensor([float(at.space.numel([n])) for n in v], dtype=torch.float64)
        mean = at.space.norms({n: t.sqrt() for n, t in information.items()}).double().square()
        mean = mean / sizes.to(mean.device)
        order = mean.argsort(descending=True, stable=True)
        before = sizes.to(mean.device)[order].cumsum(0) - sizes.to(mean.device)[order]
        kept = torch.zeros_like(mean, dtype=torch.bool)
        kept[order] = before < _kept(at.space, v, sparsity)
        return {n: k.to(t.device).expand_as(t).clone() for (n, t), k in zip(v.items(), kept, strict=True)}

    return refresh


def fisher_n_of_m(n: int, m: int, samples: int) -> Refresh:
    """In each group of `m` inputs of a weight the `n` with the largest Fisher information; vectors are whole."""

    def refresh(v: Vector, mask: Vector, at: StepContext) -> Vector:
        information = at.fisher(v, samples)
        return {k: n_of_m(t, n, m, k in at.space.transposed) for k, t in information.items()}

    return refresh


def dynamic(sparsity: float, drop_rate: float, seed: int) -> Refresh:
    """A random mask that then loses its smallest |v| and grows as many others at random.

    The share that is exchanged falls as `½ drop_rate (1 + cos π t)`, where t is how far the run is; a host that does
    not say how long the run is keeps it at `drop_rate`.
    """

    def refresh(v: Vector, mask: Vector, at: StepContext) -> Vector:
        noise = uniform(v, at, seed)
        live = _kept(at.space, v, sparsity)
        if mask.keys() != v.keys():
            return largest(at.space, noise, live)
        rate = 0.5 * drop_rate * (1 + math.cos(math.pi * at.progress))
        stay = max(int(live * (1 - rate)), 2 * live - at.space.numel(v))
        stays = largest(at.space, {n: t.abs() for n, t in v.items()}, stay, among=mask)
        grown = largest(at.space, noise, live - stay, among={n: ~t for n, t in mask.items()})
        exchanged = {n: stays[n] | grown[n] for n in v}
        known = at.memory.plain("mask.filled")  # false while every step so far overflowed: the mask there is zeros
        if known is None:
            return exchanged
        fresh = largest(at.space, noise, live)
        return {n: torch.where(known.to(t.device), t, fresh[n]) for n, t in exchanged.items()}

    return refresh


def random_subset(beta: float, seed: int) -> Rule:
    """`v ⊙ M / β`, each coordinate of M drawn anew at each step with probability β; β = 1 leaves `v` alone.

    Per coordinate as in the paper. The official code (dydjw9/Efficient_SAM) draws whole tensors and takes the norm of
    those drawn, which makes `E[e]` something else than SAM's e.
    """

    def rule(v: Vector, at: StepContext) -> Vector:
        drawn = uniform(v, at, seed)
        return multiplied(v, {n: (t < beta).to(v[n].dtype) / beta for n, t in drawn.items()})

    return rule if beta < 1 else lambda v, at: v


def uniform(v: Vector, at: StepContext, seed: int) -> Vector:
    """Numbers from [0, 1), of the shapes of `v`: a function of seed, step and shard, so replicas draw the same."""
    generators: dict[tuple, torch.Generator] = {}
    drawn = {}
    for name, t in v.items():
        shard = at.space.shard(name)
        if (t.device, shard) not in generators:
            number = sum(rank * 1009 ** (i + 1) for i, rank in enumerate(shard))
            generator = torch.Generator(t.device)
            generators[t.device, shard] = generator.manual_seed((seed * 1_000_003 + at.step) * 1_000_003 + number)
        drawn[name] = torch.rand(t.shape, device=t.device, generator=generators[t.device, shard])
    return drawn


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


def read_n_of_m(structure: str) -> tuple[int, int]:
    """`"2:4"` as (2, 4).

    Raises:
        ValueError: if it is not of that form, or N is not from 1 to below M.
    """
    found = re.fullmatch(r"(\d+):(\d+)", structure)
    if not found or not 1 <= int(found[1]) < int(found[2]):
        raise ValueError(
            f"optim_args: structure={structure} is not allowed for method `sparse_sam`; choose element, tensor, "
            "or N:M with 1 <= N < M, such as structure=2:4."
        )
    return int(found[1]), int(found[2])


def divides(m: int) -> Callable[[ParameterSpace, tuple[str, ...]], None]:
    """A check that groups of `m` fit every weight that is perturbed, on every shard."""

    def check(space: ParameterSpace, names: tuple[str, ...]) -> None:
        for name, w in space.weights(names).items():
            inputs = w.shape[0] if name in space.transposed else w[0].numel() if w.dim() > 1 and len(w) else m
            if w.dim() > 1 and inputs % m:
                raise ValueError(
                    f"optim_args: groups of {m} do not divide the {inputs} inputs of `{name}`; choose an M that does, "
                    "structure=element, or leave the parameter out with `perturb`."
                )

    return check


def whole_gradients(space: ParameterSpace, names: tuple[str, ...]) -> None:
    """Refuse sharded parameters: their gradients are averaged over ranks before anyone sees one sample's."""
    if space.is_sharded:
        raise ValueError(
            "optim_args: mask=fisher needs the gradient of each sample, which a sharded model averages over ranks; "
            "choose mask=dynamic, or train with DDP."
        )


def _kept(space: ParameterSpace, v: Vector, sparsity: float) -> int:
    """`⌊N (1 − s)⌋`, by way of nine digits: 10 · (1 − 0.9) is 0.9999999999999998 in floating point."""
    return int(round(space.numel(v) * (1 - sparsity), 9))
