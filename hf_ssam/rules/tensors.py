"""Vectors over named parameters, their arithmetic by `torch._foreach_*`, and the memory that copies of them live in.

Every rule of this package is written on a `Vector`, a mapping from parameter name to the *local* tensor of that
parameter (the parameter itself, or this rank's shard of a `DTensor`). Local tensors share storage with the model, so
writing to them writes to the model.

A multiple of a vector is not computed before somebody reads its tensors: a step scales `g` to a direction, the
direction to a perturbation and `ĝ` to the length of `g`, and each of these factors is carried by an operation that
reads the memory anyway. Rules are pure functions, but that one may write to its own argument (`added_`).

Fresh memory on the CPU costs a page fault every four kilobytes, more than ten copies into memory that is there. So a
step takes its copies from a `Workspace` and gives them back at its end. On a GPU the caching allocator does this, and
every copy is simply a new tensor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar

import torch
from torch import Tensor
from torch._C import _storage_Use_Count

Vector = Mapping[str, Tensor]

EPS = 1e-12
"""Added to every norm that divides (official SSAM code, `sam.py`); 0 / (0 + EPS) = 0 keeps a zero gradient zero."""

HOST = frozenset({"cpu"})
"""Kinds of device whose tensors are in the host's own memory: a value is read without waiting (law 7), fresh memory
costs page faults, sums run one number after the other. An accelerator has none of this."""

ALIGNMENT = 64
"""Torch's memory on the CPU begins at multiples of so many bytes; a kernel may round otherwise where others begin."""

_CURRENT: ContextVar[Workspace | None] = ContextVar("workspace", default=None)


