"""Put a claim to the test: run a study of configs/studies, and make its tables and figures.

    python examples/run_study.py run configs/studies/label_noise.yaml         # what is missing; may be killed any time
    python examples/run_study.py run configs/studies/label_noise.yaml --fast  # seconds: only shows that it runs
    python examples/run_study.py show configs/studies/label_noise.yaml --rows examples/guides/results/label_noise.csv
    python examples/run_study.py page                                           # the guide, from the rows beside it

Each finished run is a row of `--rows` (out/studies/NAME/rows.csv if not given), with all its settings, the machine and
the commit; tables and figures are made from the rows alone. `page` makes the tables of examples/guides/results.md and
its figures from the rows that are committed in examples/guides/results.
"""

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path

from support.cli import UsageError, run
from support.results_page import CONFIGS, write_page
from support.study import RowFile, read_plan, run_all


def main(argv: Sequence[str] | None = None) -> str:
    """Do what the command line says; returns the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "show", "page"])
    parser.add_argument("plan", type=Path, nargs="?", help="the study's YAML file")
    parser.add_argument("--fast", action="store_true", help="the short form")
    parser.add_argument("--rows", type=Path, help="the CSV file to fill, or to show")
    parser.add_argument("--output_dir", type=Path, help="where tables and figures go")
    parser.add_argument("--max_runs", type=int, help="stop after so many new runs")
    asked = parser.parse_args(argv)
    if asked.command == "page":
        return write_page()
    if asked.plan is None:
        raise UsageError(
            f"{asked.command} needs a study: one of {', '.join(map(str, sorted(CONFIGS.glob('*.yaml'))))}"
        )
    plan = read_plan(asked.plan)
    plan = plan.shortened() if asked.fast else plan
    folder = asked.output_dir or Path("out/studies") / (asked.plan.stem + "-fast" * asked.fast)
    rows = RowFile(asked.rows or folder / "rows.csv")
    study = importlib.import_module(f"studies.{plan.study}")
    if asked.command == "run":
        run_all(plan, rows, study.measure, asked.max_runs)
    reported = plan.reported(rows.read())
    if reported.empty:
        raise UsageError(f"{rows.path} has no runs of {asked.plan}: run it first")
    text = study.tables(reported, plan)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tables.md").write_text(text)
    study.figures(reported, plan, folder)
    print(f"{plan.title}\n\n{text}\n{len(reported)} runs: tables and figures are in {folder}", flush=True)
    return text


if __name__ == "__main__":
    run(main)
