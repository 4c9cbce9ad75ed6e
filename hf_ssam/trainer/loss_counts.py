"""Losses that are shares of a window: which ones only look like it, and how large each share is.

A Trainer that accumulates passes `num_items_in_batch` to the model and takes the loss it gets back for a share of the
whole window. Some models take the number and ignore it (transformers 5.23: every classifier with its own
cross-entropy). Where their loss is a mean, gradient and log are then `accumulation × processes` times too large.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import Tensor, nn
from transformers import Trainer

from ..engine.labels import IGNORED, count_labels
from ..engine.replay import unchanged
from .host import Host
from .micro_batches import MicroBatch
from .sample_ids import without_ids


class LossCountMixin(Host):
    """Finds out, with any `optim`, whether a model's own loss heeds `num_items_in_batch`, and mends one that does not.

    Only losses that `Trainer.compute_loss` takes from the model are looked at. A `compute_loss` of a subclass, a
    `compute_loss_func` and a Trainer that sets `loss_is_scaled_for_ga` have said how their loss is scaled.
    """

    _loss_count_known = False

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """As the parent's; until a loss has told, find out whether it does what `num_items_in_batch` asks of it."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if num_items is not None and not self._loss_count_known and self._loss_is_looked_at():
            told = (self._loss_ignores_count(batch) for batch in batches)
            ignored = next((answer for answer in told if answer is not None), None)
            self._loss_count_known = ignored is not None
            if ignored:
                self.model_accepts_loss_kwargs = False
                num_items = self._get_num_items_in_batch(batches, device)
        return batches, num_items

    def _share(self, run: MicroBatch, num_items: Tensor | int | None) -> float | Tensor:
        """The weight of this micro-batch's own loss in the loss that the parent hands to backward.

        Its own loss is what the parent would make of it alone, over the labels that the parent counts (for GPT-2 in
        transformers 5.23 one a row more than the loss compares): a step of one micro-batch then has the share 1.
        """
        counted = num_items is not None and self.loss_is_scaled_for_ga is not False
        if not counted or self.args.ascent_scope == "global":
            return run.weight / self.current_gradient_accumulation_steps
        ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        first = 1 if self._loss_shifts_labels and "shift_labels" not in run.inputs else 0
        labels = run.inputs["shift_labels" if "shift_labels" in run.inputs else "labels"][..., first:]
        return labels.ne(IGNORED).sum() * ranks / num_items

    def recounted(self, num_items: Tensor | int | None, whole: dict[str, Any], part: dict[str, Any]) -> Any:
        """`num_items_in_batch` for a part of a micro-batch that stands for the whole of it."""
        if num_items is None:
            return None
        model = self.accelerator.unwrap_model(self.model)
        return num_items * count_labels(model, part) / count_labels(model, whole)

    def _counts_alone(self) -> bool:
        """Whether every batch is the whole of a step, so that its count is its own."""
        parts = (self.args.gradient_accumulation_steps, self.accelerator.num_processes, self.args.num_micro_batches)
        return all(n == 1 for n in parts)

    def _loss_is_looked_at(self) -> bool:
        """Whether the loss is the model's own, believed to be a share, and not the whole of a step."""
        return (
            self.args.mend_loss_count
            and self.model_accepts_loss_kwargs
            and self.loss_is_scaled_for_ga is None
            and self.compute_loss_func is None
            and self.label_smoother is None
            and getattr(self.compute_loss, "__func__", None) is Trainer.compute_loss
            and not self._counts_alone()
        )

    def _loss_ignores_count(self, inputs: dict[str, Any]) -> bool | None:
        """Whether the model takes `num_items_in_batch`, does nothing with it and returns a mean; None: cannot tell.

        A loss that heeds the count halves when it doubles. A mean stays when the batch is repeated; a sum, which is
        right under accumulation as it is, doubles. A batch without a label tells nothing: its loss is 0 or not finite.
        """
        model = self.accelerator.unwrap_model(self.model_wrapped, keep_torch_compile=False)
        inputs = self._prepare_inputs(without_ids(inputs))
        one, two = (self._unseen_loss(model, inputs, count) for count in (1, 2))
        tells = one.isfinite() & (one != 0)
        ignores, heeds = self._votes(tells, _about(one, two))
        if heeds or not ignores:
            return False if heeds else None
        means, others = self._votes(tells, _about(self._unseen_loss(model, _repeated(inputs), 1), one))
        if others:
            return False
        warnings.warn(
            f"{type(model).__name__} takes num_items_in_batch but its loss ignores it, so a stock Trainer would make "
            "the gradient accumulation × processes times too large; model_accepts_loss_kwargs=False mends it now "
            "(mend_loss_count=False leaves it as it is).",
            UserWarning,
            stacklevel=3,
        )
        return True

    def _votes(self, tells: Tensor, answer: Tensor) -> list[float]:
        """How many ranks say yes and how many no, the same numbers on each; one that has nothing to tell abstains."""
        return self.accelerator.reduce(torch.stack([tells & answer, tells & ~answer]).float(), "sum").tolist()

    def _unseen_loss(self, model: nn.Module, inputs: dict[str, Any], count: int) -> Tensor:
        """The model's loss without dropout, in a forward that leaves no trace."""
        counted = torch.tensor(count, device=self.args.device)
        with torch.no_grad(), unchanged(model), _evaluating(model), self.compute_loss_context_manager():
            outputs = model(**inputs, num_items_in_batch=counted)
        return (outputs["loss"] if isinstance(outputs, dict) else outputs[0]).detach()


def _about(a: Tensor, b: Tensor) -> Tensor:
    """Whether `a` is `b`, rather than twice of it or half."""
    return (a / b - 1).abs() < 0.25


def _repeated(inputs: dict[str, Any]) -> dict[str, Any]:
    """Every sample twice."""
    return recursively_apply(lambda t: torch.cat([t, t]) if t.dim() else t, inputs)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
