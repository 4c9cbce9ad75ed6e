"""The one table: each paper as a composition of rules, with its defaults, its cost and its citation.

The command line's help, the README's table, the model card and the tests read this table; nothing of it is written
twice. A new paper is a pure function in `ascent`, `descent`, `masks` or `selection`, and one row here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from numbers import Real
from types import MappingProxyType
from typing import Any

import torch

from ..rules import descent
from ..rules.context import chain
from . import papers, recipes
from .adasam import AdaSAM
from .options import Option, Value, read_options
from .papers import Paper
from .recipes import Rules


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
        optimizer: the base optimizer that belongs to the method; None: whichever the user chooses.
        values: the options' values that were chosen; the defaults where none was.
    """

    name: str
    summary: str
    build: Callable[..., Rules]
    rho: float
    paper: Paper
    options: Mapping[str, Option] = field(default_factory=dict)
    passes: str = "2"
    optimizer: type[torch.optim.Optimizer] | None = None
    values: Mapping[str, Value] = field(default_factory=dict)

    def rules(self) -> Rules:
        """The composition, with SSAM's descent after the method's own where `renormalize` is set."""
        values = {n: o.default for n, o in self.options.items()} | dict(self.values)
        rules = self.build(**{n: v for n, v in values.items() if n not in RENORMALIZE})
        if not values.get("renormalize"):
            return rules
        last = descent.renormalize(values["max_scale"])
        return replace(rules, descent=chain(rules.descent, last), reuse=chain(rules.reuse, last))


def _renormalize(default: bool) -> dict[str, Option]:
    return {
        "renormalize": Option(default, "hand on γ·d with γ = ‖g‖/‖d‖, SSAM's descent rule, after the method's own"),
        "max_scale": Option(
            math.inf,
            "largest γ; 1 is the truncated form of the official SSAM code",
            0.0,
            above=True,
            only_if=("renormalize", (True,)),
        ),
    }


RENORMALIZE = _renormalize(False)
NORMALIZE = {"normalize": Option(True, "e = ρ g/‖g‖; false gives e = ρ g, the form of the SSAM paper")}
ADAPTIVE = {"adaptive": Option(False, "the geometry of ASAM: T = |w| + η; ρ is then 0.5 unless you say otherwise")}


def _eta(only_if: tuple[str, tuple[Value, ...]] | None = None) -> dict[str, Option]:
    return {"eta": Option(0.01, "η in T = |w| + η (official ASAM code)", 0.0, only_if=only_if)}


WEIGHTS_ONLY = {"weights_only": Option(False, "T on parameters named `weight` only, as the official ASAM code has it")}


def _seed(only_if: tuple[str, tuple[Value, ...]] | None = None) -> dict[str, Option]:
    return {"seed": Option(0, "of the method's own random draws", 0, 10_000_000, only_if=only_if)}


SEED = _seed()
K = {"k": Option(5, "k: a second pass every k-th step (reported for the paper)", 1)}
ALPHA = {
    "alpha": Option(
        0.1, "α: share of g_v in the steps between; 0.7, reported for the paper, trained worse in re-runs", 0.0
    )
}


