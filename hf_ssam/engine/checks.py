"""What a method needs of the engine's other arguments, said in one sentence before the first pass (law 9)."""

from __future__ import annotations

import inspect
from collections.abc import Set
from numbers import Integral

from torch import nn

from ..methods.recipes import Rules
from .parameters import names_that_train
from .window import RunPass


def check_engine(
    rules: Rules, method: str, scope: str, world_size: int, replay_rng: bool, dataset_size: int | None
) -> None:
    """Refuse what does not go together with method `method`.

    Raises:
        ValueError: for state that ranks would keep apart, a vector handed on from step to step under a scope that has
            none, losses compared under different dropout, or scores of samples whose number is not known.
    """
    if rules.stateful and scope != "global" and world_size > 1:
        raise ValueError(
            f"ascent_scope: under `{scope}` every rank would keep its own state of method `{method}`, and they would "
            "drift apart; choose ascent_scope=global, or a method without state such as ssam."
        )
    if rules.period != 1 and scope == "micro_batch":
        raise ValueError(
            f"ascent_scope: method `{method}` hands on one vector from step to step, which is not a micro-batch's "
            "own; choose ascent_scope=global, or a method that takes both passes at each step."
        )
    if rules.selection is not None and not replay_rng:
        raise ValueError(
            f"replay_rng: method `{method}` compares losses of two passes, which mean nothing under different "
            "dropout masks; leave replay_rng on."
        )
    if rules.needs_ids and dataset_size is None:
        raise ValueError(
            f"dataset_size: method `{method}` keeps a score of each sample and needs their number; pass "
            "dataset_size=len(dataset)."
        )


def check_sizes(**sizes: int | None) -> None:
    """Refuse a number that cannot be one of samples or steps; None: not known.

    Raises:
        ValueError: if one is not an integer from 1.
    """
    for name, size in sizes.items():
        if size is not None and (isinstance(size, bool) or not isinstance(size, Integral) or size < 1):
            raise ValueError(f"{name}: {size} is not allowed; choose an integer from 1, or leave it out.")


def check_unfrozen(model: nn.Module, known: Set[str]) -> None:
    """Refuse a parameter that trains and was frozen when the engine was built: both passes would add to its `.grad`.

    Args:
        model: the model, unwrapped.
        known: `parameters.names_that_train` when the engine was built.

    Raises:
        ValueError: naming it.
    """
    for name in sorted(names_that_train(model) - known):
        raise ValueError(
            f"model: `{name}` requires a gradient and did not when the engine was built; build a new TwoPass after "
            "unfreezing (a Trainer does whenever training starts)."
        )


def check_takes_indices(run: RunPass, method: str) -> None:
    """Refuse a pass that cannot run on some of its samples, where the method asks for that.

    Raises:
        ValueError: if `run` takes no argument.
    """
    try:
        inspect.signature(run).bind(None)
    except TypeError:
        raise ValueError(
            f"run_pass: method `{method}` runs a batch on some of its samples; let run_pass take their indices, such "
            "as `def run_pass(indices=slice(None))`."
        ) from None
