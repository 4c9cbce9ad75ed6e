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

import torch

from . import ascent, descent, masks, papers, selection
from .adasam import AdaSAM
from .options import Option, Value, read_options
from .papers import Paper
from .rules import Rule, chain
from .selection import Selection
from .tensors import Space

Check = Callable[[Space, tuple[str, ...]], None]


@dataclass(frozen=True)
class Rules:
    """What the engine runs.

    Attributes:
        ascent: `g -> u`, so that the second pass is taken at `w + ρ u`.
        descent: `ĝ -> d`.
        keeps_gradient: whether `descent` reads `at.g`; otherwise `g` is freed before the second pass.
        period: the second pass is taken at every `period`-th step that the method is at work in; 0: never.
        reuse: `g -> d` at the other steps.
        anticipate: `{} -> u`, from memory alone, so that the first pass is taken at `w + ρ u`; None: at `w`.
        selection: which samples the passes run on; None: all.
        per_example: whether a rule asks for the gradient of single samples.
        checks: `(space, perturbed names)`, raising where the model does not fit the method.
        stateful: whether a rule keeps something of the gradients in memory, which must then be the same on every rank.
    """

    ascent: Rule = chain()
    descent: Rule = chain()
    keeps_gradient: bool = False
    period: int = 1
    reuse: Rule = chain()
    anticipate: Rule | None = None
    selection: Selection | None = None
    per_example: bool = False
    checks: tuple[Check, ...] = ()
    stateful: bool = False

    @property
    def takes_indices(self) -> bool:
        """Whether passes are run on some of a batch's samples."""
        return self.per_example or self.selection is not None

    @property
    def needs_ids(self) -> bool:
        """Whether the method must know which sample of the data set is which."""
        return self.selection is not None and self.selection.learn is not None

    def ascends(self, step: int) -> bool:
        """Whether step `step` (from 0) takes a second pass."""
        return self.period > 0 and step % self.period == 0


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
        values: the options' values, once chosen.
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
        own = {n: v for n, v in self.values.items() if n not in RENORMALIZE}
        rules = self.build(**own)
        if not self.values.get("renormalize"):
            return rules
        last = descent.renormalize(self.values["max_scale"])
        return replace(rules, descent=chain(rules.descent, last), reuse=chain(rules.reuse, last))


def _renormalize(default: bool) -> dict[str, Option]:
    return {
        "renormalize": Option(default, "hand on γ·d with γ = ‖g‖/‖d‖, SSAM's descent rule, after the method's own"),
        "max_scale": Option(math.inf, "largest γ; 1 is the truncated form of the official SSAM code", 0.0, above=True),
    }


RENORMALIZE = _renormalize(False)
NORMALIZE = {"normalize": Option(True, "e = ρ g/‖g‖; false gives e = ρ g, the form of the SSAM paper")}
ADAPTIVE = {"adaptive": Option(False, "the geometry of ASAM: T = |w| + η; ρ is then 0.5 unless you say otherwise")}
ETA = {"eta": Option(0.01, "η in T = |w| + η (official ASAM code)", 0.0)}
WEIGHTS_ONLY = {"weights_only": Option(False, "T on parameters named `weight` only, as the official ASAM code has it")}


def _sam(normalize: bool = True, adaptive: bool = False, eta: float = 0.01, weights_only: bool = False) -> Rules:
    metric = ascent.adaptive(eta, weights_only) if adaptive else None
    return Rules(ascent=ascent.direction(normalize, metric))


def _usam() -> Rules:
    return _sam(normalize=False)


def _asam(eta: float, weights_only: bool) -> Rules:
    return _sam(adaptive=True, eta=eta, weights_only=weights_only)


def _friendly_sam(sigma: float, lam: float, ema_order: str) -> Rules:
    rule = ascent.friendly(sigma, lam, ema_order)
    return Rules(ascent=chain(rule, ascent.normalize), stateful=sigma > 0)


def _vasso(theta: float) -> Rules:
    return Rules(ascent=chain(ascent.smoothed(theta), ascent.normalize), stateful=theta < 1)


def _looksam(k: int, alpha: float, first: Rule = ascent.normalize) -> Rules:
    return Rules(
        first, descent.keep_orthogonal, keeps_gradient=True, period=k, reuse=descent.look(alpha), stateful=True
    )


def _look_layersam(k: int, alpha: float, layer_scale: str) -> Rules:
    return _looksam(k, alpha, ascent.layerwise(by_weight=layer_scale == "weight"))


def _gsam(alpha: float) -> Rules:
    return Rules(ascent.normalize, descent.less_of_what_is_orthogonal(alpha), keeps_gradient=True)


def _wsam(gamma: float) -> Rules:
    return Rules(ascent.normalize, descent.weighted(gamma / (1 - gamma)), keeps_gradient=True)


