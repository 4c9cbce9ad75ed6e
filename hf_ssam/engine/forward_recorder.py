"""Records a model being called: how many samples, their losses, and the call itself, to make it once more.

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
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from .replay import RandomState, Replay

PerSampleLoss = Callable[[Mapping[str, Any], Any], Tensor]
"""`(inputs by name, outputs) -> losses`, shape (B,)."""

NO_LOSSES = torch.empty(0)


@dataclass
class RecordedForward:
    """What one pass called the model with, and what came of it.

    Attributes:
        size: number of samples: the first dimension of the first tensor.
        losses: one a sample, shape (B,), where they were asked for; otherwise empty.
        calls: how often the pass called the model.
        inputs: by name.
        beside: what the losses need beside them.
        device: device type, for autocast.
        autocast: dtype that the call was cast to; None where autocast was off.
        rng: the generators as the call found them, where losses are asked for and generators are replayed.
    """

    size: int = 0
    losses: Tensor = NO_LOSSES
    calls: int = 0
    inputs: dict[str, Any] = field(default_factory=dict)
    beside: Mapping[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    autocast: torch.dtype | None = None
    rng: RandomState | None = None


class ForwardRecorder:
    """Looks on while passes run.

    Args:
        model: the model, unwrapped.
        losses_of: its per-sample losses; None: only sizes are seen.
        replay: what reads the generators, and keeps buffers through a second look.
    """

    def __init__(self, model: nn.Module, losses_of: PerSampleLoss | None, replay: Replay):
        self._model, self._losses_of, self._replay = model, losses_of, replay
        plain = extract_model_from_parallel(model, keep_torch_compile=False)
        self._names = tuple(inspect.signature(plain.forward).parameters)

    @contextlib.contextmanager
    def recording(self, beside: Mapping[str, Any]) -> Iterator[RecordedForward]:
        """One pass, seen.

        Args:
            beside: what the losses need beside the model's inputs: labels that a host takes out.

        Raises:
            ValueError: if losses are asked for and the pass did not call the model exactly once.
        """
        seen = RecordedForward(beside=beside)
        before = self._model.register_forward_pre_hook(lambda *_: self._sees(seen))
        after = self._model.register_forward_hook(
            lambda m, args, kwargs, out: self._saw(seen, args, kwargs, out), with_kwargs=True
        )
        try:
            yield seen
        finally:
            before.remove()
            after.remove()
        if self._losses_of is not None and seen.calls != 1:
            raise ValueError(
                f"per_sample_loss: a pass called {type(self._model).__name__} {seen.calls} times, so the losses of "
                "its samples are not known; choose a method that selects no samples."
            )

    def again(self, seen: RecordedForward) -> Tensor:
        """The losses of the call in `seen`, where the weights are now: one forward without gradient.

        Under the random draws of that call alone: the pass around it may have drawn before. It leaves no trace.
        """
        assert self._losses_of is not None  # who looks again has asked for losses
        cast = torch.autocast(seen.device, seen.autocast or torch.bfloat16, enabled=seen.autocast is not None)
        with self._replay.replaying(self._replay.snapshot_buffers()), torch.no_grad(), cast:
            if seen.rng is not None:
                seen.rng.restore()
            return self._losses_of({**seen.beside, **seen.inputs}, self._model(**seen.inputs)).detach()

    def _sees(self, seen: RecordedForward) -> None:
        if self._losses_of is not None:
            seen.rng = self._replay.snapshot_rng()

    def _saw(self, seen: RecordedForward, args: tuple, kwargs: dict[str, Any], outputs: Any) -> None:
        seen.calls += 1
        seen.inputs = {**dict(zip(self._names, args, strict=False)), **kwargs}
        first = next((t for t in seen.inputs.values() if isinstance(t, Tensor)), None)
        if first is None:
            raise ValueError(
                f"run_pass: {type(self._model).__name__} was called with no tensor of samples, so they cannot be told "
                "apart; pass it one by itself, or choose a method that uses whole batches."
            )
        seen.size, seen.device = len(first), first.device.type
        if torch.is_autocast_enabled(seen.device):
            seen.autocast = torch.get_autocast_dtype(seen.device)
        if self._losses_of is not None:
            with torch.no_grad():
                seen.losses = self._losses_of({**seen.beside, **seen.inputs}, outputs).detach()
