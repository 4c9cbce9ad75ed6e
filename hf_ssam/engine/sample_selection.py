"""Which samples the passes of a step run on: what a method's selection sees, picks and learns.

For a method that selects nothing every call here does nothing, and every pass runs on its whole micro-batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..methods.recipes import Rules
from ..rules.selection import Draw
from ..rules.state import MethodState
from .forward_recorder import ForwardRecorder, PerSampleLoss, RecordedForward
from .per_sample import per_sample_losses
from .replay import Replay
from .window import AccumulationWindow, MicroBatchRecord

Batch = Callable[[], Mapping[str, Any]]


class Samples:
    """Carries out a method's selection.

    Args:
        rules: the method's.
        method: its name, for messages.
        model: the model, unwrapped.
        per_sample_loss: `(inputs by name, outputs) -> losses`, shape (B,); None: worked out from logits and labels.
        batch: what the pass at hand was given, where a host takes the labels out before the model sees them.
        dataset_size: number of samples in the data set, for methods that keep a score of each.
        replay: the engine's.
    """

    def __init__(
        self,
        rules: Rules,
        method: str,
        model: nn.Module,
        per_sample_loss: PerSampleLoss | None,
        batch: Batch,
        dataset_size: int | None,
        replay: Replay,
    ):
        self.selection = rules.selection
        self._needs_ids, self._method, self._size = rules.needs_ids, method, dataset_size
        losses_of = per_sample_loss or partial(per_sample_losses, model)
        self._watch = None
        if rules.takes_indices:
            self._watch = ForwardRecorder(
                model, losses_of if self.selection else None, replay, lambda: _labels(batch())
            )

    def watching(self) -> contextlib.AbstractContextManager[RecordedForward | None]:
        """One pass, seen where the method needs to see it."""
        return contextlib.nullcontext() if self._watch is None else self._watch.watching()

    def pick(
        self, seen: MicroBatchRecord, memory: MethodState, step: int, position: int, device: torch.device
    ) -> None:
        """Choose the samples that both passes of a micro-batch run on.

        Raises:
            ValueError: if the method must know which samples they are, and was not told, or not right.
        """
        if self.selection is None or self.selection.before is None:
            return
        if seen.ids is None:
            raise ValueError(
                f"samples: method `{self._method}` needs the dataset index of each sample; pass samples=indices, "
                "shape (B,), with each batch."
            )
        self._check_ids(seen.ids)
        seen.ids = seen.ids.to(device)
        seen.index = self.selection.before(Draw(seen.ids, memory, step, position))
        seen.first = len(seen.index) / len(seen.ids)

    def narrow(self, seen: MicroBatchRecord) -> Tensor | None:
        """The samples of the second pass, which may take a look at the losses where the weights are now."""
        if self.selection is None or self.selection.between is None:
            return seen.index
        seen.looks = 1.0
        return self.selection.between(seen.sight.losses, self._watch.again(seen.sight))

    def note(self, seen: MicroBatchRecord, index: Tensor | None, sight: RecordedForward | None) -> None:
        """Write down what the second pass of a micro-batch cost, and by how much its losses rose."""
        seen.second = seen.first if index is seen.index else len(index) / seen.sight.size
        if self._needs_ids:
            seen.rises = sight.losses - seen.sight.losses

    def learn(self, window: AccumulationWindow, memory: MethodState, summed: Callable[[Tensor], Tensor]) -> None:
        """Take what the losses of a window tell into the scores; `summed` adds up over the ranks."""
        if self._needs_ids:
            ids = torch.cat([s.ids[s.index] for s in window.passes])
            rises = torch.cat([s.rises for s in window.passes])
            self.selection.learn(ids, rises, summed, memory, self._size)

    def _check_ids(self, ids: Tensor) -> None:
        """Indices on the host are checked; those on a device are not, which would wait for it (law 7)."""
        if ids.device.type == "cpu" and len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self._size:
            raise ValueError(
                f"samples: indices from {int(ids.min())} to {int(ids.max())} are not all of a data set of "
                f"{self._size}; pass each sample's index in the data set, and its size as dataset_size."
            )

    def check(self, memory: MethodState) -> None:
        """Refuse scores of another data set.

        Raises:
            ValueError: if their number is not the data set's.
        """
        scores = memory.plain("samples.count") if self._needs_ids else None
        if scores is not None and len(scores) != self._size:
            raise ValueError(
                f"dataset_size: the state holds scores of {len(scores)} samples and the data set has {self._size}; "
                "resume with the data set that the state was saved with, or start a new run."
            )


def _labels(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {n: t for n, t in batch.items() if n == "labels"}