def _momentum_sam(momentum: float) -> Rules:
    return Rules(period=0, reuse=descent.remember(momentum), anticipate=ascent.anticipation, stateful=True)


def _sparse_sam(
    mask: str, sparsity: float, structure: str, update_freq: int, num_samples: int, drop_rate: float, seed: int
) -> Rules:
    if sparsity == 0 and structure == "element":
        return _sam()
    if mask == "dynamic":
        if structure != "element":
            raise ValueError(
                f"optim_args: structure={structure} is not allowed with mask=dynamic; choose mask=fisher, or "
                "structure=element."
            )
        refresh, checks = masks.dynamic(sparsity, drop_rate, seed), ()
    elif structure == "element":
        refresh, checks = masks.fisher(sparsity, num_samples), (masks.whole_gradients,)
    elif structure == "tensor":
        refresh, checks = masks.fisher_tensors(sparsity, num_samples), (masks.whole_gradients,)
    else:
        n, m = masks.read_n_of_m(structure)
        refresh, checks = masks.fisher_n_of_m(n, m, num_samples), (masks.whole_gradients, masks.divides(m))
    rule = chain(ascent.normalize, masks.masked(refresh, update_freq))
    return Rules(rule, per_example=mask == "fisher", checks=checks, stateful=True)


def _esam(beta: float, gamma: float, seed: int) -> Rules:
    picks = Selection(between=selection.sharpest(gamma)) if gamma < 1 else None
    return Rules(chain(ascent.normalize, masks.random_subset(beta, seed)), selection=picks)


def _ausam(alpha: float, s_min: float, s_max: float, seed: int) -> Rules:
    if s_min > s_max:
        raise ValueError(
            f"optim_args: s_min={s_min} is above s_max={s_max} for method `ausam`; choose s_min <= s_max."
        )
    if alpha == 1:
        return _sam()
    picks = Selection(before=selection.by_rise(alpha, s_min, s_max, seed), learn=selection.average_rise)
    return Rules(ascent.normalize, selection=picks, stateful=True)


SEED = {"seed": Option(0, "of the method's own random draws; the same on every rank", 0, 10_000_000)}
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
    Method(
        "friendly_sam",
        "Friendly SAM: the gradient at w + ρ q/‖q‖ with q = g − σ m, m a moving average of the gradients.",
        _friendly_sam,
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
        _looksam,
        0.05,
        papers.LOOKSAM,
        {**K, **ALPHA, **RENORMALIZE},
        passes="1 + 1/k",
    ),
    Method(
        "look_layersam",
        "Look-LayerSAM: LookSAM with a perturbation of its own for each tensor, e_l = ρ ‖w_l‖ g_l/‖g_l‖.",
        _look_layersam,
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
        _sparse_sam,
        0.05,
        papers.SPARSE_SAM,
        {
            "mask": Option(
                "fisher", "by Fisher information, or `dynamic`: drop and grow", choices=("fisher", "dynamic")
            ),
            "sparsity": Option(0.5, "s: share that is not perturbed (README recipes; class default 0.2)", 0.0, 1.0),
            "structure": Option("element", "`element`, `tensor`, or N:M such as 2:4, which sets the sparsity itself"),
            "update_freq": Option(100, "optimizer steps between refreshes of M; the paper counts epochs", 1),
            "num_samples": Option(16, "samples of the step's batch that F is summed over (README recipe)", 1),
            "drop_rate": Option(0.5, "share that a dynamic mask first exchanges (official code)", 0.0, 1.0),
            **SEED,
            **RENORMALIZE,
        },
        passes="2, and num_samples/batch at each refresh",
    ),
    Method(
        "esam",
        "ESAM: a random share β of the coordinates is perturbed; pass 2 takes the γ|B| samples that rose most.",
        _esam,
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
        _ausam,
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
        _gsam,
        0.05,
        papers.GSAM,
        {"alpha": Option(0.4, "α: share of g⊥ taken out; 0 is SAM", 0.0), **RENORMALIZE},
    ),
    Method(
        "wsam",
        "WSAM, coupled form: d = (1 − κ) g + κ ĝ with κ = γ/(1 − γ).",
        _wsam,
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
        _vasso,
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
        _momentum_sam,
        1.0,
        papers.MOMENTUM_SAM,
        {"momentum": Option(0.9, "μ in m ← μ m + g", 0.0, 0.9999)},
        passes="1",
    ),
    Method(
        "adasam",
        "AdaSAM: SAM's gradient in an AMSGrad of its own, without bias correction.",
        _sam,
        0.05,
        papers.ADASAM,
        optimizer=AdaSAM,
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
    if isinstance(rho, bool) or not isinstance(rho, int | float) or not math.isfinite(rho) or rho < 0:
        raise ValueError(f"rho: {rho} is not allowed; choose a finite number from 0, such as {method.rho:g}.")
    return float(rho)
