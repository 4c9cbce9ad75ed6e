"""Losses that are shares of a window: which ones only look like it, and how large each share is.

A Trainer that accumulates passes `num_items_in_batch` to the model and takes the loss it gets back for a share of the
whole window. Some models take the number and ignore it (transformers 5.23: every classifier with its own
cross-entropy).
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.replay import unchanged
from .micro_batches import MicroBatch
from .sample_ids import without_ids


class LossCountMixin:
    """Finds out at the first batch whether the loss heeds `num_items_in_batch`; with any `optim`, and mends it."""

    _loss_count_known = False

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """As the parent's; at the first batch, find out whether the loss does what `num_items_in_batch` asks of it."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches and not self._loss_count_known and not self._counts_alone():
            self._loss_count_known = True
            if num_items is not None and self._loss_ignores_count(batches[0]):
                self.model_accepts_loss_kwargs = False
                num_items = self._get_num_items_in_batch(batches, device)
        return batches, num_items

    def _share(self, run: MicroBatch, num_items: Tensor | int | None) -> float | Tensor:
        """The weight of this micro-batch's mean loss in the loss that the parent hands to backward."""
        if num_items is None or self.args.ascent_scope == "global":
            return run.weight / self.current_gradient_accumulation_steps
        ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return self._items(run.inputs) * ranks / num_items

    def recounted(self, num_items: Tensor | int | None, whole: dict[str, Any], part: dict[str, Any]) -> Any:
        """`num_items_in_batch` for a part of a micro-batch that stands for the whole of it."""
        return num_items if num_items is None else num_items * self._items(part) / self._items(whole)

    def _items(self, inputs: dict[str, Any]) -> Tensor:
        """How many labels of `inputs` the loss counts."""
        if "shift_labels" in inputs:
            labels = inputs["shift_labels"]
        else:
            labels = inputs["labels"][..., 1:] if self._loss_shifts_labels else inputs["labels"]
        return labels.ne(-100).sum()

    def _counts_alone(self) -> bool:
        """Whether every batch is the whole of a step, so that its count is its own."""
        parts = (self.args.gradient_accumulation_steps, self.accelerator.num_processes, self.args.num_micro_batches)
        return all(n == 1 for n in parts)

    def _loss_ignores_count(self, inputs: dict[str, Any]) -> bool:
        """Whether the model takes `num_items_in_batch` and does nothing with it.

        Its loss is then a mean that the parent believes to be a share, and gradient and log are `accumulation ×
        processes` times too large. Two forwards that nobody sees tell: a loss that heeds the count halves when it
        doubles.
        """
        if not self.model_accepts_loss_kwargs or self.compute_loss_func is not None:
            return False
        model = self.accelerator.unwrap_model(self.model_wrapped, keep_torch_compile=False)
        one, two = (self._unseen_loss(model, inputs, count) for count in (1, 2))
        ignored = (one == two) & (one != 0)
        if self.accelerator.reduce(ignored.float(), reduction="mean") < 1:  # one answer for all ranks
            return False
        warnings.warn(
            f"{type(model).__name__} takes num_items_in_batch but its loss ignores it, so a stock Trainer would make "
            "the gradient accumulation × processes times too large; model_accepts_loss_kwargs=False mends it now.",
            UserWarning,
            stacklevel=2,
        )
        return True

    def _unseen_loss(self, model: nn.Module, inputs: dict[str, Any], count: int) -> Tensor:
        with torch.no_grad(), unchanged(model), self.host_counters_kept(), self.compute_loss_context_manager():
            prepared = self._prepare_inputs(without_ids(inputs))
            return self.compute_loss(model, prepared, num_items_in_batch=torch.tensor(count, device=self.args.device))
