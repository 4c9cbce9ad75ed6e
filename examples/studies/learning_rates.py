"""How large a learning rate does each method take? Measured, and held against the closed forms.

    python examples/run_study.py run configs/studies/learning_rates.yaml          # ten minutes on one core

SSAM's own claim: SAM trains in a narrower range of learning rates than SGD, and renormalising the gradient gives the
range back. The learning rate rises by a constant factor until training fails. On a quadratic with top eigenvalue λ
gradient descent fails from `2/λ`, USAM from `2/(λ(1 + ρλ))` and SSAM, unnormalised as in the paper, from `2/λ` again.
On a tanh network (digits, squared loss, the whole batch, no momentum) λ is not given: it is taken from where gradient
descent fails, `λ = 2/η`, and the other limits are predicted from that one.

A run trains if its last loss is finite and below `trained` times the best that a constant could reach.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate, islice, repeat, takewhile
from operator import mul
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from hf_ssam.plots.canvas import canvas, dress, save
from support.comparison import interval
from support.comparison_plots import look
from support.descent import Point, descent
from support.edge_runs import Network, digits
from support.study import Row, Settings, StudyPlan
from support.study_tables import markdown

CURVATURES = (4.0, 1.0)
LAMBDA = max(CURVATURES)


def measure(settings: Settings) -> Row:
    """The largest learning rate that trains, and the next; those too small to get there are passed over."""
    rates = accumulate(repeat(settings["factor"]), mul, initial=settings["first_rate"])
    trained = math.nan
    for rate in takewhile(lambda rate: rate < settings["last_rate"], rates):
        if trains(settings, rate):
            trained = rate
        elif not math.isnan(trained):
            break
    return {"largest_rate": trained, "first_that_fails": rate}


def trains(settings: Settings, rate: float) -> bool:
    """Whether training at this learning rate ends with a low loss."""
    model, losses, constant = PROBLEMS[settings["problem"]](settings)
    last = math.inf
    for loss in islice(descent(model, losses, settings, rate), settings["steps"]):
        last = loss
        if not loss < 1e4 * constant:
            return False
    return last < settings["trained"] * constant


def quadratic(settings: Settings) -> tuple[nn.Module, Callable[[int], Tensor], float]:
    """½ Σ λᵢxᵢ² in the plane, and its loss at the start."""
    curvatures = torch.tensor(CURVATURES, dtype=torch.float64)
    point = Point([1.0, 1.0], lambda at: 0.5 * (curvatures * at**2).sum())
    return point, lambda _: point(), point().item()


def tanh_network(settings: Settings) -> tuple[nn.Module, Callable[[int], Tensor], float]:
    """The network and the batch of `edge_of_stability.py`, and the loss of the constant that fits best."""
    batch = _digits(settings["digits"])
    torch.manual_seed(settings["seed"])
    model = Network(batch["pixels"].shape[1])
    shares = torch.bincount(batch["labels"], minlength=10) / len(batch["labels"])
    return model, lambda _: model(**batch).loss, 0.5 * float(1 - shares.square().sum())


@lru_cache
def _digits(count: int) -> dict[str, Tensor]:
    return digits(count)


PROBLEMS = {"quadratic": quadratic, "tanh": tanh_network}


def closed_form(arm_settings: Settings, rho: float, eigenvalue: float) -> float:
    """The learning rate from which a step along the top eigenvector overshoots; NaN where ‖g‖ decides.

    A normalised ascent has none: close to a minimum `ρ/‖g‖` grows without bound, and SAM circles it.
    """
    if arm_settings.get("method") == "usam":
        return 2 / (eigenvalue * (1 + rho * eigenvalue))
    if not arm_settings.get("method") or arm_settings.get("normalize") is False:
        return 2 / eigenvalue
    return math.nan


def tables(rows: pd.DataFrame, plan: StudyPlan) -> str:
    """Largest rate that trained, in units of gradient descent's, and the closed form in the same units."""
    parts = []
    for problem, here in rows.groupby("problem", sort=False):
        lines = [["", "ρ", "n", "largest rate that trains", "× that of GD", "closed form, × GD"], ["---"] * 6]
        for (arm, rho), own in here.groupby(["arm", "rho"], sort=False):
            mean, half = interval(own["largest_rate"])
            found = "none" if math.isnan(mean) else f"{mean:.3g}"
            spread = f" ± {half:.2g}" if 0 < half < math.inf else ""
            ratio, predicted = ratios(here, plan, own)
            form = "–" if math.isnan(predicted) else f"{predicted:.2f}"
            lines.append([arm, f"{rho:g}", len(own), f"{found}{spread}", f"{ratio:.2f}", form])
        step = here["factor"].iloc[0]
        parts += [f"**{TITLES[problem]}**; the rate rises in steps of {step:g}\n", markdown(lines)]
    return "\n".join(parts)


TITLES = {
    "quadratic": f"A quadratic with eigenvalues {CURVATURES[0]:g} and {CURVATURES[1]:g}",
    "tanh": "A tanh network",
}


def ratios(here: pd.DataFrame, plan: StudyPlan, own: pd.DataFrame) -> tuple[float, float]:
    """The mean largest rate over gradient descent's, seed by seed, and what the closed form gives at its λ = 2/η."""
    plain = here[here["arm"] == plan.baseline].groupby("seed")[["largest_rate", "first_that_fails"]].mean()
    reference = plain.loc[own["seed"]]
    measured = (own["largest_rate"].fillna(0).to_numpy() / reference["largest_rate"].to_numpy()).mean()
    edge = (reference["largest_rate"] * reference["first_that_fails"]).pow(0.5).mean()
    predicted = closed_form(plan.of(own["arm"].iloc[0]), own["rho"].iloc[0], 2 / edge) / edge
    return float(measured), predicted


def figures(rows: pd.DataFrame, plan: StudyPlan, folder: Path) -> None:
    """`learning_rates.png`: measured against ρ as dots, closed forms as lines, a panel a problem."""
    problems = list(rows.groupby("problem", sort=False))
    axes = canvas(1, len(problems), (5.4, 3.8))
    for ax, (problem, here) in zip(axes, problems, strict=True):
        for number, arm in enumerate(plan.arms):
            own = here[(here["arm"] == arm) & (here["arm"] != plan.baseline)]
            points = [(rho, *ratios(here, plan, some)) for rho, some in own.groupby("rho")]
            if points:
                radii, measured, predicted = zip(*points, strict=True)
                style = look(number)
                ax.plot(radii, measured, "o", color=style["color"], label=arm, markersize=12 - 2 * number)
                ax.plot(radii, predicted, **style)
        ax.axhline(1, color="grey", linewidth=1)
        ax.set_xscale("log")
        ax.set_xticks(radii, [f"{rho:g}" for rho in radii])
        ax.minorticks_off()
        ax.set_ylim(0, None)
        dress(ax, TITLES[problem], "radius ρ", "largest learning rate that trains, × that of GD")
    axes[0].figure.suptitle("How large a learning rate each method takes (dots: measured; lines: closed forms)")
    save(axes[0], folder / "learning_rates.png")
