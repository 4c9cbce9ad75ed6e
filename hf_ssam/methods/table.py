"""The one table of methods: the command line's help, the README, the model card and the tests read it.

Nothing of it is written twice. A new paper is one file beside this one and one name in `_BUILT_IN`; a method of your
own is a `Method` given to `register_method`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from . import (
    adasam,
    asam,
    ausam,
    esam,
    friendly_sam,
    gsam,
    looksam,
    momentum_sam,
    sam,
    sparse_sam,
    ssam,
    usam,
    vasso,
    wsam,
)
from .method import Method

_BUILT_IN = (
    ssam.METHOD,
    sam.METHOD,
    usam.METHOD,
    asam.METHOD,
    friendly_sam.METHOD,
    looksam.METHOD,
    looksam.LAYERWISE,
    sparse_sam.METHOD,
    esam.METHOD,
    ausam.METHOD,
    gsam.METHOD,
    wsam.METHOD,
    vasso.METHOD,
    momentum_sam.METHOD,
    adasam.METHOD,
)
_TABLE = {method.name: method for method in _BUILT_IN}

METHODS: Mapping[str, Method] = MappingProxyType(_TABLE)
"""The live table, by name."""


def get_method(name: str, **options: Any) -> Method:
    """The row `name` with its options chosen.

    Args:
        name: a name in `METHODS`.
        **options: the method's options, as values or as the strings of a command line.

    Raises:
        ValueError: if the method or an option does not exist, or a value is out of range.
    """
    if name not in METHODS:
        raise ValueError(f"optim: there is no method `{name}`; choose one of {', '.join(METHODS)}.")
    return METHODS[name].with_options(**options)


def register_method(method: Method) -> Method:
    """Add a method of your own to the table: `--optim`, `TwoPass`, resume and the model card then know it by name.

    Args:
        method: its row. Register it before arguments are parsed, and in every process.

    Returns:
        The method.

    Raises:
        ValueError: if the name is taken, by a method or by a stock optimizer of Transformers, or is no plain word.
    """
    from transformers.training_args import OptimizerNames  # slow to import, and only needed here

    taken = "a method" if method.name in METHODS else "a stock optimizer"
    if method.name in (*METHODS, *(o.value for o in OptimizerNames)):
        raise ValueError(f"name: `{method.name}` is {taken} already; choose another name for your method.")
    if not method.name.isidentifier():
        raise ValueError(f"name: `{method.name}` is no plain word; use letters, digits and `_`, such as my_sam.")
    method.with_options()
    _TABLE[method.name] = method
    return method