class Workspace:
    """Tensors on the CPU that steps borrow and give back.

    Args:
        keeps: whether memory is kept between steps; without it every copy is fresh.

    Attributes:
        kept: bytes that it holds on to between steps.
    """

    def __init__(self, keeps: bool = True):
        self._keeps = keeps
        self._free: dict[tuple, list[Tensor]] = {}
        self._lent: list[tuple[tuple, Tensor]] = []

    @property
    def kept(self) -> int:
        """Bytes that nobody uses until the next step."""
        return sum(t.nbytes for tensors in self._free.values() for t in tensors)

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Let `copies` borrow from here."""
        token = _CURRENT.set(self)
        try:
            yield
        finally:
            _CURRENT.reset(token)

    def borrow(self, like: Tensor, dtype: torch.dtype | None = None, offset: int = 0) -> Tensor:
        """A tensor laid out like `like`, of its dtype or of `dtype`, `offset` bytes past a multiple of `ALIGNMENT`."""
        if not self._keeps or like.device.type not in HOST:
            return _empty(like, dtype, offset)
        layout = like.shape, like.stride(), dtype or like.dtype, offset
        free = self._free.get(layout)
        tensor = free.pop() if free else _empty(like, dtype, offset)
        self._lent.append((layout, tensor))
        return tensor

    def reclaim(self, but: Iterable[Tensor] = ()) -> None:
        """Take back all that was borrowed, except the tensors `but`, which stay with who has them."""
        held = {id(t) for t in but}
        self._end(lambda t: id(t) not in held)

    def take_back(self, tensors: Iterable[Tensor]) -> None:
        """Take back `tensors` before the step ends: nobody reads them any more."""
        ended = {id(t) for t in tensors}
        self._end(lambda t: id(t) in ended)

    def give_away(self, tensor: Tensor) -> None:
        """Let go of a borrowed tensor for good."""
        self._lent = [entry for entry in self._lent if entry[1] is not tensor]

    def _end(self, which: Callable[[Tensor], bool]) -> None:
        lent, self._lent = self._lent, []
        for layout, tensor in lent:
            if which(tensor):
                self._free.setdefault(layout, []).append(tensor)
            else:
                self._lent.append((layout, tensor))


def _empty(like: Tensor, dtype: torch.dtype | None, offset: int) -> Tensor:
    tensor = torch.empty_like(like, dtype=dtype, requires_grad=False)
    if not offset:
        return tensor
    memory = torch.UntypedStorage(tensor.nbytes + offset)  # a slice would hold on to what it is cut from
    return tensor.set_(memory, offset // tensor.itemsize, tensor.shape, tensor.stride())


_FRESH = Workspace(keeps=False)


def current() -> Workspace:
    """The workspace in use; where there is none, one whose tensors are all fresh."""
    return _CURRENT.get() or _FRESH


def empties(tensors: list[Tensor]) -> list[Tensor]:
    """Tensors laid out like `tensors`, their content undefined, in the memory of the workspace in use."""
    return [current().borrow(t) for t in tensors]


def holders(tensor: Tensor) -> int:
    """How many tensors look at the memory of `tensor`, itself included, as far as torch knows."""
    storage = tensor.untyped_storage()
    return _storage_Use_Count(storage._cdata) - 1  # `storage` is none of them


def _can_borrow(tensors: list[Tensor]) -> bool:
    """Whether there is a workspace that lends memory like that of `tensors`."""
    return _CURRENT.get() is not None and all(t.device.type in HOST for t in tensors)


def in_memory_order(t: Tensor) -> Tensor:
    """`t` as a vector in the order of its memory, without a copy where it has no gaps (transposed, channels last)."""
    return (t if t.is_contiguous() else t.permute(sorted(range(t.dim()), key=t.stride, reverse=True))).reshape(-1)


def copies(tensors: list[Tensor]) -> list[Tensor]:
    """Copies of `tensors`, in the memory of the workspace in use."""
    if not tensors:
        return []
    with torch.no_grad():
        if not _can_borrow(tensors):
            return list(torch._foreach_clone(tensors))
        new = empties(tensors)
        torch._foreach_copy_(new, tensors)
    return new


class Multiple(Mapping[str, Tensor]):
    """`factor · vector`: a vector whose tensors are computed when they are first read, and then once.

    Attributes:
        vector: what it is a multiple of.
        factor: a number, or a tensor of shape ().
    """

    def __init__(self, vector: Vector, factor: float | Tensor):
        self.vector = vector
        self.factor: float | Tensor | None = factor

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
    """`factor · v`; `v` itself where the factor is the number 1. A tensor, shape (), may be on another device."""
    if not isinstance(factor, Tensor) and factor == 1:
        return v
    tensors, own = parts(v)
    return Multiple(tensors, factor if not isinstance(own, Tensor) and own == 1 else own * factor)


def read(value: float | Tensor) -> float | Tensor:
    """`value` as a number where reading it costs nothing, that is on the host; elsewhere it stays on its device."""
    return value.item() if isinstance(value, Tensor) and value.device.type in HOST else value


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


def add_into(outs: Iterable[Tensor], tensors: Iterable[Tensor], others: Iterable[Tensor], factor: float) -> None:
    """`out ← t + factor · other` on the host: the bits of `add_` on a copy, for 12 bytes a float32 number, not 20."""
    with torch.no_grad():
        for out, t, other in zip(outs, tensors, others, strict=True):
            torch.add(t, other, alpha=factor, out=out)


def added(u: Vector, v: Vector, factor: float | Tensor = 1.0) -> Vector:
    """`u + factor · v` over the names of either; a missing tensor counts as zero."""
    tensors, own = parts(v)
    both = [n for n in u if n in tensors]
    sums = _sums(restricted(u, both), [tensors[n] for n in both], own * factor) if both else {}
    rest = scaled({n: tensors[n] for n in tensors if n not in sums}, own * factor)
    return {**{n: sums[n] if n in sums else u[n] for n in u}, **rest}


def _sums(u: Vector, others: list[Tensor], factor: float | Tensor) -> Vector:
    """`u + factor · others`, on the host in one operation where it can be.

    It cannot where `u` has yet to be multiplied, where a factor is on a device, which must not be waited for, or where
    the memory of `u` has gaps: a kernel may round otherwise there.
    """
    tensors, own = parts(u)
    ours, own, factor = list(tensors.values()), read(own), read(factor)
    dense = _can_borrow(ours) and all(t.is_contiguous() for t in ours)
    if isinstance(own, Tensor) or isinstance(factor, Tensor) or own != 1 or not dense:
        sums = copied(u)
        add_(list(sums.values()), others, factor)
        return sums
    new = empties(ours)
    add_into(new, ours, others, factor)
    return dict(zip(tensors, new, strict=True))


def added_(u: Vector, v: Vector, factor: float | Tensor = 1.0) -> Vector:
    """`u + factor · v` in the memory of `u`, over the names of `v`, which `u` has: for a rule's own argument."""
    (tensors, own), (others, other) = parts(u), parts(v)
    add_([tensors[n] for n in others], list(others.values()), other * factor / own)
    return u


def move(w: Vector, u: Vector, distance: float, spent: bool = False) -> None:
    """`w ← w + distance · u` in place, over the names of `u`; a `spent` direction may be overwritten."""
    tensors, factor = parts(u)
    add_([w[n] for n in tensors], list(tensors.values()), factor * distance, spent)
