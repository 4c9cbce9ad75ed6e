"""The one table of methods: the command line's help, the README, the model card and the tests read it.

Nothing of it is written twice. A new paper is one file beside this one: every `Method` that a file of this folder
defines is a row. A method of your own, in your own code, is a `Method` given to `register_method`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .method import RHO_MAX, Method

DEFAULT = "ssam"
"""The method of `optim` where none is named, and the first row."""


def _defined() -> Iterator[Method]:
    """The methods that the files of this package define."""
    for file in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if file.name != "table":
            names = vars(importlib.import_module(f".{file.name}", __package__))
            yield from (value for value in names.values() if isinstance(value, Method))


def _rows() -> dict[str, Method]:
    """The default first, then by the year of the paper."""
    methods = sorted(_defined(), key=lambda m: (m.name != DEFAULT, m.paper.year, m.name))
    return {method.name: method for method in methods}


_TABLE = _rows()

METHODS: Mapping[str, Method] = MappingProxyType(_TABLE)
"""The live table, by name."""


def get_method(name: str, rho_unit: str = "weight", rho_max: float = RHO_MAX, **options: Any) -> Method:
    """The row `name` with its options chosen.

    Args:
        name: a name in `METHODS`.
        rho_unit: what ρ is measured in: `weight`, `loss` or `relative_loss`; see `Method.measured_in`.
        rho_max: the longest perturbation where that is not `weight`.
        **options: the method's options, as values or as the strings of a command line.

    Raises:
        ValueError: if the method or an option does not exist, or a value is out of range.
    """
    if name not in METHODS:
        raise ValueError(f"optim: there is no method `{name}`; choose one of {', '.join(METHODS)}.")
    return METHODS[name].with_options(**options).measured_in(rho_unit, rho_max)


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
