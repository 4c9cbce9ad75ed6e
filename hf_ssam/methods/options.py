"""A method's options: their defaults, their ranges, and the one way they are read from a string or from Python."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

Value = bool | int | float | str

_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


@dataclass(frozen=True)
class Option:
    """One option of a method.

    Attributes:
        default: value where the user says nothing; its type is the option's type.
        help: what it does, in the paper's symbol, and where the default comes from.
        low: smallest value allowed.
        high: largest value allowed.
        above: whether `low` itself is excluded.
        choices: the values allowed, for a string.
        only_if: another option, and the values of it without which this one has no effect; None: it always has.
        rho: the method's default radius where this option is on; None: as it is.
    """

    default: Value
    help: str
    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    choices: tuple[str, ...] = ()
    only_if: tuple[str, tuple[Value, ...]] | None = None
    rho: float | None = None

    def read(self, method: str, name: str, raw: Any) -> Value:
        """`raw` as this option's type.

        Raises:
            ValueError: if it is of another type or out of range.
        """
        try:
            value = self._converted(raw)
        except (TypeError, ValueError, OverflowError):
            value = math.nan
        if not self._holds(value):
            raise ValueError(
                f"optim_args: {name}={raw} is not allowed for method `{method}`; choose {self.range}, "
                f"such as {name}={self.default}."
            )
        return value

    @property
    def range(self) -> str:
        """The allowed values, in words."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        if isinstance(self.default, bool):
            return "true or false"
        kind = "an integer" if isinstance(self.default, int) else "a number"
        low = "" if self.low == -math.inf else f" {'above' if self.above else 'from'} {self.low:g}"
        return kind + low + ("" if self.high == math.inf else f" up to {self.high:g}")

    def _converted(self, raw: Any) -> Value:
        if isinstance(self.default, bool):
            return raw if isinstance(raw, bool) else _boolean(str(raw))
        if isinstance(self.default, str):
            return str(raw)
        if isinstance(raw, bool):
            raise TypeError(raw)
        if isinstance(self.default, int):
            if float(raw) != int(float(raw)):
                raise ValueError(raw)
            return int(float(raw))
        return float(raw)

    def _holds(self, value: Value) -> bool:
        if isinstance(self.default, bool):
            return isinstance(value, bool)
        if isinstance(self.default, str):
            return value in self.choices if self.choices else isinstance(value, str)
        number = cast(float, value)
        finite = math.isfinite(number) or number == self.default
        return finite and (self.low < number if self.above else self.low <= number) and number <= self.high


def _boolean(text: str) -> bool:
    if text.lower() not in _TRUE + _FALSE:
        raise ValueError(text)
    return text.lower() in _TRUE


def read_options(method: str, options: Mapping[str, Option], given: Mapping[str, Any]) -> dict[str, Value]:
    """Every option of `options`, as given or by default.

    Raises:
        ValueError: if `given` names an option that does not exist, a value out of range, or a value that has no
            effect beside the others.
    """
    for name in given:
        if name not in options:
            raise ValueError(
                f"optim_args: method `{method}` has no option `{name}`; its options are {', '.join(sorted(options))}."
            )
    values = {n: o.read(method, n, given[n]) if n in given else o.default for n, o in options.items()}
    for name in given:
        _refuse_idle(method, name, options[name], values)
    return values


def _refuse_idle(method: str, name: str, option: Option, values: Mapping[str, Value]) -> None:
    if option.only_if is None or values[name] == option.default:
        return
    other, needed = option.only_if
    if values[other] not in needed:
        ways = " or ".join(f"{other}={value}" for value in needed)
        raise ValueError(
            f"optim_args: {name}={values[name]} has no effect for method `{method}` with {other}={values[other]}; "
            f"drop it, or choose {ways}."
        )


def parse_optim_args(text: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """`"k=5,alpha=0.1"`, the form of the stock `optim_args` field, as a dictionary.

    Raises:
        ValueError: if a part of `text` is not `name=value`, or a name is given twice.
    """
    if text is None or isinstance(text, Mapping):
        return dict(text or {})
    options: dict[str, Any] = {}
    for part in (part.strip() for part in text.split(",") if part.strip()):
        if part.count("=") != 1:
            raise ValueError(f"optim_args: `{part}` is not of the form name=value; write for example `k=5,alpha=0.1`.")
        name, value = (word.strip() for word in part.split("="))
        if name in options:
            raise ValueError(f"optim_args: `{name}` is given twice, as {options[name]} and as {value}; keep one.")
        options[name] = value
    return options
