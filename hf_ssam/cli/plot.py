"""The figures of a run on one page, or several runs over each other.

    hf-ssam plot out/trec                         # into out/trec/figures/training_curves.png
    hf-ssam plot out/trec out/trec-adamw          # into comparison.png
    hf-ssam plot out/trec --output page.png

A run is an output folder, a checkpoint or a trainer_state.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..run_folder import CURVES, read_run
from ..saved.errors import UsageError
from .flags import Parser


def main(argv: Sequence[str] | None = None) -> Path:
    """Draw, and say where the picture is."""
    args = flags().parse_args(argv)
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UsageError("figures need matplotlib: pip install matplotlib") from error
    from ..plots import plot_run, plot_runs
    from ..saved.names import short_names

    runs = [read_run(source) for source in args.runs]
    if len(runs) == 1:
        path = args.output or runs[0].folder / CURVES
        plot_run(runs[0].log, path)
    else:
        path = args.output or Path("comparison.png")
        plot_runs({name: run.log for name, run in zip(short_names(args.runs), runs, strict=True)}, path)
    print(f"drawn: {path}")
    return path


def flags() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser("plot", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--output", type=Path, metavar="FILE.png")
    return parser
