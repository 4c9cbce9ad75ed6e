"""The model as it is measured: which loss, which weights, and no autocast."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

LossFunction = Callable[[nn.Module, dict[str, Any]], Tensor]


def model_loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """`model(**batch).loss`, or the first output of a model that returns tuples.

    Raises:
        ValueError: if there is none.
    """
    outputs = model(**batch)
    loss = outputs[0] if isinstance(outputs, tuple) else getattr(outputs, "loss", None)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ValueError(
            f"model: {type(model).__name__} returns no loss for a batch with the keys {sorted(batch)}; "
            "add `labels` to the batches, or pass `loss`, a function of the model and a batch."
        )
    return loss


class LossModule(nn.Module):
    """`loss(model, batch)` as a module, for `functional_call` to run with other weights."""

    def __init__(self, model: nn.Module, loss: LossFunction):
        super().__init__()
        self.model, self._loss = model, (loss,)

    def forward(self, batch: dict[str, Any]) -> Tensor:
        return self._loss[0](self.model, batch)


def selected(model: nn.Module, pattern: str | None) -> dict[str, nn.Parameter]:
    """The weights that `Objective` takes the curvature in."""
    floating = {n: p for n, p in model.named_parameters() if p.is_floating_point()}
    if pattern is None:
        chosen = {n: p for n, p in floating.items() if p.requires_grad}
    else:
        chosen = {n: p for n, p in floating.items() if re.search(pattern, n)}
    if not chosen:
        raise ValueError(
            f"parameters: {pattern!r} leaves none of the {len(floating)} floating weights of {type(model).__name__}; "
            "choose a pattern that occurs in `model.named_parameters()`, or unfreeze a weight."
        )
    if any(isinstance(p, DTensor) for p in chosen.values()):
        raise ValueError("model: its weights are sharded; save it and measure the saved model in one process.")
    return chosen


@contextlib.contextmanager
def without_autocast(model: nn.Module) -> Iterator[None]:
    """Take off the autocast that `Accelerator.prepare` has put round `forward`, and put it back."""
    original, wrapped = vars(model).get("_original_forward"), vars(model).get("forward")
    if original is None or wrapped is None:
        yield
        return
    model.forward = original
    try:
        yield
    finally:
        model.forward = wrapped
