"""`suggest_rho`: ρ is measured on the first training batches, or taken from the checkpoint that a run goes on from.

The model is trained plainly on these batches first and put back (see `engine.radius`): what counts is how far the
ascent raises the loss in the run, not before it.
"""

from __future__ import annotations

from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import set_seed

from ..engine.batches import part_of
from ..engine.radius import Step, suggested
from ..engine.replay import unchanged
from .checkpoints import saved_rho
from .sample_ids import without_ids

STEPS = 4
"""Optimizer steps whose batches are measured."""


def starting_rho(trainer: Any, model: nn.Module, checkpoint: str | None, **engine: Any) -> float:
    """ρ of a run with `suggest_rho`, and one line that says where it comes from.

    Args:
        trainer: the host, an `SSAMTrainerMixin`.
        model: as its training step calls it.
        checkpoint: where the run goes on from; None is the beginning.
        **engine: as `TwoPass` takes it.
    """
    saved = None if checkpoint is None else saved_rho(checkpoint, trainer.args.optim)
    if saved is not None:
        trainer.say(f"suggest_rho: rho {saved:g}, as {checkpoint} has it")
        return saved
    with unchanged(model), trainer.host_counters_kept():
        set_seed(trainer.args.seed)
        found = suggested(
            model.train(),
            trainer.args.method(),
            _steps(trainer, model),
            start=trainer.args.rho,
            optimizer=partial(_plain_optimizer, trainer, model),
            mean_over_ranks=trainer.mean_over_ranks,
            **engine,
        )
    trainer.say(f"suggest_rho: {found}")
    return found.rho


def _steps(trainer: Any, model: nn.Module) -> list[Step]:
    """The passes of the first optimizer steps, in the order that the run's seed gives."""
    accumulated = trainer.args.gradient_accumulation_steps
    batches = [without_ids(batch) for batch in islice(trainer.get_train_dataloader(), STEPS * accumulated)]
    share = 1 / min(accumulated, len(batches))
    runs = [partial(_forward_backward, trainer, model, batch, share) for batch in batches]
    whole = [runs[i : i + accumulated] for i in range(0, len(runs), accumulated)]
    return [step for step in whole if len(step) == len(whole[0])]


def _plain_optimizer(trainer: Any, model: nn.Module, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The base optimizer, new, at the learning rate of the run."""
    kind, settings = trainer.get_optimizer_cls_and_kwargs(trainer.args, model)
    return kind(parameters, **settings)


def _forward_backward(
    trainer: Any, model: nn.Module, batch: dict[str, Any], share: float, indices: Tensor | None = None
) -> Tensor:
    rows = batch if indices is None else part_of(batch, indices)
    with trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(model, trainer._prepare_inputs({**rows})).mean() * share
    loss.backward()
    return loss
