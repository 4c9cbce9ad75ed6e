"""The parameters that vectors run over: their gradients, and norms that hold across shards.

A local tensor does not know how much of the whole it holds; `ParameterSpace` does, and it alone talks to other ranks.

torch sums float32 on the CPU one number after the other, which loses 4e-4 of a norm over 1e7 numbers, and summing in
float64 converts the tensor first, which takes forty times as long. In between: float32 over short pieces, and the
pieces in float64. A GPU sums in a tree and needs none of this.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from . import tensors as tensors_
from .tensors import Vector, in_memory_order, multiply_, parts, times

PIECE = 512
"""Numbers that are summed in float32: a relative error of 2e-11 over 1e8 numbers."""

CHUNK = 2**18
"""Numbers that are converted, or multiplied, at a time."""

SAFE = (1e-15, 1e15)
"""Norms whose squares are far from float32's smallest and largest numbers; any other is taken in float64."""


def local(tensor: Tensor) -> Tensor:
    """This rank's part of `tensor`, sharing its storage."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharding_groups(tensor: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """The process groups over which `tensor` is split; empty for a plain or fully replicated tensor."""
    if not isinstance(tensor, DTensor):
        return ()
    mesh, placements = tensor.device_mesh, tensor.placements
    return tuple(mesh.get_group(i) for i, p in enumerate(placements) if p != Replicate())


class ParameterSpace:
    """The parameters that vectors run over, and how their squares add up across shards.

    Args:
        named: parameters by name, without duplicates (`nn.Module.named_parameters` lists tied weights once).
        transposed: names of weights whose first dimension is the inputs, as in `Conv1D` of GPT-2.

    Attributes:
        is_flat: whether local tensors are pieces without the parameter's shape.
    """

    is_flat = False

    def __init__(self, named: Mapping[str, nn.Parameter], transposed: Iterable[str] = ()):
        self.params = dict(named)
        self.transposed = frozenset(transposed)
        self._groups = {name: sharding_groups(p) for name, p in self.params.items()}

    def weights(self, names: Iterable[str] | None = None) -> Vector:
        """Local weights, sharing storage with the model."""
        return {n: local(self.params[n].detach()) for n in (self.params if names is None else names)}

    def stored(self, names: Iterable[str]) -> list[Tensor]:
        """The tensors that moving the named weights writes to, in the order of `names` where each weight is one."""
        return list(self.weights(names).values())

    def alone(self, names: Iterable[str], known: Container[str]) -> bool:
        """Whether all are plain weights on the CPU that no other tensor looks at, but one for each name of `known`."""
        return all(_alone(self.params[n], 1 + (n in known)) for n in names)

    def rebind(self, w: Vector) -> None:
        """Let parameters be in the memory of `w` again: a forward may have put another tensor in `p.data`."""
        for name, tensor in w.items():
            p = self.params[name]
            if type(p) is nn.Parameter:
                p.data = tensor

    def refresh_model(self) -> None:
        """Let the model compute with weights that were written to; it does where they are its own."""

    def grads(self) -> Vector:
        """Local gradients, sharing storage with `.grad`; a parameter without one is left out.

        Every rank calls this where layers are split by hand: a gradient that is split otherwise than its parameter is
        put in order first.
        """
        return {n: local(_laid_out(p)) for n, p in self.params.items() if p.grad is not None}

    def clear_grads(self) -> None:
        """Set every `.grad` to None."""
        for p in self.params.values():
            p.grad = None

    def take_grads(self) -> dict[str, Tensor]:
        """The `.grad` of every parameter that has one, taken out of it."""
        taken = {n: p.grad for n, p in self.params.items() if p.grad is not None}
        self.clear_grads()
        return taken

    def add_grads_to(self, earlier: dict[str, Tensor]) -> None:
        """Make `.grad` the sum of what was taken earlier and what is there now."""
        present = self.grads()
        both = [n for n in earlier if n in present]
        if both:
            torch._foreach_add_([present[n] for n in both], [local(earlier[n]) for n in both])
        for name in earlier.keys() - present.keys():
            self.params[name].grad = earlier[name]

    def write_grads(self, d: Vector) -> None:
        """Make `d` the gradient: in place where one exists (DDP may alias it to a bucket), else as a new tensor."""
        tensors, factor = parts(d)
        present = dict(self.grads())
        moved = [n for n in tensors if n in present and not _same_memory(tensors[n], present[n])]
        if moved:
            torch._foreach_copy_([present[n] for n in moved], [tensors[n] for n in moved])
        for name in (n for n in tensors if n not in present):
            present[name] = tensors[name].clone()
            self.params[name].grad = self.globalized(name, present[name])
        multiply_([present[n] for n in tensors], factor)

    def globalized(self, name: str, tensor: Tensor) -> Tensor:
        """`tensor`, laid out like the local part of parameter `name`, as that parameter's kind of tensor."""
        p = self.params[name]
        if not isinstance(p, DTensor):
            return tensor
        return DTensor.from_local(
            tensor, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
        )

    def localized(self, name: str, tensor: Tensor) -> Tensor:
        """This rank's part of `tensor`, laid out and placed like parameter `name`: the inverse of `globalized`."""
        p = self.params[name]
        if isinstance(p, DTensor) and not isinstance(tensor, DTensor):
            tensor = distribute_tensor(tensor.to(p.device), p.device_mesh, p.placements)
        return local(tensor).to(local(p).device)

    def norms(self, v: Vector) -> Tensor:
        """Euclidean norm of each tensor of `v`, whole across shards: shape (len(v),), float32 or wider."""
        if not v:
            return torch.zeros(0)
        tensors, factor = parts(v)
        each = norms_of(list(tensors.values()))
        each = self._summed(tensors, each.square()).sqrt() if any(self._groups[n] for n in tensors) else each
        return times(each, factor)

    def norm(self, v: Vector) -> Tensor:
        """Global Euclidean norm of `v`: shape (), the same bits on every rank that holds `v` or a shard of it."""
        return torch.linalg.vector_norm(self.norms(v))

    def dots(self, u: Vector, v: Vector) -> Tensor:
        """Inner product of each pair of tensors, over the names that both have: shape (number of such names,)."""
        names = [n for n in u if n in v]
        if not names:
            return torch.zeros(0)
        (us, fu), (vs, fv) = parts(u), parts(v)
        each = self._summed(names, dots_of([us[n] for n in names], [vs[n] for n in names]))
        return each * fu * fv

    def dot(self, u: Vector, v: Vector) -> Tensor:
        """Global inner product `⟨u, v⟩`: shape ()."""
        return self.dots(u, v).sum()

    def counts(self, masks: Vector) -> Tensor:
        """How many entries of each mask are true, whole across shards: shape (len(masks),), int64."""
        each = [t.sum() for t in masks.values()]
        return self._summed(masks, torch.stack([c.to(each[0].device) for c in each]))

    def counts_before(self, masks: Vector) -> Tensor:
        """How many true entries of each mask lie on earlier shards of the same tensor: shape (len(masks),), int64."""
        each = [t.sum() for t in masks.values()]
        counts = torch.stack([c.to(each[0].device) for c in each])
        before = torch.zeros_like(counts)
        for groups, index in self._by_sharding(masks):
            part = counts[index]
            for group in reversed(groups):
                parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
                dist.all_gather(parts, part, group=group)
                before[index] += sum(parts[: dist.get_rank(group)], torch.zeros_like(part))
                part = sum(parts, torch.zeros_like(part))
        return before

    def shard(self, name: str) -> tuple[int, ...]:
        """Which part of parameter `name` this rank holds: its rank in each group that the tensor is split over."""
        return tuple(dist.get_rank(group) for group in self._groups[name])

    def numel(self, names: Iterable[str]) -> int:
        """Number of coordinates of the named parameters, whole across shards."""
        return sum(self.params[n].numel() for n in names)

    @property
    def device(self) -> torch.device:
        """Where the first parameter is."""
        return next(iter(self.params.values())).device

    @property
    def is_sharded(self) -> bool:
        """Whether any parameter is split across ranks."""
        return any(self._groups.values())

    def _by_sharding(self, names: Iterable[str]) -> Iterable[tuple[tuple[dist.ProcessGroup, ...], list[int]]]:
        """Which of `names` are split over the same groups, by position."""
        positions: dict[tuple[dist.ProcessGroup, ...], list[int]] = {}
        for i, name in enumerate(names):
            positions.setdefault(self._groups[name], []).append(i)
        return positions.items()

    def _summed(self, names: Iterable[str], partial: Tensor) -> Tensor:
        """Add up `partial` (one number a name) over the ranks that share each tensor; one collective a sharding."""
        for groups, index in self._by_sharding(names):
            if not groups:
                continue
            # an index list is copied to the device, which waits for it
            part = partial if len(index) == len(partial) else partial[index]
            for group in groups:
                dist.all_reduce(part, group=group)
            if part is not partial:
                partial[index] = part
        return partial


