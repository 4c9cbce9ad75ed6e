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
from .space import CHUNK, in_memory_order
from .tensors import Vector, copies, empties, parts, scaled

LEVELS = 2**16
"""How many values sixteen bits have."""


def _quantiles() -> Tensor:
    """LEVELS equally likely numbers of mean 0 and variance 1, the quantiles of the standard normal distribution."""
    found = torch.special.ndtri((torch.arange(LEVELS, dtype=torch.float64, device="cpu") + 0.5) / LEVELS)
    return found / found.square().mean().sqrt()


QUANTILES = {dtype: _quantiles().to(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}
"""In each dtype, shape (LEVELS,), ascending; the largest is 4.2."""


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

    On the CPU sixteen random bits choose one of its `QUANTILES`: a distribution function that is right to 2⁻¹⁷, in
    less than half of the time of torch's logarithms and cosines.
    """
    if t.device.type not in tensors_.HOST:
        return t.normal_(generator=generator)
    table = QUANTILES[t.dtype]
    for piece in in_memory_order(t.detach()).split(CHUNK):
        chosen = _sixteen_bits(piece, generator).view(torch.uint16).to(torch.int64)
        torch.index_select(table, 0, chosen, out=piece)
    return t


def _sixteen_bits(t: Tensor, generator: torch.Generator) -> Tensor:
    """int16, shape (len(t),): as many random words as the vector `t` has numbers."""
    words = torch.empty(-(-len(t) // 4), dtype=torch.int64, device=t.device)
    return words.random_(-(2**63), None, generator=generator).view(torch.int16)[: len(t)]


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
    for piece in flat.split(CHUNK) if t.device.type in tensors_.HOST else (flat,):
        bits = _sixteen_bits(piece, generator)
        piece.mul_(torch.lt(bits, limit - LEVELS // 2, out=torch.empty_like(piece)))
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
