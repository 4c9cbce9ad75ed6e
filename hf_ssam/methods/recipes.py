"""Each paper as a composition of rules: options in, what the engine runs out.

A recipe is a pure function `options -> Rules`; the table in `methods` gives it its name, defaults and citation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..rules import ascent, descent, masks, selection
from ..rules.context import Rule, chain
from ..rules.selection import Selection
from ..rules.tensors import ParameterSpace

Check = Callable[[ParameterSpace, tuple[str, ...]], None]


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


def sam(normalize: bool = True, adaptive: bool = False, eta: float = 0.01, weights_only: bool = False) -> Rules:
    """SAM, USAM, ASAM: `e = ρ T²g/‖Tg‖`, or `ρ T²g`, with T = 1 or T = |w| + η."""
    metric = ascent.adaptive(eta, weights_only) if adaptive else None
    return Rules(ascent=ascent.direction(normalize, metric))


def usam() -> Rules:
    """`e = ρ g`."""
    return sam(normalize=False)


def asam(eta: float, weights_only: bool) -> Rules:
    """`e = ρ T²g/‖Tg‖` with T = |w| + η."""
    return sam(adaptive=True, eta=eta, weights_only=weights_only)


def friendly_sam(sigma: float, lam: float, ema_order: str) -> Rules:
    """`e = ρ q/‖q‖` with q = g − σ m."""
    rule = ascent.friendly(sigma, lam, ema_order)
    return Rules(ascent=chain(rule, ascent.normalize), stateful=sigma > 0)


def vasso(theta: float) -> Rules:
    """`e = ρ d/‖d‖` with d a moving average of g."""
    return Rules(ascent=chain(ascent.smoothed(theta), ascent.normalize), stateful=theta < 1)


def looksam(k: int, alpha: float, first: Rule = ascent.normalize) -> Rules:
    """SAM every `k`-th step; between, `g` and a share of what the last second pass had orthogonal to it."""
    return Rules(
        first, descent.keep_orthogonal, keeps_gradient=True, period=k, reuse=descent.look(alpha), stateful=True
    )


def look_layersam(k: int, alpha: float, layer_scale: str) -> Rules:
    """LookSAM with a perturbation of its own for each tensor."""
    return looksam(k, alpha, ascent.layerwise(by_weight=layer_scale == "weight"))


def gsam(alpha: float) -> Rules:
    """`d = ĝ − α g⊥`."""
    return Rules(ascent.normalize, descent.subtract_orthogonal(alpha), keeps_gradient=True)


def wsam(gamma: float) -> Rules:
    """`d = (1 − κ) g + κ ĝ` with κ = γ/(1 − γ)."""
    return Rules(ascent.normalize, descent.weighted(gamma / (1 - gamma)), keeps_gradient=True)


def momentum_sam(momentum: float) -> Rules:
    """One pass, at `w − ρ m/‖m‖`."""
    return Rules(period=0, reuse=descent.remember(momentum), anticipate=ascent.anticipation, stateful=True)


def sparse_sam(
    mask: str, sparsity: float, structure: str, update_freq: int, num_samples: int, drop_rate: float, seed: int
) -> Rules:
    """`e = ρ M ⊙ g/‖g‖`; a mask that leaves nothing out is SAM.

    Raises:
        ValueError: if a dynamic mask is asked to have a structure, or the structure cannot be read.
    """
    if sparsity == 0 and structure == "element":
        return sam()
    if mask == "dynamic" and structure != "element":
        raise ValueError(
            f"optim_args: structure={structure} is not allowed with mask=dynamic; choose mask=fisher, or "
            "structure=element."
        )
    if mask == "dynamic":
        refresh, checks = masks.dynamic(sparsity, drop_rate, seed), ()
    else:
        refresh, checks = _fisher(structure, sparsity, num_samples)
    rule = chain(ascent.normalize, masks.masked(refresh, update_freq))
    return Rules(rule, per_example=mask == "fisher", checks=checks, stateful=True)


def _fisher(structure: str, sparsity: float, samples: int) -> tuple[masks.Refresh, tuple[Check, ...]]:
    if structure == "element":
        return masks.fisher(sparsity, samples), (masks.whole_gradients,)
    if structure == "tensor":
        return masks.fisher_tensors(sparsity, samples), (masks.whole_gradients,)
    n, m = masks.read_n_of_m(structure)
    return masks.fisher_n_of_m(n, m, samples), (masks.whole_gradients, masks.divides(m))


def esam(beta: float, gamma: float, seed: int) -> Rules:
    """A random share of the coordinates, and the samples whose loss rose most."""
    picks = Selection(between=selection.largest_loss_increase(gamma)) if gamma < 1 else None
    return Rules(chain(ascent.normalize, masks.random_subset(beta, seed)), selection=picks)


def ausam(alpha: float, s_min: float, s_max: float, seed: int) -> Rules:
    """SAM on a drawn share of the samples; with all of them kept it is SAM.

    Raises:
        ValueError: if the least weight is above the largest.
    """
    if s_min > s_max:
        raise ValueError(
            f"optim_args: s_min={s_min} is above s_max={s_max} for method `ausam`; choose s_min <= s_max."
        )
    if alpha == 1:
        return sam()
    picks = Selection(before=selection.by_rise(alpha, s_min, s_max, seed), learn=selection.average_rise)
    return Rules(ascent.normalize, selection=picks, stateful=True)
