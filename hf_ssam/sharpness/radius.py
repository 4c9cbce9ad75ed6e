"""Which ρ to train with: the one at which a method's ascent raises the loss by about a tenth."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..engine.batches import part_of
from ..engine.parameters import trainable
from ..engine.radius import TARGET, MakeOptimizer, RhoSuggestion, suggested
from ..methods import Method, get_method
from .measured import LossFunction, model_loss
from .probe import Batch, Batches, as_batches, moved


def suggest_rho(
    model: nn.Module,
    batches: Batches,
    method: str | Method = "ssam",
    *,
    target: float = TARGET,
    start: float | None = None,
    perturb: str = "all",
    train_mode: bool = True,
    loss: LossFunction = model_loss,
    optimizer: MakeOptimizer | None = None,
    **options: Any,
) -> RhoSuggestion:
    """The ρ at which the ascent of `method` raises the loss by `target`, measured on a few batches in seconds.

    Each batch is taken as one optimizer step, so it should be as large as those of training: the gradient of a larger
    batch is shorter, and its ρ larger. A loss that falls in training is raised by a larger share of itself at the same
    ρ: a model that has trained for a while asks for a smaller one, ten times and more for an encoder with a new head.
    So measure a checkpoint, or pass an `optimizer`.

    Args:
        model: any model; it is left as it was to the bit.
        batches: see `Objective`; 4 to 8 of them show how sure the answer is.
        method: a name in `METHODS`, or a `Method` from `get_method`.
        target: rise of the loss as a share of it; 0.05 to 0.2 is usual.
        start: ρ at which the search begins; the method's default where None.
        perturb: which parameters, as in `TwoPass`.
        train_mode: measure the model as it trains (dropout, batch statistics) instead of as it evaluates.
        loss: `(model, batch) -> scalar`; default `model(**batch).loss`.
        optimizer: parameters -> an optimizer that first trains the model on the batches, until the loss is a sixth or
            they were seen 12 times, such as `partial(torch.optim.AdamW, lr=2e-4)`; None: it is measured as it is.
        **options: the method's own options.

    Raises:
        ValueError: for a method without an ascent, a loss that is not positive, or an ascent that does not raise it.
    """
    chosen = method if isinstance(method, Method) else get_method(method, **options)
    like = next(iter(trainable(model).values()))

    def forward_backward(batch: Batch, indices: Tensor | None = None) -> Tensor:
        rows = batch if indices is None else part_of(batch, indices)
        value = loss(model, moved(rows, like.device, like.dtype))
        value.backward()
        return value

    steps = [[partial(forward_backward, batch)] for batch in as_batches(batches)]
    if not steps:
        raise ValueError("batches: there is none; pass a list of dictionaries as a collator makes them.")
    with _in_mode(model, train_mode):
        return suggested(model, chosen, steps, target=target, start=start, optimizer=optimizer, perturb=perturb)


@contextlib.contextmanager
def _in_mode(model: nn.Module, train: bool) -> Iterator[None]:
    """All modules in train or evaluation mode, and each as it was afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(train)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
