"""The figures of a comparison: score against cost, and against the learning rate."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from hf_ssam.plots.canvas import COLORS, canvas, dress, save

from .comparison import BUDGETS, Outcome

DASHES = ("-", "--", "-.", ":")


def write_figures(outcomes: list[Outcome], folder: Path, title: str) -> None:
    """Write ``cost.png``, and ``learning_rate.png`` where there are several rates."""
    if not outcomes:
        return
    main_rate = outcomes[0].run.learning_rate
    plot_cost([o for o in outcomes if o.run.learning_rate == main_rate], title, folder / "cost.png")
    swept = [o for o in outcomes if o.run.budget == "epochs"]
    if len({o.run.learning_rate for o in swept}) > 1:
        plot_learning_rates(swept, title, folder / "learning_rate.png")


def plot_cost(outcomes: list[Outcome], title: str, path: Path | None = None) -> list[Axes]:
    """Score against passes and against seconds, a row for each budget: the mean over seeds, and their range."""
    budgets = [name for name in BUDGETS if any(o.run.budget == name for o in outcomes)]
    axes = canvas(len(budgets), 2, (6.0, 3.6))
    for row, budget in enumerate(budgets):
        here = [o for o in outcomes if o.run.budget == budget]
        for ax, by_time in zip(axes[2 * row : 2 * row + 2], (False, True), strict=True):
            for number, (method, own) in enumerate(_by_method(here).items()):
                _curve(ax, own, by_time, label=method, **look(number))
            cost = "seconds of training (evaluations left out)" if by_time else "forward-backward passes over a batch"
            dress(ax, f"{title}\n{BUDGETS[budget]}; mean and range over seeds", cost, "evaluation accuracy")
            _look_at_the_end(ax, here)
    save(axes[0], path)
    return axes


def plot_learning_rates(outcomes: list[Outcome], title: str, path: Path | None = None) -> Axes:
    """Score at the end against the learning rate: the mean over seeds, and each seed as a dot."""
    ax = canvas()[0]
    for number, (method, own) in enumerate(_by_method(outcomes).items()):
        rates = sorted({o.run.learning_rate for o in own})
        means = [np.mean([o.score for o in own if o.run.learning_rate == rate]) for rate in rates]
        shift = 1.03 ** (number - 1.5)
        own_look = look(number)
        ax.plot(np.array(rates) * shift, means, label=method, marker="o", markersize=5, **own_look)
        dots = [(o.run.learning_rate * shift, o.score) for o in own]
        ax.scatter(*zip(*dots, strict=True), color=own_look["color"], s=12, alpha=0.45, linewidths=0)
    ax.set_xscale("log")
    rates = sorted({o.run.learning_rate for o in outcomes})
    ax.set_xticks(rates, [f"{rate:g}" for rate in rates])
    ax.minorticks_off()
    dress(
        ax,
        f"{title}\nequal epochs; dots are seeds",
        "learning rate (shifted a little, to tell methods apart)",
        "accuracy",
    )
    save(ax, path)
    return ax


def look(number: int) -> dict[str, str]:
    """Colour and dashes of a method: two that do the same would hide each other without the dashes."""
    return {"color": COLORS[number % len(COLORS)], "linestyle": DASHES[number % len(DASHES)]}


def _by_method(outcomes: list[Outcome]) -> dict[str, list[Outcome]]:
    return {o.run.method: [p for p in outcomes if p.run.method == o.run.method] for o in outcomes}


def _curve(ax: Axes, own: list[Outcome], by_time: bool, **drawn: str) -> None:
    """The mean over the seeds at each evaluation; passes are turned into seconds by their mean price in each run."""
    length = min(len(o.curve) for o in own)
    prices = [o.seconds / o.passes if by_time else 1.0 for o in own]
    costs = np.array([[cost * price for cost, _ in o.curve[:length]] for o, price in zip(own, prices, strict=True)])
    scores = np.array([[score for _, score in o.curve[:length]] for o in own])
    ax.plot(costs.mean(0), scores.mean(0), marker="o", markersize=3, **drawn)
    ax.fill_between(costs.mean(0), scores.min(0), scores.max(0), color=drawn["color"], alpha=0.12, linewidth=0)


def _look_at_the_end(ax: Axes, outcomes: list[Outcome]) -> None:
    """Leave out what lies far below the scores after the first evaluation: the start is chance level."""
    later = [score for o in outcomes for _, score in o.curve[1:]] or [o.score for o in outcomes]
    spread = max(max(later) - min(later), 0.02)
    ax.set_ylim(min(later) - 0.1 * spread, max(later) + 0.1 * spread)
