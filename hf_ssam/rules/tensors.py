"""Vectors over named parameters: norms that hold across shards, arithmetic by `torch._foreach_*`, snapshots.

Every rule of this package is written on a `Vector`, a dictionary from parameter name to the *local* tensor of that
parameter (the parameter itself, or this rank's shard of a `DTensor`). Local tensors share storage with the model, so
writing to them writes to the model. What a local tensor cannot know is how much of the whole it holds;
`ParameterSpace` does, and it alone talks to other ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

Vector = dict[str, Tensor]

EPS = 1e-12
"""Added to every norm that divides (official SSAM code, `sam.py`); 0 / (0 + EPS) = 0 keeps a zero gradient zero."""


def local(tensor: Tensor) -> Tensor:
    """This rank's part of `tensor`, sharing its storage."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharding_groups(tensor: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """The process groups over which `tensor` is split; empty for a plain or fully replicated tensor."""
    if not isinstance(tensor, DTensor):
        return ()
    mesh, placements = tensor.device_mesh, tensor.placements
    return tuple(mesh.get_group(i) for i, p in enumerate(placements) if p != Replicate())


def accumulation_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """What squares are summed in: float64 on the CPU, elsewhere float32, or float64 where a tensor has it.

    Half precision overflows; and torch sums float32 on the CPU one after the other, which loses 4e-4 of a norm over
    1e7 numbers, where a GPU's tree of sums does not.
    """
    wide = any(t.dtype == torch.float64 or t.device.type == "cpu" for t in tensors)
    return torch.float64 if wide else torch.float32


def scaled(v: Vector, factor: float | Tensor) -> Vector:
    """`factor · v`; a tensor factor has shape () and may live on another device than some of `v`."""
    if isinstance(factor, Tensor) and len({t.device for t in v.values()}) > 1:
        return {name: t * factor.to(t.device) for name, t in v.items()}
    return dict(zip(v, torch._foreach_mul(list(v.values()), factor), strict=True)) if v else {}


def multiplied(u: Vector, v: Vector) -> Vector:
    """Coordinate-wise `u ⊙ v`; both have the names of `u`."""
    return dict(zip(u, torch._foreach_mul(list(u.values()), [v[n] for n in u]), strict=True)) if u else {}


def added(u: Vector, v: Vector, factor: float | Tensor = 1.0) -> Vector:
    """`u + factor · v` over the names of either; a missing tensor counts as zero."""
    w = scaled({n: t for n, t in v.items()}, factor) if isinstance(factor, Tensor) or factor != 1 else v
    both = [n for n in u if n in w]
    sums = dict(zip(both, torch._foreach_add([u[n] for n in both], [w[n] for n in both]), strict=True)) if both else {}
    return {n: sums.get(n, u[n] if n in u else w.get(n)) for n in (*u, *(n for n in w if n not in u))}


def move(w: Vector, u: Vector, distance: float) -> None:
    """`w ← w + distance · u` in place, over the names of `u`."""
    if u:
        torch._foreach_add_([w[n] for n in u], list(u.values()), alpha=distance)


class Snapshot:
    """A copy of some tensors, to be put back bit for bit (law 3).

    Args:
        tensors: the tensors to remember; their storage is what `restore` writes to.
        offload: keep the copy in host memory; exact as well, since a copy between devices rounds nothing.
    """

    def __init__(self, tensors: Iterable[Tensor], offload: bool = False):
        self.tensors = list(tensors)
        self.copies = [t.detach().to("cpu", copy=True) for t in self.tensors] if offload else _clones(self.tensors)

    def restore(self) -> None:
        """Write the copies back in place."""
        if self.tensors:
            with torch.no_grad():
                torch._foreach_copy_(self.tensors, self.copies)


def _clones(tensors: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return list(torch._foreach_clone(tensors)) if tensors else []


class ParameterSpace:
    """The parameters that vectors run over, and how their squares add up across shards.

    Args:
        named: parameters by name, without duplicates (`nn.Module.named_parameters` lists tied weights once).
        transposed: names of weights whose first dimension is the inputs, as in `Conv1D` of GPT-2.
    """

    def __init__(self, named: Mapping[str, nn.Parameter], transposed: Iterable[str] = ()):
        self.params = dict(named)
        self.transposed = frozenset(transposed)
        self._groups = {name: sharding_groups(p) for name, p in self.params.items()}

    def weights(self, names: Iterable[str] | None = None) -> Vector:
        """Local weights, sharing storage with the model."""
        return {n: local(self.params[n].detach()) for n in (self.params if names is None else names)}

    def grads(self) -> Vector:
        """Local gradients, sharing storage with `.grad`; a parameter without one is left out."""
        return {n: local(p.grad) for n, p in self.params.items() if p.grad is not None}

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
        """Make `.grad` the sum of what was taken earlier and what is there now, in the order autograd would have."""
        present = self.grads()
        both = [n for n in earlier if n in present]
        if both:
            sums = torch._foreach_add([local(earlier[n]) for n in both], [present[n] for n in both])
            torch._foreach_copy_([present[n] for n in both], sums)
        for name in earlier.keys() - present.keys():
            self.params[name].grad = earlier[name]

    def write_grads(self, d: Vector) -> None:
        """Make `d` the gradient: in place where one exists (DDP may alias it to a bucket), else as a new tensor."""
        present = self.grads()
        kept = [n for n in d if n in present and d[n] is not present[n]]
        if kept:
            torch._foreach_copy_([present[n] for n in kept], [d[n] for n in kept])
        for name in (n for n in d if n not in present):
            self.params[name].grad = self.globalized(name, d[name])

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
        tensors = list(v.values())
        each = torch._foreach_norm(tensors, 2, dtype=accumulation_dtype(tensors))
        norms = torch.stack([n.to(each[0].device) for n in each])
        return norms if not self._sharded(v) else self._summed(v, norms.square()).sqrt()

    def norm(self, v: Vector) -> Tensor:
        """Global Euclidean norm of `v`: shape (), the same bits on every rank that holds `v` or a shard of it."""
        return torch.linalg.vector_norm(self.norms(v))

    def dots(self, u: Vector, v: Vector) -> Tensor:
        """Inner product of each pair of tensors, over the names that both have: shape (number of such names,)."""
        names = [n for n in u if n in v]
        if not names:
            return torch.zeros(0)
        dtype = accumulation_dtype(u[n] for n in names)
        each = [torch.sum(u[n].to(dtype) * v[n].to(dtype)) for n in names]
        return self._summed(names, torch.stack([s.to(each[0].device) for s in each]))

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
        positions: dict[tuple, list[int]] = {}
        for i, name in enumerate(masks):
            positions.setdefault(self._groups[name], []).append(i)
        for groups, index in positions.items():
            part = counts[index]
            for group in reversed(groups):
                parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
                dist.all_gather(parts, part, group=group)
                before[index] += sum(parts[: dist.get_rank(group)], torch.zeros_like(part))
                part = sum(parts)
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

    def _sharded(self, names: Iterable[str]) -> bool:
        return any(self._groups[n] for n in names)

    def _summed(self, names: Iterable[str], partial: Tensor) -> Tensor:
        """Add up `partial` (one number a name) over the ranks that share each tensor; one collective a sharding."""
        positions: dict[tuple, list[int]] = {}
        for i, name in enumerate(names):
            positions.setdefault(self._groups[name], []).append(i)
        for groups, index in positions.items():
            if not groups:
                continue
            # an index list is copied to the device, which waits for it
            part = partial if len(index) == len(partial) else partial[index]
            for group in groups:
                dist.all_reduce(part, group=group)
            if part is not partial:
                partial[index] = part
        return partial
