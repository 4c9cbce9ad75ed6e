"""A micro-batch as the parent Trainer runs it, made to run again without being counted again.

What surrounds a pass belongs to the Trainer that hosts it: whether gradients are synchronised after it, and what it
counts in. Both are put in the state that the first pass had.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.distributed.fsdp import is_fsdp_managed_module


@dataclass
class MicroBatch:
    """One micro-batch, to be run once a pass. Called again, it is counted as computation and as nothing else.

    Attributes:
        trainer: the host.
        step: the parent's bound `training_step`.
        model: the model as the Trainer calls it.
        inputs: what the collator gave; each pass gets its own shallow copy, since `compute_loss` may pop from it.
        num_items: `num_items_in_batch` of the whole window.
        last: whether gradients are synchronised after it.
        passes: how often it has run.
    """

    trainer: HostMixin
    step: Callable[..., Tensor]
    model: nn.Module
    inputs: dict[str, Any]
    num_items: Tensor | int | None
    last: bool
    passes: int = 0

    def __call__(self) -> Tensor:
        """Forward and backward, as the parent does them; returns the loss it reports."""
        self.passes += 1
        with self.trainer.synchronized(self.model, self.last), self._uncounted():
            return self.step(self.model, {**self.inputs}, self.num_items)

    @contextlib.contextmanager
    def _uncounted(self) -> Iterator[None]:
        if self.passes == 1:
            yield
            return
        with self.trainer.host_counters_kept():
            yield
        self.trainer.current_flos += float(self.trainer.floating_point_ops(self.inputs))


class HostMixin:
    """What a replayed micro-batch needs of the Trainer that hosts it.

    Attributes:
        host_counters: by class name, the attributes that a parent trainer's own steps count in; a second pass must
            leave them as it found them.
    """

    host_counters: dict[str, tuple[str, ...]] = {
        "SFTTrainer": ("_metrics", "_total_train_tokens"),
        "DPOTrainer": ("_metrics", "_total_train_tokens"),
        "KTOTrainer": ("_metrics", "_total_train_tokens"),
        "RewardTrainer": ("_metrics", "_total_train_tokens"),
        "SentenceTransformerTrainer": ("accum_loss_components",),
        "CrossEncoderTrainer": ("accum_loss_components",),
        "SparseEncoderTrainer": ("accum_loss_components",),
    }

    @contextlib.contextmanager
    def synchronized(self, model: nn.Module, last: bool) -> Iterator[None]:
        """The state of synchronisation in which the parent runs a micro-batch, also when it is replayed."""
        state = self.accelerator.gradient_state
        before = state.sync_gradients
        state._set_sync_gradients(last)
        try:
            with self._sync_context(model, last):
                yield
        finally:
            state._set_sync_gradients(before)

    @contextlib.contextmanager
    def host_counters_kept(self) -> Iterator[None]:
        """Leave what the parent's steps count in as it was."""
        names = {n for base in type(self).__mro__ for n in self.host_counters.get(base.__name__, ())}
        kept = {n: copy.deepcopy(getattr(self, n)) for n in names}
        try:
            yield
        finally:
            for name, value in kept.items():
                setattr(self, name, value)

    def _sync_context(self, model: nn.Module, last: bool) -> contextlib.AbstractContextManager:
        if last or self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False):
            return contextlib.nullcontext()
        if self.is_distributed_loading_by_transformers and is_fsdp_managed_module(self.model):
            return self._defer_fsdp_gradient_reduction()
        return self.accelerator.no_sync(model)
