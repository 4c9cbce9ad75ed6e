"""A Trainer that stops calling a hook of ours ends at its first step or save: it never trains plainly in silence."""

from __future__ import annotations

import os

import pytest
import torch
from transformers import Trainer

from hf_ssam import SSAMTrainer, SSAMTrainerMixin
from tests.support.cases import arguments, assert_identical, bert, text_data, trained, weights


class InlinesPreparation(Trainer):
    """As a release of transformers that renamed `_prepare_for_training`."""

    def _inner_training_loop(self, *args, **kwargs):
        self._prepare_for_training = lambda *given: Trainer._prepare_for_training(self, *given)
        return super()._inner_training_loop(*args, **kwargs)


class InlinesTraining(Trainer):
    """A parent with a loop of its own, without preparation or callbacks."""

    def train(self, *args, **kwargs):
        self.create_optimizer()
        for batch in self.get_train_dataloader():
            self.training_step(self.model, batch)
            self.optimizer.step()


class StepsByItself(Trainer):
    """A parent whose loop computes its gradients by itself."""

    def _run_epoch(self, model, train_dataloader, **kwargs):
        for batch in train_dataloader:
            model(**batch).loss.backward()
            self.optimizer.step()
            self.state.global_step += 1
            self.control = self.callback_handler.on_step_end(self.args, self.state, self.control)


class SavesByItself(Trainer):
    """A parent that writes its checkpoints in another way."""

    def _save_checkpoint(self, model, trial):
        folder = os.path.join(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        self.save_model(folder, _internal_call=True)
        torch.save(self.optimizer.state_dict(), os.path.join(folder, "optimizer.pt"))
        self.state.save_to_json(os.path.join(folder, "trainer_state.json"))


def under_ours(parent: type) -> type:
    return type(f"Ours{parent.__name__}", (SSAMTrainerMixin, parent), {})


@pytest.mark.parametrize("parent", [InlinesPreparation, InlinesTraining])
def test_host_that_does_not_prepare_ends_before_the_first_step(parent):
    model = bert()
    before = weights(model)
    message = f"_prepare_for_training: Ours{parent.__name__} does not call it .* so sam would train as its base; use a"
    with pytest.raises(RuntimeError, match=message):
        trained(model, arguments(optim="sam"), text_data(), under_ours(parent))
    assert_identical(before, weights(model))


def test_host_that_steps_by_itself_ends_at_the_first_step():
    cls = under_ours(StepsByItself)
    trainer = cls(model=bert(), args=arguments(optim="sam"), train_dataset=text_data())
    with pytest.raises(
        RuntimeError, match="training_step: OursStepsByItself does not call it .* step 1 had no second"
    ):
        trainer.train()
    assert trainer.state.global_step == 1


def test_host_that_saves_by_itself_ends_at_the_first_save():
    cls = under_ours(SavesByItself)
    args = arguments(optim="sam", save_strategy="steps", save_steps=2)
    trainer = cls(model=bert(), args=args, train_dataset=text_data())
    with pytest.raises(
        RuntimeError, match="_save_optimizer_and_scheduler: .* so checkpoint-2 cannot be resumed from; set save_only"
    ):
        trainer.train()
    assert trainer.state.global_step == 2


def test_subclass_that_saves_by_itself_ends_at_the_first_save():
    cls = type("UnderOurs", (SSAMTrainer,), {"_save_checkpoint": SavesByItself._save_checkpoint})
    with pytest.raises(RuntimeError, match="_save_optimizer_and_scheduler: UnderOurs does not call it"):
        trained(bert(), arguments(optim="sam", save_strategy="steps", save_steps=2), text_data(), cls)


@pytest.mark.parametrize("cls", [SSAMTrainer, under_ours(SavesByItself)])
def test_weights_alone_may_be_saved(cls):
    args = arguments(optim="sam", save_strategy="steps", save_steps=2, save_only_model=True)
    assert trained(bert(), args, text_data(), cls).state.global_step == 4


@pytest.mark.parametrize("parent", [InlinesPreparation, SavesByItself])
def test_stock_optimizer_trains_under_any_host(parent):
    args = arguments(optim="sgd", save_strategy="steps", save_steps=2)
    assert trained(bert(), args, text_data(), under_ours(parent)).state.global_step == 4


def test_guard_is_there_only_while_training_runs():
    args = arguments(optim="sam", save_strategy="steps", save_steps=2)
    trainer = SSAMTrainer(model=bert(), args=args, train_dataset=text_data())
    callbacks = list(trainer.callback_handler.callbacks)
    trainer.train()
    assert trainer.callback_handler.callbacks == callbacks
    trainer.train(resume_from_checkpoint=f"{args.output_dir}/checkpoint-2")
    assert trainer.callback_handler.callbacks == callbacks and trainer.state.global_step == 4
