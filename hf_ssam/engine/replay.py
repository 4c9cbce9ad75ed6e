"""The second pass must see the same function as the first: the same random draws, the same buffers (law 6).

Dropout, stochastic depth, NEFTune and masking draw from the global generators; BatchNorm and its kin write running
statistics, spectral norm its vectors. Before the second pass all of them are put back to what the first pass found,
and afterwards to what the first pass left, so that in the end every generator and every buffer has moved once a step,
as it does with a plain optimizer.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..rules.snapshot import Snapshot
from ..rules.space import local


class RandomState:
    """The state of Python's, NumPy's and torch's global generators, and of those of `devices`.

    Reading and writing a device generator's state does not wait for the device: its seed and offset live on the host.
    """

    def __init__(self, devices: tuple[torch.device, ...] = ()):
        self._python, self._numpy, self._torch = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self._devices = {d: torch.get_device_module(d).get_rng_state(d) for d in devices}

    def restore(self) -> None:
        """Put every generator back to the state read at construction."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._torch)
        for device, state in self._devices.items():
            torch.get_device_module(device).set_rng_state(state, device)


class Buffers:
    """The buffers of a model, to be put back even where a module has replaced one by a new tensor.

    Large integer tensors are left out: they are packed quantised weights, which no forward changes and which may be
    most of the model. Counters (BatchNorm's, an expert layer's) are small.
    """

    COUNTER = 2**16
    """The most elements that an integer buffer may have and be put back."""

    def __init__(self, model: nn.Module):
        slots = [(m, n) for m in model.modules() for n, b in m._buffers.items() if b is not None]
        self._slots = [
            (m, n) for m, n in slots if m._buffers[n].is_floating_point() or m._buffers[n].numel() <= self.COUNTER
        ]

    def save(self) -> Any:
        """A copy of every buffer's value, for `restore`."""
        held = [module._buffers[name] for module, name in self._slots]
        return held, Snapshot(local(b) for b in held)

    def restore(self, saved: Any) -> None:
        """Put tensors and values back as `save` found them."""
        held, snapshot = saved
        for (module, name), tensor in zip(self._slots, held, strict=True):
            if module._buffers[name] is not tensor:
                module._buffers[name] = tensor
        snapshot.restore()


class Replay:
    """Remembers what the first pass saw, pass by pass, and shows it to the second.

    Args:
        model: the model whose buffers are kept.
        replay_rng: whether the second pass draws the same random numbers. Without it the second pass draws fresh
            ones, as peers do: the difference of the two losses is then mostly the difference of two dropout masks.
    """

    def __init__(self, model: nn.Module, replay_rng: bool = True):
        self._model = model
        tensors = (*model.parameters(), *model.buffers())
        devices = {t.device for t in tensors} | {_computes_on(t) for t in tensors}
        self._devices = tuple(sorted((d for d in devices if d.type not in ("cpu", "meta")), key=str))
        self._buffers = Buffers(model)
        self.replay_rng = replay_rng

    def single_samples(self) -> contextlib.AbstractContextManager[None]:
        """What passes over one sample run in."""
        return running_statistics(self._model)

    def snapshot_buffers(self) -> Any:
        """The buffers as the first pass is about to find them."""
        return self._buffers.save()

    def snapshot_rng(self) -> RandomState | None:
        """The generators as a pass is about to find them; None where they are not replayed."""
        return RandomState(self._devices) if self.replay_rng else None

    @contextlib.contextmanager
    def replaying(self, buffers_seen: Any) -> Iterator[None]:
        """Show the second pass `buffers_seen`; afterwards, whatever happens, put back what the first pass left."""
        buffers_left, rng_left = self._buffers.save(), self.snapshot_rng()
        self._buffers.restore(buffers_seen)
        try:
            yield
        finally:
            self._buffers.restore(buffers_left)
            if rng_left is not None:
                rng_left.restore()


def _computes_on(tensor: torch.Tensor) -> torch.device:
    """Where a tensor is used: a shard that rests in host memory (FSDP2's CPU offload) is used on its mesh's device."""
    if not isinstance(tensor, DTensor) or tensor.device_mesh.device_type == tensor.device.type:
        return tensor.device
    kind = tensor.device_mesh.device_type
    return torch.device(kind, torch.get_device_module(kind).current_device())


@contextlib.contextmanager
def running_statistics(model: nn.Module) -> Iterator[None]:
    """Let BatchNorm layers that train normalise by their running statistics: a single sample has no batch's.

    Around each layer's own forward, since the Trainer calls `model.train()` in every pass.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    hooks = [layer.register_forward_pre_hook(lambda module, _: _set_training(module, False)) for layer in layers]
    hooks += [
        layer.register_forward_hook(lambda module, *_: _set_training(module, True), always_call=True)
        for layer in layers
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _set_training(module: nn.Module, mode: bool) -> None:
    module.training = mode


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Leave every generator and every buffer of `model` as they were, for a look that must not be seen."""
    replay = Replay(model)
    with replay.replaying(replay.snapshot_buffers()):
        yield
