"""What does an accuracy cost? The seconds and the gradient computations until each method first has it.

    python examples/time_to_accuracy.py configs/comparisons/time_to_accuracy.yaml

Trains the runs of the comparison that are missing, as `compare_methods.py run` does, and writes to its folder
`time_to_accuracy.csv`, a row for each run and accuracy, and `time_to_accuracy.png`. Seconds are those of training,
evaluations left out; a gradient computation is a forward-backward pass over a batch, and one over half of the samples
is half of one. Between two evaluations the accuracy is taken to rise evenly. Compare seconds only between runs of one
quiet machine.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from hf_ssam.plots.canvas import canvas, dress, save
from support.cli import run
from support.comparison import Outcome
from support.comparison_plan import read_plan
from support.comparison_plots import look
from support.comparison_runs import finished, train_all

TARGETS = 20
"""Accuracies between the worst first evaluation and the best one at all."""


def main(argv: Sequence[str] | None = None) -> pd.DataFrame:
    """Train what is missing, and write the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path, help="the comparison's YAML file")
    parser.add_argument("--output_dir", type=Path, help="the folder to fill, if not the one that the file names")
    parser.add_argument("--max_runs", type=int, help="stop after so many new runs")
    asked = parser.parse_args(argv)
    plan = read_plan(asked.plan)
    folder = asked.output_dir or Path(plan.output_dir)
    train_all(plan, folder, asked.max_runs)
    rows = costs(finished(plan, folder))
    rows.to_csv(folder / "time_to_accuracy.csv", index=False)
    plot(rows, plan.title, plan.metric, folder / "time_to_accuracy.png")
    print(f"{summary(rows)}\nthe table and the figure are in {folder}", flush=True)
    return rows


def cost_of_reaching(curve: Sequence[tuple[float, float]], target: float) -> float:
    """The cost at which a curve of (cost, score) first has `target`, on straight lines; infinite if it never has."""
    earlier, below = curve[0]
    if below >= target:
        return earlier
    for cost, score in curve[1:]:
        if score >= target:
            return earlier + (cost - earlier) * (target - below) / (score - below)
        earlier, below = cost, score
    return math.inf


def costs(outcomes: Sequence[Outcome]) -> pd.DataFrame:
    """A row for each run and accuracy; a pass has the mean price of its run in seconds."""
    low = min(o.curve[0][1] for o in outcomes)
    high = max(score for o in outcomes for _, score in o.curve)
    rows = [
        {
            "method": o.run.method,
            "seed": o.run.seed,
            "accuracy": target,
            "gradients": (gradients := cost_of_reaching(o.curve, target)),
            "seconds": gradients * o.seconds / o.passes,
        }
        for o in outcomes
        for target in np.linspace(low, high, TARGETS)
    ]
    return pd.DataFrame(rows)


def plot(rows: pd.DataFrame, title: str, metric: str, path: Path) -> None:
    """The median over seeds of both costs, where most of the seeds have the accuracy."""
    panels = {"seconds": "seconds of training (evaluations left out)", "gradients": "gradient computations"}
    for ax, (cost, label) in zip(canvas(1, 2, (6.0, 4.0)), panels.items(), strict=True):
        for number, (method, own) in enumerate(rows.groupby("method", sort=False)):
            middle = own.groupby("accuracy")[cost].median()
            reached = middle[np.isfinite(middle)]
            ax.plot(reached.values, reached.index, label=method, **look(number))
        dress(ax, f"{title}\nmedian over seeds of the cost until the score is first reached", label, metric)
    save(ax, path)


def summary(rows: pd.DataFrame) -> str:
    """Markdown: what the highest accuracy costs that every method has in most of its seeds."""
    middle = rows.groupby(["accuracy", "method"], sort=False)[["seconds", "gradients"]].median()
    everywhere = np.isfinite(middle["gradients"]).groupby("accuracy").all()
    target = everywhere[everywhere].index.max()
    lines = [f"Until {target:.3f} is first reached, median over seeds:", "", "| method | seconds | gradients |"]
    lines += ["|---|---|---|"]
    lines += [f"| {m} | {c.seconds:.1f} | {c.gradients:.0f} |" for m, c in middle.loc[target].iterrows()]
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
