"""What the modules of a model keep and a forward may move: buffers, frozen weights, generators, states of their own.

Each kind has `save`, a copy of it as it is, and `restore`, which puts the copy back.
"""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..rules.snapshot import Snapshot
from ..rules.space import local

Generator = torch.Generator | np.random.Generator | np.random.RandomState | random.Random


class ModuleState:
    """One kind of it."""

    def is_empty(self) -> bool:
        """Whether the model has none of this kind."""
        raise NotImplementedError

    def save(self) -> Any:
        """A copy of it as it is, for `restore`."""
        raise NotImplementedError

    def notice(self, saved: Any) -> None:
        """Learn from what the first pass did to it since `saved`."""

    def restore(self, saved: Any) -> None:
        """Put back what `save` gave."""
        raise NotImplementedError


class Buffers(ModuleState):
    """The buffers of a model, to be put back even where a module has replaced one by a new tensor.

    Large integer tensors are left out: they are packed quantised weights, which no forward changes and which may be
    most of the model. Counters (BatchNorm's, an expert layer's) are small. Of tensors that nothing can write to, such
    as expanded ones, the object is put back and no value copied.
    """

    COUNTER = 2**16
    """The most elements that an integer buffer may have and be put back."""

    def __init__(self, model: nn.Module):
        held = ((m, n, b) for m in model.modules() for n, b in m._buffers.items() if b is not None)
        self._slots = [(m, n) for m, n, b in held if b.is_floating_point() or b.numel() <= self.COUNTER]

    def is_empty(self) -> bool:
        """Whether there is no buffer."""
        return not self._slots

    def save(self) -> tuple[list[Tensor], Snapshot]:
        """The tensors, and a copy of every value that can change."""
        held: list[Any] = [module._buffers[name] for module, name in self._slots]
        return held, Snapshot(local(b) for b in held if _can_be_written(local(b)))

    def restore(self, saved: tuple[list[Tensor], Snapshot]) -> None:
        """Put tensors and values back as `save` found them."""
        held, snapshot = saved
        for (module, name), tensor in zip(self._slots, held, strict=True):
            if module._buffers[name] is not tensor:
                module._buffers[name] = tensor
        snapshot.restore()


@dataclass(frozen=True)
class FrozenState:
    """Versions of all frozen weights in order, and copies of some by position."""

    versions: list[int]
    copies: dict[int, Tensor]


class FrozenParameters(ModuleState):
    """Frozen weights that a forward moves all the same: a teacher that is a moving average of what trains.

    The first step copies all of them and compares them, which finds writes through `.data` too; afterwards only those
    that have moved are copied. Where they are more than twice what trains (a base under adapters; a teacher is as
    large as its student) there is no room for that: versions tell which have moved, and from the next step on they
    are copied. No step lets them move twice.
    """

    def __init__(self, model: nn.Module):
        frozen = (p for p in model.parameters() if not p.requires_grad)
        self._params = [p for p in frozen if _is_plain_weight(local(p))]
        room = 2 * sum(local(p).nbytes for p in model.parameters() if p.requires_grad)
        fits = sum(local(p).nbytes for p in self._params) <= room
        self._kept = list(range(len(self._params))) if fits else []
        self._compared = False

    def is_empty(self) -> bool:
        """Whether every parameter trains."""
        return not self._params

    def save(self) -> FrozenState:
        """Their versions, and a copy of those that may move."""
        copies = Snapshot(local(self._params[i]) for i in self._kept).copies
        return FrozenState([p._version for p in self._params], dict(zip(self._kept, copies, strict=True)))

    def notice(self, saved: FrozenState) -> None:
        """Keep from now on those that have moved since `saved`. The first time, and only then, it waits for values."""
        moved = {i for i, p in enumerate(self._params) if p._version != saved.versions[i]}
        earlier = self._kept
        if not self._compared:
            earlier = [i for i, c in saved.copies.items() if not torch.equal(local(self._params[i]), c)]
        self._kept, self._compared = sorted({*moved, *earlier}), True

    def restore(self, saved: FrozenState) -> None:
        """Write the copies back to those that may move."""
        held = [i for i in self._kept if i in saved.copies]
        if held:
            with torch.no_grad():
                torch._foreach_copy_([local(self._params[i]) for i in held], [saved.copies[i] for i in held])


class ExtraState(ModuleState):
    """What modules show of themselves by `get_extra_state` and take back by `set_extra_state`, torch's own hooks for
    state that is neither parameter nor buffer: counters, schedules, queues."""

    def __init__(self, model: nn.Module):
        self._modules = [m for m in model.modules() if _overrides(m, "get_extra_state", "set_extra_state")]

    def is_empty(self) -> bool:
        """Whether no module has such hooks."""
        return not self._modules

    def save(self) -> list[Any]:
        """A deep copy of each module's."""
        return [copy.deepcopy(m.get_extra_state()) for m in self._modules]

    def restore(self, saved: list[Any]) -> None:
        """Give each module its own back; copied again, since it may go on to write to it."""
        for module, state in zip(self._modules, saved, strict=True):
            module.set_extra_state(copy.deepcopy(state))


def private_generators(model: nn.Module) -> list[Generator]:
    """Generators of torch, NumPy and Python that modules of `model` keep as attributes."""
    found = (v for m in model.modules() for v in vars(m).values() if isinstance(v, Generator))
    return list({id(g): g for g in found}.values())


def generator_state(generator: Generator) -> Any:
    """Where `generator` is, for `set_generator_state`."""
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.get_state()


def set_generator_state(generator: Generator, state: Any) -> None:
    """Put `generator` to where `generator_state` found it."""
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)


def _overrides(module: nn.Module, *names: str) -> bool:
    return all(getattr(type(module), name) is not getattr(nn.Module, name) for name in names)


def _can_be_written(tensor: Tensor) -> bool:
    """Whether an operation in place can change it: neither expanded nor an inference tensor."""
    if tensor.is_inference():
        return False
    strides = tensor.stride() if tensor.layout == torch.strided else ()
    return not any(stride == 0 and size > 1 for stride, size in zip(strides, tensor.shape, strict=False))


def _is_plain_weight(tensor: Tensor) -> bool:
    """Whether it is floating-point and not packed (quantised weights stay), and is there to be copied."""
    plain = tensor.is_floating_point() and tensor.dtype.itemsize > 1 and tensor.device.type != "meta"
    return plain and _can_be_written(tensor)
