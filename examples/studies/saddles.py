"""Which methods leave a saddle, and after how many steps? `x² − y²`, close to its ridge, by gradient descent.

    python examples/run_study.py run configs/studies/saddles.yaml          # five minutes on one core

From (0.5, 0.01) until |y| > 1. With the unnormalised ascent `e = ρg` the distance along y grows by a factor of
`1 + 2η` in a step of gradient descent and of `1 + 2η(1 − 2ρ)` in one of USAM, which never leaves from ρ = 0.5; SSAM's
factor γ = ‖g‖/‖ĝ‖ gives back the length that the ascent takes from the gradient there. A normalised ascent has a fixed
length, crosses the ridge, and its gradient points back: renormalising mends a length, not a direction.
"""

import math
from pathlib import Path

import pandas as pd

from hf_ssam.plots.canvas import canvas, dress, save
from support.comparison_plots import look
from support.descent import Point, descent
from support.study import Row, Settings, StudyPlan
from support.study_tables import markdown


def measure(settings: Settings) -> Row:
    """The steps until |y| > 1; infinite where it is not so after `most_steps`."""
    point = Point([0.5, 0.01], lambda at: at[0] ** 2 - at[1] ** 2)
    steps = 0
    for _ in descent(point, lambda _: point(), settings, settings["learning_rate"]):
        steps += 1
        if abs(point.at[1].item()) > 1:
            return {"steps": steps, "y": point.at[1].item()}
        if steps == settings["most_steps"]:
            return {"steps": math.inf, "y": point.at[1].item()}


def usam_steps(eta: float, rho: float, start: float = 0.01) -> float:
    """The closed form for USAM, and for gradient descent at ρ = 0."""
    factor = abs(1 + 2 * eta * (1 - 2 * rho))
    return math.ceil(math.log(1 / start) / math.log(factor)) if factor > 1 else math.inf


def tables(rows: pd.DataFrame, plan: StudyPlan) -> str:
    """Steps for each arm and radius."""
    wide = rows.pivot(index="arm", columns="rho", values="steps").reindex(list(plan.arms))
    most = rows["most_steps"].iloc[0]
    head = ["steps until it has left", *(f"ρ = {rho:g}" for rho in wide.columns)]
    lines = [head, ["---"] * len(head)]
    lines += [[arm, *(written(n, most) for n in own)] for arm, own in wide.T.items()]
    closed = [usam_steps(plan.settings["learning_rate"], rho) for rho in wide.columns]
    lines.append(["*USAM, closed form*", *(f"*{n:.0f}*" if math.isfinite(n) else "*never*" for n in closed)])
    return markdown(lines)


def written(steps: float, most: int) -> str:
    """A number of steps in print; a dash where it was not run."""
    if math.isnan(steps):
        return "–"
    return f"{steps:.0f}" if math.isfinite(steps) else f"not in {most:,}"


def figures(rows: pd.DataFrame, plan: StudyPlan, folder: Path) -> None:
    """`saddles.png`: steps against the radius."""
    ax = canvas()[0]
    most = int(rows["most_steps"].iloc[0])
    radii = sorted(rows["rho"].unique())
    for number, arm in enumerate(plan.arms):
        own = rows[rows["arm"] == arm].sort_values("rho")
        steps = own["steps"].clip(upper=most)
        shift = 0.12 * (number - 2)
        places = [radii.index(rho) + shift for rho in own["rho"]]
        ax.plot(places, steps, label=arm, marker="o", **look(number))
    ax.axhspan(most * 0.8, most * 1.25, color="grey", alpha=0.2, linewidth=0)
    ax.text(len(radii) / 2 - 0.5, most * 1.3, f"still there after {most:,} steps", ha="center", fontsize="small")
    ax.set_yscale("log")
    ax.set_ylim(None, most * 2.5)
    ax.set_xticks(range(len(radii)), [f"{rho:g}" for rho in radii])
    dress(ax, "Leaving the saddle of x² − y²", "radius ρ", "steps until |y| > 1")
    ax.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    save(ax, folder / "saddles.png")
