"""Sees a model being called: how many samples, their losses, and the call itself, to make it once more.

Works on the module inside DistributedDataParallel: a second look is a forward without gradient, which must not make
DDP broadcast buffers or count a pass.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

PerSampleLoss = Callable[[Mapping[str, Any], Any], Tensor]
"""`(inputs by name, outputs) -> losses`, shape (B,)."""


@dataclass
class Sighting:
    """What one pass called the model with, and what came of it.

    Attributes:
        size: number of samples: the first dimension of the first tensor.
        losses: one a sample, shape (B,), where they were asked for.
        calls: how often the pass called the model.
        inputs: by name.
        beside: what the losses need beside them.
        device: device type, for autocast.
        autocast: dtype that the call was cast to; None where autocast was off.
    """

    size: int = 0
    losses: Tensor | None = None
    calls: int = 0
    inputs: dict[str, Any] | None = None
    beside: Mapping[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    autocast: torch.dtype | None = None


class Watch:
    """Looks on while passes run.

    Args:
        model: the model, unwrapped.
        losses_of: its per-sample losses; None: only sizes are seen.
        beside: what the losses need beside the model's inputs: labels that a host took out.
    """

    def __init__(
        self,
        model: nn.Module,
        losses_of: PerSampleLoss | None,
        beside: Callable[[], Mapping[str, Any]] = dict,
    ):
        self._model, self._losses_of, self._beside = model, losses_of, beside

    @contextlib.contextmanager
    def watching(self) -> Iterator[Sighting]:
        """One pass, seen.

        Raises:
            ValueError: if losses are asked for and the pass did not call the model exactly once.
        """
        seen = Sighting()
        hook = self._model.register_forward_hook(
            lambda m, args, kwargs, out: self._saw(seen, args, kwargs, out), with_kwargs=True
        )
        try:
            yield seen
        finally:
            hook.remove()
        if self._losses_of is not None and seen.calls != 1:
            raise ValueError(
                f"per_sample_loss: a pass called {type(self._model).__name__} {seen.calls} times, so the losses of "
                "its samples are not known; choose a method that selects no samples."
            )

    def again(self, seen: Sighting) -> Tensor:
        """The losses of the call in `seen`, where the weights are now: one forward without gradient."""
        cast = torch.autocast(seen.device, seen.autocast or torch.bfloat16, enabled=seen.autocast is not None)
        with torch.no_grad(), cast:
            return self._losses_of({**seen.beside, **seen.inputs}, self._model(**seen.inputs)).detach()

    def _saw(self, seen: Sighting, args: tuple, kwargs: dict[str, Any], outputs: Any) -> None:
        seen.calls += 1
        seen.inputs = {**dict(zip(inspect.signature(self._model.forward).parameters, args, strict=False)), **kwargs}
        first = next(t for t in seen.inputs.values() if isinstance(t, Tensor))
        seen.size, seen.device = len(first), first.device.type
        if torch.is_autocast_enabled(seen.device):
            seen.autocast = torch.get_autocast_dtype(seen.device)
        if self._losses_of is not None:
            with torch.no_grad():
                seen.beside = self._beside()
                seen.losses = self._losses_of({**seen.beside, **seen.inputs}, outputs).detach()
