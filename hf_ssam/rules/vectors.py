"""Vectors over named parameters, and their arithmetic by `torch._foreach_*`.

Every rule of this package is written on a `Vector`, a mapping from parameter name to the *local* tensor of that
parameter (the parameter itself, or this rank's shard of a `DTensor`). Local tensors share storage with the model, so
writing to them writes to the model.

A multiple of a vector is not computed before somebody reads its tensors: a step scales `g` to a direction, the
direction to a perturbation and `ĝ` to the length of `g`, and each of these factors is carried by an operation that
reads the memory anyway. The rules stay pure functions; nothing but `ParameterSpace.write_grads` writes in place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from . import device
from .workspace import copies

Vector = Mapping[str, Tensor]

EPS = 1e-12
"""Added to every norm that divides (official SSAM code, `sam.py`); 0 / (0 + EPS) = 0 keeps a zero gradient zero."""


class Multiple(Mapping[str, Tensor]):
    """`factor · vector`: a vector whose tensors are computed when they are first read, and then once.

    Attributes:
        vector: what it is a multiple of.
        factor: a number, or a tensor of shape ().
    """

    def __init__(self, vector: Vector, factor: float | Tensor):
        self.vector, self.factor = vector, factor

    def __getitem__(self, name: str) -> Tensor:
        if self.factor is not None:
            self.vector, self.factor = copied(self), None
        return self.vector[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.vector)

    def __len__(self) -> int:
        return len(self.vector)

    def __contains__(self, name: object) -> bool:
        return name in self.vector


def parts(v: Vector) -> tuple[Vector, float | Tensor]:
    """`v` as tensors and the factor that they have yet to be multiplied by."""
    if not isinstance(v, Multiple):
        return v, 1.0
    return v.vector, 1.0 if v.factor is None else v.factor


def restricted(v: Vector, names: Iterable[str]) -> Vector:
    """`v` over those of `names` that it has; `v` itself where that is all of it."""
    tensors, factor = parts(v)
    chosen = {n: tensors[n] for n in names if n in tensors}
    return v if len(chosen) == len(tensors) else scaled(chosen, factor)


def scaled(v: Vector, factor: float | Tensor) -> Vector:
    """`factor · v`; `v` itself where the factor is the number 1.

    Args:
        v: a vector.
        factor: a number, or a tensor of shape (), which may live on another device than some of `v`.
    """
    if not isinstance(factor, Tensor) and factor == 1:
        return v
    tensors, own = parts(v)
    return Multiple(tensors, factor if not isinstance(own, Tensor) and own == 1 else own * factor)


def read(value: float | Tensor) -> float | Tensor:
    """`value` as a number where reading it costs nothing, that is on the host; elsewhere it stays on its device."""
    return value.item() if isinstance(value, Tensor) and device.on_host(value.device) else value


def times(norm: Tensor, factor: float | Tensor) -> Tensor:
    """`|factor| · norm`, on the norm's device."""
    if isinstance(factor, Tensor):
        return norm * factor.to(norm.device).abs()
    return norm if abs(factor) == 1 else norm * abs(factor)


def multiply_(tensors: list[Tensor], factor: float | Tensor) -> None:
    """`t ← factor · t` in place for each tensor."""
    factor = read(factor)
    if not tensors or (not isinstance(factor, Tensor) and factor == 1):
        return
    if isinstance(factor, Tensor) and len({t.device for t in tensors} | {factor.device}) > 1:
        for t in tensors:
            t.mul_(factor.to(t.device))
    else:
        torch._foreach_mul_(tensors, factor)


def add_(tensors: list[Tensor], others: list[Tensor], factor: float | Tensor, spent: bool = False) -> None:
    """`t ← t + factor · other` in place for each pair; `spent` others may be overwritten."""
    factor = read(factor)
    if not tensors:
        return
    if isinstance(factor, Tensor):
        others = others if spent else copies(others)
        multiply_(others, factor)
        factor = 1.0
    torch._foreach_add_(tensors, others, alpha=factor)


def copied(v: Vector) -> dict[str, Tensor]:
    """A copy of `v` that nobody else holds, in the memory of the workspace in use."""
    tensors, factor = parts(v)
    new = copies(list(tensors.values()))
    multiply_(new, factor)
    return dict(zip(tensors, new, strict=True))


def multiplied(u: Vector, v: Vector) -> Vector:
    """Coordinate-wise `u ⊙ v`; both have the names of `u`."""
    tensors, factor = parts(u)
    new = dict(zip(tensors, copies(list(tensors.values())), strict=True))
    if new:
        torch._foreach_mul_(list(new.values()), [v[n] for n in new])
    return scaled(new, factor)


def added(u: Vector, v: Vector, factor: float | Tensor = 1.0) -> Vector:
    """`u + factor · v` over the names of either; a missing tensor counts as zero."""
    tensors, own = parts(v)
    both = [n for n in u if n in tensors]
    sums = copied(restricted(u, both)) if both else {}
    add_(list(sums.values()), [tensors[n] for n in both], own * factor)
    rest = scaled({n: tensors[n] for n in tensors if n not in sums}, own * factor)
    return {**{n: sums[n] if n in sums else u[n] for n in u}, **rest}


def move(w: Vector, u: Vector, distance: float, spent: bool = False) -> None:
    """`w ← w + distance · u` in place, over the names of `u`; a `spent` direction may be overwritten."""
    tensors, factor = parts(u)
    add_([w[n] for n in tensors], list(tensors.values()), factor * distance, spent)
