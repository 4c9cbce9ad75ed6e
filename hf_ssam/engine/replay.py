"""The second pass must see the same function as the first: the same random draws, the same buffers (law 6).

Dropout, stochastic depth, NEFTune and masking draw from the global generators or from a module's own; BatchNorm and
its kin write running statistics, spectral norm its vectors, a moving average its frozen weights. Before the second
pass all of them are put back to what the first pass found, and afterwards to what the first pass left, so that in the
end each has moved once a step, as it does with a plain optimizer. State that is none of them (a Python counter in a
module) is replayed where the module shows it by torch's `get_extra_state` and `set_extra_state`.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .module_state import (
    Buffers,
    ExtraState,
    FrozenParameters,
    Generator,
    generator_state,
    private_generators,
    set_generator_state,
)


class RandomState:
    """The state of Python's, NumPy's and torch's global generators, of those of `devices`, and of `private` ones.

    Reading and writing a device generator's state does not wait for the device: its seed and offset live on the host.
    """

    def __init__(self, devices: tuple[torch.device, ...] = (), private: Sequence[Generator] = ()):
        self._python, self._numpy, self._torch = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self._devices = {d: torch.get_device_module(d).get_rng_state(d) for d in devices}
        self._private = [(generator, generator_state(generator)) for generator in private]

    def restore(self) -> None:
        """Put every generator back to the state read at construction."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._torch)
        for device, state in self._devices.items():
            torch.get_device_module(device).set_rng_state(state, device)
        for generator, private in self._private:
            set_generator_state(generator, private)


class Replay:
    """Remembers what the first pass saw, pass by pass, and shows it to the second.

    Args:
        model: the model whose state is kept.
        replay_rng: whether the second pass draws the same random numbers. Without it the second pass draws fresh
            ones, as peers do: the difference of the two losses is then mostly the difference of two dropout masks.
    """

    def __init__(self, model: nn.Module, replay_rng: bool = True):
        self._model = model
        tensors = (*model.parameters(), *model.buffers())
        devices = {t.device for t in tensors} | {_computes_on(t) for t in tensors}
        self._devices = tuple(sorted((d for d in devices if d.type not in ("cpu", "meta")), key=str))
        self._generators = private_generators(model)
        kinds = (Buffers(model), FrozenParameters(model), ExtraState(model))
        self._states = [state for state in kinds if not state.is_empty()]
        self.replay_rng = replay_rng

    def single_samples(self) -> contextlib.AbstractContextManager[None]:
        """What passes over one sample run in."""
        return running_statistics(self._model)

    def snapshot_buffers(self) -> Any:
        """Buffers, frozen weights and modules' own states as the first pass is about to find them."""
        return [state.save() for state in self._states]

    def restore_buffers(self, saved: Any) -> None:
        """Put back what `snapshot_buffers` gave."""
        for state, values in zip(self._states, saved, strict=True):
            state.restore(values)

    def snapshot_rng(self) -> RandomState | None:
        """The generators as a pass is about to find them; None where they are not replayed."""
        return RandomState(self._devices, self._generators) if self.replay_rng else None

    @contextlib.contextmanager
    def replaying(self, buffers_seen: Any) -> Iterator[None]:
        """Show the second pass `buffers_seen`; afterwards, whatever happens, put back what the first pass left."""
        for state, values in zip(self._states, buffers_seen, strict=True):
            state.notice(values)
        buffers_left, rng_left = self.snapshot_buffers(), self.snapshot_rng()
        self.restore_buffers(buffers_seen)
        try:
            yield
        finally:
            self.restore_buffers(buffers_left)
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
    """Leave every generator and all state of `model` as they were, for a look that must not be seen."""
    replay = Replay(model)
    buffers, rng = replay.snapshot_buffers(), replay.snapshot_rng()
    try:
        yield
    finally:
        replay.restore_buffers(buffers)
        if rng is not None:
            rng.restore()
