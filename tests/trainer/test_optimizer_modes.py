"""Optimizers that do more than step: swap the weights between modes, or step inside backward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_ssam import SSAMTrainer
from hf_ssam.trainer.checks import refuse_steps_in_backward
from tests.support.cases import Case, arguments, assert_identical, case_arguments, gpt2, lm_data, weights


class ScheduleFree(torch.optim.Optimizer):
    """Schedule-free SGD (arXiv 2405.15682) as its official code has it: `p` is y = (1 − β) z + β x in training mode,
    and the average x, recovered from y and z, in evaluation mode."""

    def __init__(self, params: Any, lr: float = 0.1, beta: float = 0.9):
        super().__init__(params, {"lr": lr, "beta": beta})
        self.training, self.steps = True, 0

    def _params(self) -> Iterator[tuple[nn.Parameter, dict[str, Any]]]:
        return ((p, group) for group in self.param_groups for p in group["params"])

    @torch.no_grad()
    def _switch(self, training: bool) -> None:
        if self.training != training:
            self.training = training
            for p, group in self._params():
                if self.state[p]:
                    p.lerp_(self.state[p]["z"], 1 - group["beta"] if training else 1 - 1 / group["beta"])

    def train(self) -> None:
        self._switch(True)

    def eval(self) -> None:
        self._switch(False)

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        assert self.training
        self.steps += 1
        for p, group in self._params():
            if p.grad is not None:
                state, lr, weight = self.state[p], group["lr"], 1 / self.steps
                if not state:
                    state["z"] = p.clone()
                p.lerp_(state["z"], weight).add_(p.grad, alpha=lr * (group["beta"] * (1 - weight) - 1))
                state["z"].sub_(p.grad, alpha=lr)


def run(cls: type[Trainer], args: TrainingArguments) -> Trainer:
    trainer = cls(
        model=gpt2(0.1),
        args=args,
        train_dataset=lm_data(),
        eval_dataset=lm_data(8, seed=3),
        optimizer_cls_and_kwargs=(ScheduleFree, {"lr": 0.1}),
    )
    trainer.train()
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("method", ["momentum_sam", "sam", "looksam"])
def test_weights_that_the_optimizer_swaps_for_evaluation_are_those_of_the_stock_trainer(
    method: str, accumulation: int
):
    given = {"eval_strategy": "steps", "eval_steps": 1, "gradient_accumulation_steps": accumulation, "max_steps": 4}
    stock = run(Trainer, arguments(TrainingArguments, optim="sgd", **given))
    ours = run(SSAMTrainer, case_arguments(Case(method, rho=1e-30), **given))
    assert_identical(weights(ours.model), weights(stock.model))
    evaluated = [[e["eval_loss"] for e in t.state.log_history if "eval_loss" in e] for t in (ours, stock)]
    assert evaluated[0] == evaluated[1] and len(set(evaluated[0])) == 4


# ------------------------------------------------------------------------------------------- steps in backward


def step_in_backward(model: nn.Module, wrap: Callable = lambda hook: hook) -> None:
    """As the PyTorch tutorial on memory has it: one optimizer a parameter, run as soon as its gradient is there."""
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}

    def hook(p: nn.Parameter) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(wrap(hook))


@pytest.mark.parametrize("wrap", [lambda hook: hook, lambda hook: functools.partial(lambda h, p: h(p), hook)])
def test_optimizer_that_steps_in_backward_is_refused(wrap: Callable):
    model = gpt2()
    step_in_backward(model, wrap)
    with pytest.raises(ValueError, match="model: `transformer.wte.weight` has a hook .* after each backward"):
        SSAMTrainer(model=model, args=case_arguments(Case("sam")), train_dataset=lm_data())


def test_hooks_added_after_construction_are_refused_when_training_starts():
    trainer = SSAMTrainer(model=gpt2(), args=case_arguments(Case("sam")), train_dataset=lm_data())
    step_in_backward(trainer.model)
    with pytest.raises(ValueError, match="register_post_accumulate_grad_hook"):
        trainer.train()


def test_hooks_under_a_stock_optimizer_are_the_users_own_business():
    model = gpt2()
    step_in_backward(model)
    SSAMTrainer(model=model, args=arguments(optim="sgd"), train_dataset=lm_data())


@pytest.mark.parametrize("library", ["torch.nn.parallel.distributed", "transformers.trainer", "accelerate.utils"])
def test_hooks_of_the_libraries_that_distribute_are_none_of_that(library: str):
    """The hook that averages adapters' gradients over the ranks of a sharded model, among others."""

    def average_gradient(p: nn.Parameter) -> None:
        pass

    average_gradient.__module__ = library
    model = nn.Linear(2, 2)
    model.weight.register_post_accumulate_grad_hook(average_gradient)
    refuse_steps_in_backward(model)
