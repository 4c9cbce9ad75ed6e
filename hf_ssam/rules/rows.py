"""The rows of weights: what one output of a layer is computed with, and norms of them that hold across shards.

A filter of a convolution, a row of a matrix (a column where the layer stores it transposed, as GPT-2's `Conv1D`), the
vector of a token. A parameter of one dimension (a bias, the weight of a normalisation) is one row.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from .space import ParameterSpace
from .tensors import Vector


def whole_rows(space: ParameterSpace, names: tuple[str, ...]) -> None:
    """A check for methods that look at rows: local tensors have them.

    Raises:
        ValueError: where they are flat pieces.
    """
    if space.is_flat:
        raise ValueError(
            "optim: the method looks at the rows of weights, which the partitions of ZeRO stages 1 and 2 cut; set "
            "stage 0, use DDP or FSDP2, or choose a method such as ssam."
        )


def row_dims(space: ParameterSpace, name: str) -> tuple[int, ...]:
    """The dimensions that a row of parameter `name` runs over."""
    dims = range(space.params[name].dim())
    output = 1 if name in space.transposed else 0
    return tuple(d for d in dims if len(dims) < 2 or d != output)


def row_length(space: ParameterSpace, name: str) -> int:
    """Number of entries of a row of parameter `name`, whole across shards."""
    return math.prod(space.params[name].shape[d] for d in row_dims(space, name))


def row_norms(space: ParameterSpace, v: Vector) -> dict[str, Tensor]:
    """Norm of each row of `v`, whole across shards, in shapes that broadcast over the local tensors."""
    squares = {n: _norms(t, row_dims(space, n)).square() for n, t in v.items()}
    cut: dict[tuple[dist.ProcessGroup, ...], list[str]] = {}
    for name in squares:
        cut.setdefault(_groups(space, name), []).append(name)
    for groups, names in cut.items():
        if groups:
            squares.update(_summed({n: squares[n] for n in names}, groups))
    return {n: t.sqrt() for n, t in squares.items()}


def _norms(t: Tensor, dims: tuple[int, ...]) -> Tensor:
    dtype = torch.promote_types(t.dtype, torch.float32)
    return torch.linalg.vector_norm(t, dim=dims, keepdim=True, dtype=dtype) if dims else t.abs().to(dtype)


def _groups(space: ParameterSpace, name: str) -> tuple[dist.ProcessGroup, ...]:
    """The process groups over which single rows of parameter `name` are split."""
    p = space.params[name]
    if not isinstance(p, DTensor):
        return ()
    shards = ((i, cast(Shard, s)) for i, s in enumerate(p.placements) if s.is_shard())
    return tuple(p.device_mesh.get_group(i) for i, s in shards if s.dim % p.dim() in row_dims(space, name))


def _summed(v: Vector, groups: tuple[dist.ProcessGroup, ...]) -> Vector:
    """`v` added up over `groups`, all tensors in one collective."""
    total = torch.cat([t.flatten() for t in v.values()])
    for group in groups:
        dist.all_reduce(total, group=group)
    parts = total.split([t.numel() for t in v.values()])
    return {n: part.view_as(t) for (n, t), part in zip(v.items(), parts, strict=True)}
