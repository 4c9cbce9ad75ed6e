"""A micro-batch as the parent Trainer runs it, made to run again without being counted again.

What surrounds a pass belongs to the Trainer that hosts it: whether gradients are synchronised after it, and what it
counts in. Both are put in the state that the first pass had.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
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
        weight: its share of the batch that the parent was given, where that was split.
        rows: which samples of that batch these are; None for all.
        passes: how often it has run.
    """

    trainer: HostMixin
    step: Callable[..., Tensor]
    model: nn.Module
    inputs: dict[str, Any]
    num_items: Tensor | int | None
    last: bool
    weight: float = 1.0
    rows: Tensor | None = None
    passes: int = 0

    def __call__(self, indices: Tensor | None = None) -> Tensor:
        """Forward and backward, as the parent does them; returns the loss it reports.

        Args:
            indices: which samples to run on, shape (K,); None: all. Their loss stands for that of the whole
                micro-batch.
        """
        self.passes += 1
        inputs, num_items = self.inputs, self.num_items
        if indices is not None:
            inputs = part_of(inputs, indices)
            num_items = self.trainer.recounted(num_items, self.inputs, inputs)
        with self.trainer.synchronized(self.model, self.last), self._uncounted(inputs), self._weighted():
            return self.step(self.model, {**inputs}, num_items)

    @contextlib.contextmanager
    def _uncounted(self, inputs: dict[str, Any]) -> Iterator[None]:
        """The parent counts the floating point operations of one pass over all of its inputs; we count the rest."""
        flos = self.trainer.floating_point_ops
        if self.passes == 1:
            yield
            self.trainer.current_flos += 0.0 if inputs is self.inputs else float(flos(inputs) - flos(self.inputs))
            return
        with self.trainer.host_counters_kept():
            yield
        self.trainer.current_flos += float(flos(inputs))

    @contextlib.contextmanager
    def _weighted(self) -> Iterator[None]:
        """The parent divides a mean loss by the number of micro-batches; a part of one counts by its size."""
        whole = self.trainer.current_gradient_accumulation_steps
        self.trainer.current_gradient_accumulation_steps = whole / self.weight if self.weight != 1 else whole
        try:
            yield
        finally:
            self.trainer.current_gradient_accumulation_steps = whole

    def split(self, parts: int) -> list[MicroBatch]:
        """This micro-batch in `parts` of nearly equal size; fewer where it has fewer samples."""
        if parts == 1:
            return [self]
        size = batch_size(self.inputs)
        pieces = [piece for piece in torch.arange(size).tensor_split(parts) if len(piece)]
        return [
            dataclasses.replace(self, inputs=part_of(self.inputs, rows), weight=len(rows) / size, rows=rows)
            for rows in pieces
        ]


def batch_size(inputs: Mapping[str, Any]) -> int:
    """Number of samples in a batch: the length of its labels, or of its first tensor."""
    first = inputs["labels"] if "labels" in inputs else next(t for t in inputs.values() if isinstance(t, Tensor))
    return len(first)


def part_of(inputs: Mapping[str, Any], indices: Tensor) -> dict[str, Any]:
    """The samples `indices` of a batch.

    Raises:
        ValueError: if a tensor's first dimension does not run over the samples, as with images packed into one row.
    """
    size, part = batch_size(inputs), {}
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.dim():
            if len(value) != size:
                raise ValueError(
                    f"inputs: `{name}` has {len(value)} rows where the batch has {size} samples, so it cannot be "
                    "cut into samples; choose a method and an ascent_scope that use whole micro-batches."
                )
            part[name] = value[indices.to(value.device)]
        else:
            part[name] = [value[i] for i in indices.tolist()] if isinstance(value, list) else value
    return part


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
