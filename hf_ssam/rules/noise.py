"""Random draws that seed, step and shard alone determine: replicas and resumed runs draw alike without a word.

The process's own generators are neither read nor moved.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from . import tensors as tensors_
from .context import Rule, StepContext
from .rows import row_length, row_norms
from .space import CHUNK
from .tensors import Vector, copies, empties, in_memory_order, parts, scaled

LEVELS = 2**16
"""How many values sixteen bits have."""

LARGE = 2**16
"""Numbers up to which a tensor is drawn by torch, which needs no memory beside it."""


def _points() -> dict[torch.dtype, Tensor]:
    """LEVELS equally likely points of the plane that lie as N(0, I) does, complex, by the dtype of their coordinates.

    Both coordinates run through the quantiles of the normal distribution, one in their order and the other in the
    order of a golden-ratio lattice (Niederreiter, Random Number Generation and Quasi-Monte Carlo Methods, 1992); what
    they still share is taken out of the second: means 0, variances 1, covariance 0. The sums are exact, so that no
    number of threads changes a bit.
    """
    k = torch.arange(LEVELS, dtype=torch.float64, device="cpu")
    x = torch.special.ndtri((k + 0.5) / LEVELS)
    x /= math.sqrt(math.fsum(x.square()) / LEVELS)
    y = x[(k * (math.sqrt(5) - 1) / 2 % 1).argsort().argsort()]
    shared = math.fsum(x * y) / LEVELS
    points = torch.complex(x, (y - shared * x) / math.sqrt(1 - shared**2))
    return {torch.float64: points, torch.float32: points.to(torch.complex64)}


POINTS = _points()
"""Pairs of normal numbers, the largest of which is 4.3."""


def uniform(v: Vector, context: StepContext, seed: int) -> Vector:
    """Numbers from [0, 1), of the shapes of `v`."""
    drawn = {n: torch.empty(t.shape, device=t.device) for n, t in v.items()}
    return _filled(drawn, context, seed, lambda t, generator: t.uniform_(generator=generator))


def normal(v: Vector, context: StepContext, seed: int) -> Vector:
    """Numbers of a standard normal distribution, of the shapes and dtypes of `v`."""
    drawn = dict(zip(v, empties(list(v.values())), strict=True))
    return _filled(drawn, context, seed, normal_)


def normal_(t: Tensor, generator: torch.Generator) -> Tensor:
    """Fill `t`, whose memory has no gaps, in place with numbers of a standard normal distribution.

    In a large tensor on the CPU sixteen random bits choose one of the `POINTS`, two numbers at once, which takes about
    half of the time of logarithms and cosines. The distribution function of a number is right to 7e-5, that of a sum
    `a x + b y` of the two to 8e-4. It needs 7 bytes (float64: 11) for each of at most `CHUNK` numbers besides.
    """
    if t.device.type not in tensors_.HOST or t.numel() <= LARGE:
        return t.normal_(generator=generator)
    points, flat = POINTS[torch.promote_types(t.dtype, torch.float32)], in_memory_order(t.detach())
    words = torch.empty(-(-min(len(flat), CHUNK) // 8), dtype=torch.int64, device=t.device)
    chosen = words.new_empty(4 * len(words), dtype=torch.int32)
    drawn = words.new_empty(4 * len(words), dtype=points.dtype)
    for piece in flat.split(CHUNK):
        n = -(-len(piece) // 8)
        words[:n].random_(-(2**63), None, generator=generator)
        chosen[: 4 * n].copy_(words[:n].view(torch.uint16))
        torch.index_select(points, 0, chosen[: 4 * n], out=drawn[: 4 * n])
        piece.copy_(torch.view_as_real(drawn).flatten()[: len(piece)])
    return t


def thinned(v: Vector, context: StepContext, share: float, seed: int) -> Vector:
    """`v ⊙ M / p`, each coordinate of M drawn with probability p, the multiple of 2⁻¹⁶ next to `share`: E[u] = v.

    Sixteen random bits decide on a coordinate, in memory order: a fifth of the time that as many floats take.
    """
    tensors, factor = parts(v)
    limit = max(1, min(LEVELS - 1, round(share * LEVELS)))
    kept = dict(zip(tensors, copies(list(tensors.values())), strict=True))
    _filled(kept, context, seed, lambda t, generator: _drop(t, limit, generator))
    return scaled(kept, factor * LEVELS / limit)


def _drop(t: Tensor, limit: int, generator: torch.Generator) -> Tensor:
    """Put each number of `t` to zero, in place, unless its sixteen random bits spell less than `limit`."""
    flat = in_memory_order(t)
    pieces = flat.split(CHUNK) if t.device.type in tensors_.HOST else (flat,)
    words = torch.empty(-(-len(pieces[0]) // 4), dtype=torch.int64, device=t.device)
    kept = torch.empty_like(pieces[0])
    for piece in pieces:
        n = len(piece)
        bits = words[: -(-n // 4)].random_(-(2**63), None, generator=generator).view(torch.int16)[:n]
        piece.mul_(torch.lt(bits, limit - LEVELS // 2, out=kept[:n]))
    return t


def filterwise(seed: int) -> Rule:
    """`u_ij ~ N(0, ‖w_i‖²/n)` for each row i of a weight, n its length: every row moves by about its own length.

    Rows are those of `rules.rows`. No rescaling of a row changes its relative noise, and what is zero stays zero. A
    bias or the weight of a normalisation moves as one row, as in LPF-SGD's code; whoever wants vectors left alone, as
    in the plots of Li et al. 2018 (arXiv 1712.09913), says so by `perturb`.
    """

    def rule(v: Vector, context: StepContext) -> Vector:
        drawn = normal(context.w, context, seed)
        norms = row_norms(context.space, context.w)
        lengths = [math.sqrt(max(1, row_length(context.space, n))) for n in drawn]
        scales = torch._foreach_div([norms[n] for n in drawn], lengths)
        torch._foreach_mul_(list(drawn.values()), list(scales))
        return drawn

    return rule


def _filled(
    drawn: dict[str, Tensor], context: StepContext, seed: int, fill: Callable[[Tensor, torch.Generator], Tensor]
) -> dict[str, Tensor]:
    """`drawn`, filled in place one tensor after the other, from one generator a device and shard."""
    generators: dict[tuple, torch.Generator] = {}
    for name, t in drawn.items():
        shard = context.space.shard(name)
        if (t.device, shard) not in generators:
            number = sum(rank * 1009 ** (i + 1) for i, rank in enumerate(shard))
            generator = torch.Generator(t.device)
            generators[t.device, shard] = generator.manual_seed((seed * 1_000_003 + context.step) * 1_000_003 + number)
        fill(t, generators[t.device, shard])
    return drawn
