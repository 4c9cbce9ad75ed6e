"""The optimizer that uses the gradient: made by the host, from the base optimizer's name."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from .host import Host


class _OfClassOrTrainer:
    """A method of `BaseOptimizerMixin` that a class answers as well as a trainer does.

    The Trainer's own is static, and code calls it on the class; a parent's may need the trainer (its loss may have
    weights). The parent is found from whichever is at hand.
    """

    def __init__(self, function: Callable[..., Any]):
        self._function = function
        self.__doc__ = function.__doc__

    def __get__(self, trainer: Any, owner: type) -> Callable[..., Any]:
        return partial(self._function, super(BaseOptimizerMixin, owner if trainer is None else trainer))


class BaseOptimizerMixin(Host):
    """Gives the host the base optimizer's name wherever it makes an optimizer.

    Code that asks `Trainer.get_optimizer_cls_and_kwargs(args)` for the class, as many a `create_optimizer` does, then
    gets the base optimizer's; outside, and under a stock Trainer, it is told that there is no optimizer `ssam`.
    """

    @_OfClassOrTrainer
    def get_optimizer_cls_and_kwargs(  # type: ignore[override]
        parent: Any,  # noqa: N805
        args: Any,
        model: Any = None,
    ) -> tuple[Any, Any]:
        """The base optimizer's class and arguments; `adasam` brings its own."""
        own = args.method().optimizer if args.is_sharpness_aware else None
        if own is not None:
            betas = (args.adam_beta1, args.adam_beta2)
            return own, {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon}
        return parent.get_optimizer_cls_and_kwargs(args.base_arguments(), model)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As the parent's."""
        with self._making_an_optimizer():
            return super().create_optimizer(*args, **kwargs)

    def create_optimizer_and_scheduler(self, *args: Any, **kwargs: Any) -> None:
        """As the parent's."""
        with self._making_an_optimizer():
            super().create_optimizer_and_scheduler(*args, **kwargs)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        with self._making_an_optimizer():  # by a subclass's `create_optimizer`, which may not come to ours
            return super()._prepare_for_training(*args, **kwargs)

    def _making_an_optimizer(self) -> contextlib.AbstractContextManager[None]:
        """No stock name stands for an optimizer that a method brings, so that one keeps the method's."""
        if self.args.is_sharpness_aware and self.args.method().optimizer is not None:
            return contextlib.nullcontext()
        return self.args.base_optimizer_named()