_TABLE = (
    Method(
        "ssam",
        "Stable SAM: the gradient at w + e, rescaled to the length of the gradient at w: d = (‖g‖/‖ĝ‖) ĝ.",
        recipes.sam,
        0.05,
        papers.SSAM,
        {**NORMALIZE, **ADAPTIVE, **_eta(("adaptive", (True,))), **_renormalize(True)},
    ),
    Method("sam", "SAM: the gradient at w + ρ g/‖g‖.", recipes.sam, 0.05, papers.SAM, RENORMALIZE),
    Method("usam", "Unnormalised SAM: the gradient at w + ρ g.", recipes.usam, 0.05, papers.USAM, RENORMALIZE),
    Method(
        "asam",
        "Adaptive SAM: the gradient at w + ρ T²g/‖T g‖ with T = |w| + η, which no rescaling of a layer changes.",
        recipes.asam,
        0.5,
        papers.ASAM,
        {**_eta(), **WEIGHTS_ONLY, **RENORMALIZE},
    ),
    Method(
        "friendly_sam",
        "Friendly SAM: the gradient at w + ρ q/‖q‖ with q = g − σ m, m a moving average of the gradients.",
        recipes.friendly_sam,
        0.05,
        papers.FRIENDLY_SAM,
        {
            "sigma": Option(1.0, "σ: how much of the average is taken out; 0 is SAM (official code)", 0.0),
            "lam": Option(0.9, "λ: weight of the past in the average (official code)", 0.0, 0.9999),
            "ema_order": Option("code", "whether m is updated after q (`code`) or before", choices=("code", "paper")),
            **RENORMALIZE,
        },
    ),
    Method(
        "looksam",
        "LookSAM: SAM every k-th step; between, d = g + α (‖g‖/‖g_v‖) g_v, with g_v what SAM's had orthogonal to g.",
        recipes.looksam,
        0.05,
        papers.LOOKSAM,
        {**K, **ALPHA, **RENORMALIZE},
        passes="1 + 1/k",
    ),
    Method(
        "look_layersam",
        "Look-LayerSAM: LookSAM with a perturbation of its own for each tensor, e_l = ρ ‖w_l‖ g_l/‖g_l‖.",
        recipes.look_layersam,
        0.05,
        papers.LOOKSAM,
        {
            **K,
            **ALPHA,
            "layer_scale": Option("weight", "e_l = ρ ‖w_l‖ g_l/‖g_l‖; `unit` drops ‖w_l‖", choices=("weight", "unit")),
            **RENORMALIZE,
        },
        passes="1 + 1/k",
    ),
    Method(
        "sparse_sam",
        "Sparse SAM: the gradient at w + ρ M ⊙ g/‖g‖ with a mask M of the coordinates that matter.",
        recipes.sparse_sam,
        0.05,
        papers.SPARSE_SAM,
        {
            "mask": Option(
                "fisher", "by Fisher information, or `dynamic`: drop and grow", choices=("fisher", "dynamic")
            ),
            "sparsity": Option(
                0.5,
                "s: share that is not perturbed (README recipes; class default 0.2)",
                0.0,
                1.0,
                only_if=("structure", ("element", "tensor")),
            ),
            "structure": Option("element", "`element`, `tensor`, or N:M such as 2:4, which sets the sparsity itself"),
            "update_freq": Option(100, "optimizer steps between refreshes of M; the paper counts epochs", 1),
            "num_samples": Option(
                16,
                "samples of the step's batch that F is summed over (README recipe)",
                1,
                only_if=("mask", ("fisher",)),
            ),
            "drop_rate": Option(
                0.5,
                "share that a dynamic mask first exchanges (official code)",
                0.0,
                1.0,
                only_if=("mask", ("dynamic",)),
            ),
            **_seed(("mask", ("dynamic",))),
            **RENORMALIZE,
        },
        passes="2, and num_samples/batch at each refresh",
    ),
    Method(
        "esam",
        "ESAM: a random share β of the coordinates is perturbed; pass 2 takes the γ|B| samples that rose most.",
        recipes.esam,
        0.05,
        papers.ESAM,
        {
            "beta": Option(0.6, "β: share of the coordinates perturbed (official run.sh)", 0.0, 1.0, True),
            "gamma": Option(0.5, "γ: share of the samples in the second pass (official run.sh)", 0.0, 1.0, True),
            **SEED,
            **RENORMALIZE,
        },
        passes="1 + γ, and one forward",
    ),
    Method(
        "ausam",
        "AUSAM: SAM on α|B| samples, drawn by how much each one's loss has risen under perturbation so far.",
        recipes.ausam,
        0.05,
        papers.AUSAM,
        {
            "alpha": Option(
                0.5, "α: share of the samples in both passes; 0.5 costs as much as no SAM", 0.0, 1.0, True
            ),
            "s_min": Option(0.5, "weight of the least risen (our choice, by a small trial)", 0.0, 1.0, True),
            "s_max": Option(1.0, "weight of the most risen (our choice)", 0.0, 1.0, True),
            **SEED,
            **RENORMALIZE,
        },
        passes="2α",
    ),
    Method(
        "gsam",
        "GSAM: d = ĝ − α g⊥, without a share of the part of g that is orthogonal to ĝ.",
        recipes.gsam,
        0.05,
        papers.GSAM,
        {"alpha": Option(0.4, "α: share of g⊥ taken out; 0 is SAM", 0.0), **RENORMALIZE},
    ),
    Method(
        "wsam",
        "WSAM, coupled form: d = (1 − κ) g + κ ĝ with κ = γ/(1 − γ).",
        recipes.wsam,
        0.05,
        papers.WSAM,
        {
            "gamma": Option(
                0.6, "γ: 0 is the base optimizer, 0.5 is SAM; 0.9, the decoupled code's, diverged", 0.0, 0.99
            ),
            **RENORMALIZE,
        },
    ),
    Method(
        "vasso",
        "VaSSO: the gradient at w + ρ d/‖d‖ with d ← (1 − θ) d + θ g.",
        recipes.vasso,
        0.2,
        papers.VASSO,
        {
            "theta": Option(0.9, "θ: weight of the new gradient; 1 is SAM (official README)", 0.0, 1.0, True),
            **RENORMALIZE,
        },
    ),
    Method(
        "momentum_sam",
        "Momentum-SAM: one gradient, at w − ρ m/‖m‖ with m a momentum buffer of its own.",
        recipes.momentum_sam,
        1.0,
        papers.MOMENTUM_SAM,
        {"momentum": Option(0.9, "μ in m ← μ m + g", 0.0, 0.9999)},
        passes="1",
    ),
    Method(
        "adasam",
        "AdaSAM: SAM's gradient in an AMSGrad of its own, without bias correction.",
        recipes.sam,
        0.05,
        papers.ADASAM,
        optimizer=AdaSAM,
    ),
)

_BY_NAME = {m.name: m for m in _TABLE}
METHODS: Mapping[str, Method] = MappingProxyType(_BY_NAME)
"""The table, by name; `register_method` adds to it."""


def register_method(method: Method) -> Method:
    """Add a method of your own to `METHODS`: `optim`, resume and the model card then know it by its name.

    Returns:
        The method, so that a module can keep it.

    Raises:
        ValueError: if the name is taken, by another method or by a stock optimizer.
    """
    from transformers.training_args import OptimizerNames  # not needed to use the table

    taken = "a method" if method.name in _BY_NAME else "a stock optimizer"
    if method.name in (*_BY_NAME, *OptimizerNames):
        raise ValueError(f"name: `{method.name}` is {taken} already; choose another name for your method.")
    _BY_NAME[method.name] = method
    return method


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
    values = read_options(name, method.options, options)
    rho = METHODS["asam"].rho if values.get("adaptive") else method.rho
    chosen = replace(method, values=MappingProxyType(values), rho=rho)
    chosen.rules()
    return chosen


def checked_rho(rho: float | None, method: Method) -> float:
    """`rho`, or the method's default where it is None.

    Raises:
        ValueError: if it is negative, infinite or not a number.
    """
    if rho is None:
        return method.rho
    if isinstance(rho, bool) or not isinstance(rho, Real) or not math.isfinite(rho) or rho < 0:
        raise ValueError(f"rho: {rho} is not allowed; choose a finite number from 0, such as {method.rho:g}.")
    return float(rho)
