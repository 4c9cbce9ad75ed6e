"""The one table: each paper as a composition of rules, with its defaults, its cost and its citation.

The command line's help, the README's table, the model card and the tests read this table; nothing of it is written
twice. A new paper is a pure function in `ascent`, `descent`, `masks` or `selection`, and one row here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from . import ascent, descent, papers
from .options import Option, Value, read_options
from .papers import Paper
from .rules import Rule, chain


@dataclass(frozen=True)
class Rules:
    """What the engine runs.

    Attributes:
        ascent: `g -> u`, so that the second pass is taken at `w + ρ u`.
        descent: `ĝ -> d`.
        keeps_gradient: whether `descent` reads `at.g`; otherwise `g` is freed before the second pass.
    """

    ascent: Rule = chain()
    descent: Rule = chain()
    keeps_gradient: bool = False


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        name: what `--optim` takes.
        summary: one sentence, with the formula.
        build: options -> rules.
        rho: default radius ρ, in the units of the method's ascent.
        paper: where it comes from.
        options: what `optim_args` takes.
        passes: cost of one perturbed step, in forward-backward passes over the batch, as text.
        values: the options' values, once chosen.
    """

    name: str
    summary: str
    build: Callable[..., Rules]
    rho: float
    paper: Paper
    options: Mapping[str, Option] = field(default_factory=dict)
    passes: str = "2"
    values: Mapping[str, Value] = field(default_factory=dict)

    def rules(self) -> Rules:
        """The composition, with SSAM's descent after the method's own where `renormalize` is set."""
        own = {n: v for n, v in self.values.items() if n not in RENORMALIZE}
        rules = self.build(**own)
        if not self.values["renormalize"]:
            return rules
        return replace(rules, descent=chain(rules.descent, descent.renormalize(self.values["max_scale"])))


def _renormalize(default: bool) -> dict[str, Option]:
    return {
        "renormalize": Option(default, "hand on γ·d with γ = ‖g‖/‖d‖, SSAM's descent rule, after the method's own"),
        "max_scale": Option(math.inf, "largest γ; 1 is the truncated form of the official SSAM code", 0.0, above=True),
    }


RENORMALIZE = _renormalize(False)
NORMALIZE = {"normalize": Option(True, "e = ρ g/‖g‖; false gives e = ρ g, the form of the SSAM paper")}
ADAPTIVE = {"adaptive": Option(False, "the geometry of ASAM: T = |w| + η")}
ETA = {"eta": Option(0.01, "η in T = |w| + η (official ASAM code)", 0.0)}
WEIGHTS_ONLY = {"weights_only": Option(False, "T on parameters named `weight` only, as the official ASAM code has it")}


def _sam(normalize: bool = True, adaptive: bool = False, eta: float = 0.01, weights_only: bool = False) -> Rules:
    metric = ascent.adaptive(eta, weights_only) if adaptive else None
    return Rules(ascent=ascent.direction(normalize, metric))


def _usam() -> Rules:
    return _sam(normalize=False)


def _asam(eta: float, weights_only: bool) -> Rules:
    return _sam(adaptive=True, eta=eta, weights_only=weights_only)


_TABLE = (
    Method(
        "ssam",
        "Stable SAM: the gradient at w + e, rescaled to the length of the gradient at w: d = (‖g‖/‖ĝ‖) ĝ.",
        _sam,
        0.05,
        papers.SSAM,
        {**NORMALIZE, **ADAPTIVE, **ETA, **_renormalize(True)},
    ),
    Method("sam", "SAM: the gradient at w + ρ g/‖g‖.", _sam, 0.05, papers.SAM, RENORMALIZE),
    Method("usam", "Unnormalised SAM: the gradient at w + ρ g.", _usam, 0.05, papers.USAM, RENORMALIZE),
    Method(
        "asam",
        "Adaptive SAM: the gradient at w + ρ T²g/‖T g‖ with T = |w| + η, which no rescaling of a layer changes.",
        _asam,
        0.5,
        papers.ASAM,
        {**ETA, **WEIGHTS_ONLY, **RENORMALIZE},
    ),
)

METHODS: Mapping[str, Method] = MappingProxyType({m.name: m for m in _TABLE})
"""The table, by name."""


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
    method = METHODS[name]
    return replace(method, values=MappingProxyType(read_options(name, method.options, options)))


def checked_rho(rho: float | None, method: Method) -> float:
    """`rho`, or the method's default where it is None.

    Raises:
        ValueError: if it is negative, infinite or not a number.
    """
    if rho is None:
        return method.rho
    if isinstance(rho, bool) or not isinstance(rho, int | float) or not math.isfinite(rho) or rho < 0:
        raise ValueError(f"rho: {rho} is not allowed; choose a finite number from 0, such as {method.rho:g}.")
    return float(rho)