def _alone(p: nn.Parameter, holders: int) -> bool:
    is_plain = type(p) is nn.Parameter and p.device.type in tensors_.HOST and p.layout == torch.strided
    is_own = is_plain and p.untyped_storage().nbytes() == p.nbytes and not p.is_shared()
    return is_own and p.data_ptr() % p.itemsize == 0 and tensors_.holders(p) == holders


def _laid_out(p: nn.Parameter) -> Tensor:
    """`p.grad`, split as `p` is: layers that are split by hand (tensor parallelism) may leave it otherwise."""
    grad = cast(Tensor, p.grad)
    if isinstance(grad, DTensor) and isinstance(p, DTensor) and grad.placements != p.placements:
        p.grad = grad = grad.redistribute(placements=p.placements)
    return grad


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride())


def norms_of(tensors: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of each tensor: shape (len(tensors),), float64 on the CPU, elsewhere float32 or wider."""
    if all(t.device.type in tensors_.HOST for t in tensors):
        return _host_norms(tensors)
    wide = any(t.dtype == torch.float64 for t in tensors)
    each = torch._foreach_norm(list(tensors), 2, dtype=torch.float64 if wide else torch.float32)
    return torch.stack([n.to(each[0].device) for n in each])


def dots_of(us: Sequence[Tensor], vs: Sequence[Tensor]) -> Tensor:
    """The inner product of each pair of tensors: shape (len(us),), float64 on the CPU, elsewhere as in `norms_of`."""
    return torch.stack([_dot(u, v).to(us[0].device) for u, v in zip(us, vs, strict=True)])


def _host_norms(tensors: Sequence[Tensor]) -> Tensor:
    """Squares of pieces are summed for all tensors at once; what float32 cannot square is taken once more."""
    is_short = [t.dtype == torch.float64 or t.numel() < PIECE for t in tensors]
    short = [t for t, whole in zip(tensors, is_short, strict=True) if whole]
    norms = iter(torch._foreach_norm(short, 2, dtype=torch.float64) if short else ())
    pieces = [
        [next(norms)[None]] if whole else list(_pieces(in_memory_order(t)))
        for t, whole in zip(tensors, is_short, strict=True)
    ]
    squares = torch.cat([p for of_one in pieces for p in of_one]).double().square()
    lengths = torch.tensor([sum(map(len, of_one)) for of_one in pieces], device="cpu")
    each = torch.segment_reduce(squares, "sum", lengths=lengths).sqrt()
    for i in torch.nonzero(~((each > SAFE[0]) & (each < SAFE[1])))[:, 0].tolist():
        if pieces[i][0].dtype != torch.float64:
            chunks = in_memory_order(tensors[i]).split(CHUNK)
            each[i] = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(c.double()) for c in chunks]))
    return each


def _pieces(flat: Tensor) -> Iterator[Tensor]:
    """Norms of `PIECE` numbers each, and of what is left over; what is not float32 is converted a chunk at a time."""
    for part in (flat,) if flat.dtype == torch.float32 else (chunk.float() for chunk in flat.split(CHUNK)):
        whole = len(part) // PIECE * PIECE
        yield torch.linalg.vector_norm(part[:whole].view(-1, PIECE), dim=1)
        if whole < len(part):
            yield torch.linalg.vector_norm(part[whole:], dtype=torch.float64)[None]


def _dot(u: Tensor, v: Tensor) -> Tensor:
    if u.device.type not in tensors_.HOST:
        dtype = torch.promote_types(u.dtype, torch.float32)
        return torch.sum(u.to(dtype) * v.to(dtype))
    alike = u.stride() == v.stride()
    u, v = (in_memory_order(t) if alike else t.reshape(-1) for t in (u, v))
    dtype = torch.promote_types(u.dtype, torch.float32)
    products = [
        torch.dot(a.to(dtype), b.to(dtype)).double() for a, b in zip(u.split(CHUNK), v.split(CHUNK), strict=True)
    ]
    return torch.stack(products).sum() if products else torch.zeros((), dtype=torch.float64)
