"""Norms and inner products of single tensors: every digit, without a copy.

torch sums float32 on the CPU one number after the other, which loses 4e-4 of a norm over 1e7 numbers, and summing in
float64 converts the tensor first, which takes forty times as long. In between: float32 over short pieces, and the
pieces in float64. A GPU sums in a tree and needs none of this.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from . import device

PIECE = 512
"""Numbers that are summed in float32: a relative error of 2e-11 over 1e8 numbers."""

CHUNK = 2**18
"""Numbers that are converted, or multiplied, at a time."""

SAFE = (1e-15, 1e15)
"""Norms whose squares are far from float32's smallest and largest numbers; any other is taken in float64."""


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of each tensor: shape (len(tensors),), float64 on the CPU, elsewhere float32 or wider."""
    if all(device.on_host(t.device) for t in tensors):
        return torch.stack([_norm(t) for t in tensors])
    wide = any(t.dtype == torch.float64 for t in tensors)
    each = torch._foreach_norm(list(tensors), 2, dtype=torch.float64 if wide else torch.float32)
    return torch.stack([n.to(each[0].device) for n in each])


def dots(us: Sequence[Tensor], vs: Sequence[Tensor]) -> Tensor:
    """The inner product of each pair of tensors: shape (len(us),), float64 on the CPU, elsewhere as in `norms`."""
    return torch.stack([_dot(u, v).to(us[0].device) for u, v in zip(us, vs, strict=True)])


def _norm(t: Tensor) -> Tensor:
    flat = _in_memory_order(t)
    if flat.dtype == torch.float64 or len(flat) < PIECE:
        return torch.linalg.vector_norm(flat, dtype=torch.float64)
    norm = torch.linalg.vector_norm(torch.cat([_of_pieces(part) for part in _float32(flat)]))
    if SAFE[0] < norm < SAFE[1]:
        return norm
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(p.double()) for p in flat.split(CHUNK)]))


def _of_pieces(flat: Tensor) -> Tensor:
    whole = len(flat) // PIECE * PIECE
    pieces = torch.linalg.vector_norm(flat[:whole].view(-1, PIECE), dim=1)
    rest = torch.linalg.vector_norm(flat[whole:], dtype=torch.float64)
    return torch.cat([pieces.double(), rest[None]])


def _float32(flat: Tensor) -> Iterator[Tensor]:
    """`flat` itself where it is float32, otherwise a piece at a time."""
    if flat.dtype == torch.float32:
        yield flat
    else:
        for part in flat.split(CHUNK):
            yield part.float()


def _dot(u: Tensor, v: Tensor) -> Tensor:
    if not device.on_host(u.device):
        dtype = torch.promote_types(u.dtype, torch.float32)
        return torch.sum(u.to(dtype) * v.to(dtype))
    alike = u.stride() == v.stride()
    u, v = (_in_memory_order(t) if alike else t.reshape(-1) for t in (u, v))
    dtype = torch.promote_types(u.dtype, torch.float32)
    products = [
        torch.dot(a.to(dtype), b.to(dtype)).double() for a, b in zip(u.split(CHUNK), v.split(CHUNK), strict=True)
    ]
    return torch.stack(products).sum() if products else torch.zeros((), dtype=torch.float64)


def _in_memory_order(t: Tensor) -> Tensor:
    """`t` as a vector in the order of its memory, without a copy where it has no gaps (transposed, channels last)."""
    order = sorted(range(t.dim()), key=lambda d: t.stride(d), reverse=True)
    return t.permute(order).reshape(-1)
