"""Compare methods on a task over seeds and learning rates, at equal epochs and at equal numbers of gradients.

    python examples/compare_methods.py run configs/comparisons/trec.yaml
    python examples/compare_methods.py plot out/compare-trec

`run` trains what is missing, one run after the other, each in a folder of its own, and then does what `plot` does: it
writes `results.md` (means, 95 % intervals, paired tests), `results.csv` (a row for each run) and figures. A run whose
results are there is not repeated, and one that was cut off goes on at its last checkpoint, where it saved some, so a
sweep may be killed at any time.

At equal gradients a method that takes p passes a step gets 1/p of the baseline's steps; p is what its own run at equal
epochs took. A method that takes one pass a step is the same run at both budgets.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from support.cli import run
from support.comparison import write_tables
from support.comparison_plan import read_plan
from support.comparison_plots import write_figures
from support.comparison_runs import PLAN, finished, train_all


def main(argv: Sequence[str] | None = None) -> None:
    """Run or plot, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "plot"])
    parser.add_argument("source", type=Path, help="run: the comparison's YAML file; plot: the folder that it filled")
    parser.add_argument("--output_dir", type=Path, help="the folder to fill, if not the one that the file names")
    parser.add_argument("--max_runs", type=int, help="stop after so many new runs")
    asked = parser.parse_args(argv)
    if asked.command == "plot":
        folder, plan = asked.source, read_plan(asked.source / PLAN)
    else:
        plan = read_plan(asked.source)
        folder = asked.output_dir or Path(plan.output_dir)
        train_all(plan, folder, asked.max_runs)
    outcomes = finished(plan, folder)
    summary = write_tables(outcomes, folder, plan.baseline, plan.title, plan.metric)
    write_figures(outcomes, folder, plan.title)
    runs = len({one.run for one in outcomes})
    print(f"{summary}\nresults of {runs} runs: tables and figures are in {folder}", flush=True)


if __name__ == "__main__":
    run(main)
