"""What `optim` and `base_optim` take: the methods that are registered when it is asked, and the stock optimizers."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from transformers.training_args import OptimizerNames
from transformers.utils import ExplicitEnum

from ..methods.table import METHODS, Method

STOCK = tuple(name.value for name in OptimizerNames)
"""What `optim` takes in a stock arguments class."""


def checked_optim(name: Any) -> str:
    """`name` as a plain string.

    Raises:
        ValueError: if it is neither a method's nor a stock optimizer's.
    """
    name = plain(name)
    if name not in METHODS and name not in STOCK:
        near = _nearest(name, (*METHODS, *STOCK))
        every = f" Methods: {', '.join(METHODS)}; or a stock optimizer name such as adamw_torch, sgd."
        raise ValueError(f"optim: there is no `{name}`{near}{every if near == '.' else ''}")
    return name


def checked_base(name: Any) -> OptimizerNames:
    """`name` as a member of the stock enum.

    Raises:
        ValueError: if it is no stock optimizer's.
    """
    name = plain(name)
    if name in METHODS:
        raise ValueError(
            f"base_optim: `{name}` is a method; write optim={name}, with a stock optimizer as base_optim."
        )
    if name not in STOCK:
        raise ValueError(
            f"base_optim: there is no `{name}`{_nearest(name, STOCK)} Choose a stock optimizer name such as "
            "adamw_torch, sgd."
        )
    return OptimizerNames(name)


def _nearest(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name.lower(), names)
    return f"; did you mean {' or '.join(f'`{n}`' for n in near)}?" if near else "."


def plain(name: Any) -> str:
    """A name, or a member of an enum of names, as a plain string."""
    return name.value if isinstance(name, ExplicitEnum) else str(name)


OPTIONS_HELP = (
    "The method's own options, `name=value,name=value`: `hf-ssam method NAME` lists them. Those of the base optimizer "
    "go into base_optim_args."
)


def optim_help(methods: Mapping[str, Method]) -> str:
    """The help of `--optim`."""
    return _for_argparse(
        f"A sharpness-aware method: {', '.join(map(_row, methods.values()))}; one that you registered; or any stock "
        "optimizer name, for plain training. `hf-ssam methods` says when to choose which."
    )


def _row(method: Method) -> str:
    return f"`{method.name}` (rho {method.rho:g}{', experimental' if method.experimental else ''})"


def _for_argparse(text: str) -> str:
    """argparse formats a help text with `%`."""
    return text.replace("%", "%%")
