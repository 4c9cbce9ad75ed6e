"""Code that makes an optimizer from the arguments gets the base one under our Trainer, and an error elsewhere."""

from __future__ import annotations

import pytest
import torch
from transformers import Trainer

from hf_ssam import SSAMTrainer, SSAMTrainerMixin
from hf_ssam.methods.adasam import AdaSAM
from tests.support.cases import arguments, bert, text_data

BASE = {"base_optim": "sgd", "base_optim_args": "momentum=0.9", "learning_rate": 0.1}
SGD = (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9})


def stock_optimizer(training_args, model):
    """As other packages write it: from the arguments alone, by the stock Trainer's static method."""
    optimizer_class, kwargs = Trainer.get_optimizer_cls_and_kwargs(training_args, model)
    return optimizer_class([{"params": list(model.parameters())}], **kwargs)


class Theirs(Trainer):
    """A parent whose `create_optimizer` asks the stock Trainer."""

    def create_optimizer(self, model=None):
        self.optimizer = self.optimizer or stock_optimizer(self.args, self.model)
        return super().create_optimizer(model)


class OverTheirs(SSAMTrainerMixin, Theirs):
    """Ours comes first."""


class UnderTheirs(SSAMTrainer):
    """Theirs comes first, and does not come to ours."""

    def create_optimizer(self, model=None):
        self.optimizer = stock_optimizer(self.args, self.model)
        return self.optimizer


class AskedOfItself(SSAMTrainer):
    """Asks its own class."""

    def create_optimizer(self, model=None):
        optimizer_class, kwargs = type(self).get_optimizer_cls_and_kwargs(self.args)
        self.optimizer = optimizer_class(self.model.parameters(), **kwargs)
        return self.optimizer


def trainer_of(cls: type, **given) -> Trainer:
    return cls(model=bert(), args=arguments(optim="ssam", max_steps=2, **{**BASE, **given}), train_dataset=text_data())


@pytest.mark.parametrize("cls", [SSAMTrainer, OverTheirs, UnderTheirs])
def test_base_optimizer_is_given_by_the_class_as_by_the_trainer(cls):
    trainer = trainer_of(cls)
    assert cls.get_optimizer_cls_and_kwargs(trainer.args) == SGD
    assert cls.get_optimizer_cls_and_kwargs(trainer.args, trainer.model) == SGD
    assert trainer.get_optimizer_cls_and_kwargs(trainer.args, model=trainer.model) == SGD
    assert trainer.args.optim == "ssam"


@pytest.mark.parametrize("cls", [SSAMTrainer, OverTheirs, UnderTheirs, AskedOfItself])
def test_base_optimizer_is_made_by_code_that_asks_the_stock_trainer(cls):
    trainer = trainer_of(cls)
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is torch.optim.SGD and optimizer.defaults["momentum"] == 0.9
    assert trainer.args.optim == "ssam" and trainer.args.optim_args is None
    assert trainer.state.log_history[0]["ssam/passes"] == 2


@pytest.mark.parametrize("create", ["create_optimizer", "create_optimizer_and_scheduler"])
def test_base_optimizer_is_made_before_training_too(create):
    trainer = trainer_of(OverTheirs)
    getattr(trainer, create)(*([5] if create.endswith("scheduler") else []))
    assert type(trainer.optimizer) is torch.optim.SGD and trainer.args.optim == "ssam"


def test_method_has_its_name_again_after_an_optimizer_that_failed():
    trainer = trainer_of(OverTheirs, base_optim_args="momentum=much")
    with pytest.raises(ValueError, match="could not convert string to float: 'much'"):
        trainer.train()
    assert (trainer.args.optim, trainer.args.optim_args) == ("ssam", None)


def test_stock_trainer_still_fails_loudly():
    args = arguments(optim="ssam", **BASE)
    with pytest.raises(ValueError, match="unsupported optimizer: ssam"):
        Trainer.get_optimizer_cls_and_kwargs(args)
    with pytest.raises(ValueError, match="unsupported optimizer: ssam"):
        Theirs(model=bert(), args=args, train_dataset=text_data()).train()


def test_method_with_an_optimizer_of_its_own_is_not_given_another():
    args = arguments(optim="adasam")
    assert SSAMTrainer.get_optimizer_cls_and_kwargs(args)[0] is AdaSAM
    with pytest.raises(ValueError, match="unsupported optimizer: adasam"):
        OverTheirs(model=bert(), args=args, train_dataset=text_data()).train()


def test_stock_name_gives_the_stock_answer():
    args = arguments(optim="adafactor")
    assert SSAMTrainer.get_optimizer_cls_and_kwargs(args) == Trainer.get_optimizer_cls_and_kwargs(args)
