"""Runs of the Trainer that a worker makes in two processes and a test repeats in one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments

from hf_ssam import METHODS, SSAMTrainer, get_method
from tests.support.cases import CASES, Case, arguments, case_arguments, trained, weights

SCOPES = ("global", "rank", "micro_batch")


def works(case: Case, scope: str) -> bool:
    """Whether several ranks can run the case in this scope: a method with a state of its own keeps to `global`."""
    return scope == "global" or not get_method(case.method, **case.options).build().stateful


def base_optimizers(case: Case) -> tuple[str, ...]:
    """AdamW for every method that does not bring its own optimizer, plain SGD for the first one too."""
    if METHODS[case.method].optimizer is not None:
        return ("own",)
    return ("adamw_torch", "sgd") if case == CASES[0] else ("adamw_torch",)


def over(optim: str) -> dict[str, str]:
    """The argument that chooses the base optimizer."""
    return {} if optim == "own" else {"base_optim": optim}


def whole(value: Any) -> Any:
    """`value` with every DTensor gathered and copied, through dictionaries and lists."""
    if isinstance(value, DTensor):
        return value.full_tensor().detach().clone()
    if isinstance(value, dict):
        return {k: whole(v) for k, v in value.items()}
    if isinstance(value, list):
        return [whole(v) for v in value]
    return value


def outcome(trainer: Trainer) -> dict[str, Any]:
    """What a run left: weights and buffers, optimizer state, generator, log, scheduler."""
    return {
        "weights": whole(weights(trainer.model)),
        "optimizer": whole(trainer.optimizer.state_dict()["state"]),
        "rng": torch.get_rng_state(),
        "log": [
            {k: v for k, v in entry.items() if "_runtime" not in k and "per_second" not in k}
            for entry in trainer.state.log_history
        ],
        "scheduled": trainer.lr_scheduler.last_epoch,
        "flos": trainer.state.total_flos,
    }


def ran(case: Case, model: nn.Module, data: list, cls: type = SSAMTrainer, **given: Any) -> dict[str, Any]:
    """The outcome of a run with a method's case; `warned` are the warnings it gave."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = outcome(trained(model, case_arguments(case, **given), data, cls))
    return {**result, "warned": [str(w.message) for w in caught if "num_items_in_batch" in str(w.message)]}


def ran_stock(model: nn.Module, data: list, cls: type = Trainer, **given: Any) -> dict[str, Any]:
    """The outcome of a run with the stock Trainer."""
    return outcome(trained(model, arguments(TrainingArguments, **given), data, cls))


def resumed(case: Case, build: Callable[[], nn.Module], data: list, folder: Path, **given: Any) -> dict[str, Any]:
    """The outcome of 4 steps, as `whole`, and of 2 and a resumption for 2 more, as `halves`."""
    given = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "rho_scheduler_type": "linear", **given}
    straight = trained(build(), case_arguments(case, output_dir=str(folder / "whole"), **given), data)
    checkpoint = str(folder / "whole" / "checkpoint-2")
    again = SSAMTrainer(
        model=build(), args=case_arguments(case, output_dir=str(folder / "again"), **given), train_dataset=data
    )
    again.train(resume_from_checkpoint=checkpoint)
    return {"whole": outcome(straight), "halves": outcome(again)}


def without(entry: dict, *names: str) -> dict:
    """A log entry as the stock Trainer would write it, and without `names`."""
    return {k: v for k, v in entry.items() if k not in names and not k.startswith("ssam/")}


def rounding(case: Case) -> float:
    """How far two ways to add may end apart; Adam magnifies the rounding of a gradient that is nearly zero."""
    return 1e-4 if "own" in base_optimizers(case) else 1e-6


def total_skipped(outcome: dict) -> int:
    """How many steps the log says were skipped."""
    return sum(e.get("ssam/skipped_steps", 0) for e in outcome["log"])


class RecordingTrainer(SSAMTrainer):
    """Remembers the micro-batches of each optimizer step."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.windows: list[list[dict[str, Tensor]]] = []
        self._open = False

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        if not self._open:
            self.windows.append([])
        self.windows[-1].append({k: v.clone() for k, v in inputs.items()})
        self._open = not self.accelerator.sync_gradients
        return super().training_step(model, inputs, num_items_in_batch)


class SpoiledTrainer(SSAMTrainer):
    """Makes one loss infinite on the last rank.

    Attributes:
        spoiled: the optimizer step, from 0, and which of its passes, from 0.
    """

    spoiled = (2, 0)

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._seen: dict[int, int] = {}

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if not torch.is_grad_enabled():
            return loss
        step = self.state.global_step
        this = (step, self._seen.get(step, 0))
        self._seen[step] = this[1] + 1
        return loss * float("inf") if this == self.spoiled and dist.get_rank() == dist.get_world_size() - 1 else loss


class SpoiledSecondPass(SpoiledTrainer):
    """Makes the loss of a second pass infinite on the last rank."""

    spoiled = (2, 1)
