"""How sharp are these models? Measures saved models side by side, on rows of the data that they were trained on.

    hf-ssam sharpness runs/ssam runs/adamw                      # folders that the examples left
    hf-ssam sharpness runs/ssam --data test.csv                 # or .json, a folder of images …
    hf-ssam sharpness gpt2 --dataset_name my/texts --text_column text
    hf-ssam sharpness runs/ssam --parameters "layer\\.0\\." classifier
    hf-ssam sharpness runs/ssam --measures eigenvalues --no_figures     # λ₁ alone: the cheapest

Prints a table (top eigenvalues, trace with its standard error, rise of the loss at rho) and what each measure cost,
and writes them with the figures to `--output_dir`; each names the data. What a run was trained on is in its folder
(`_data.json`); where neither it nor a flag names data, nothing is measured. Labels are matched by name to the model's.
Adapters are opened on their base model, and the curvature is taken in the adapter. A model without a head gets a fresh
one, which is said.

Memory is the highest resident size of the process during a measure, less its size when all models are loaded and
each has evaluated its loss once: weights, libraries and their first use are not counted, vectors, activations and
what the allocator keeps after they are freed are.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .flags import Parser, add_data_flags, markdown

if TYPE_CHECKING:
    from ..saved.models import Subject

MEASURES = ("eigenvalues", "trace", "ascent")
Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Measure what the command line asks for; returns the rows of the table."""
    args = flags().parse_args(argv)
    from ..saved.models import load_all
    from .measures import measured

    subjects = load_all(args.models, args)
    measured_on = said(subjects, args)
    print(f"{measured_on}\n")
    rows = measured(subjects, args)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "sharpness.json").write_text(json.dumps(rows, indent=1))
    (args.output_dir / "sharpness.md").write_text(report(rows, args))
    print(report(rows, args))
    if not args.no_figures:
        from .landscapes import draw

        draw(subjects, args, measured_on)
    print(f"written to {args.output_dir}")
    return rows


def flags() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser("sharpness", __doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="a folder or a name on the Hub")
    parser.add_argument("--measures", nargs="+", choices=MEASURES, default=MEASURES)
    add_data_flags(parser)
    parser.add_argument("--rows", type=int, default=32, help="rows of the probe")
    parser.add_argument("--batch_size", type=int, default=4, help="smaller ones need less memory, same numbers")
    parser.add_argument(
        "--parameters", nargs="*", default=[None], help="patterns of weight names, a row of the table each"
    )
    parser.add_argument("--k", type=int, default=1, help="how many eigenvalues")
    parser.add_argument("--tol", type=float, default=1e-3)
    parser.add_argument("--trace_samples", type=int, default=10)
    parser.add_argument("--rho", type=float, default=0.05)
    parser.add_argument("--adaptive_rho", type=float, default=0.5)
    parser.add_argument("--spectrum_steps", type=int, default=20)
    parser.add_argument("--reach", type=float, default=0.5, help="how far the lines go, in ‖w' − w‖")
    parser.add_argument("--plane", action="store_true", help="also draw a plane of two random directions a model")
    parser.add_argument("--no_figures", action="store_true")
    parser.add_argument("--progress", action="store_true", help="show bars")
    parser.add_argument("--output_dir", type=Path, default=Path("sharpness"))
    return parser


def shown(row: Row, args: argparse.Namespace) -> dict[str, str]:
    """A row as a reader sees it, by heading."""
    cells = {name: row[name] for name in ("model", "data", "weights")}
    cells |= {"n": f"{row['n']:,}", "loss": f"{row['loss']:.4f}"}
    if "eigenvalues" in row:
        first, *others = (f"{v:.4g}" for v in row["eigenvalues"])
        cells |= {"λ₁": first if row["converged"] else f"≥ {first}", "λ₂ …": " ".join(others) or "–"}
    if "trace" in row:
        cells["trace ± error"] = f"{row['trace']:.4g} ± {row['trace_error']:.2g}"
    if "rise" in row:
        cells[f"rise at ρ = {args.rho:g}"] = f"{row['rise']:.4f}"
        cells[f"adaptive, ρ = {args.adaptive_rho:g}"] = f"{row['adaptive_rise']:.4f}"
    return cells | {"precision": row["precision"]}


def costs(row: Row) -> list[dict[str, str]]:
    """What each measure of a row cost, by heading."""
    lines = []
    for name, cost in row["cost"].items():
        mib, weights = cost["mib"], cost["weight_mib"]
        memory = "not known here" if mib is None else f"{mib:.0f} MiB = {mib / weights:.1f} × its {weights:.0f} MiB"
        cells = {"model": row["model"], "weights": row["weights"], "measure": name, "work": cost["work"]}
        lines.append(cells | {"seconds": f"{cost['seconds']:.1f}", "memory above the loaded model": memory})
    return lines


def report(measured: list[Row], args: argparse.Namespace) -> str:
    """Both tables."""
    costly = [line for row in measured for line in costs(row)]
    return f"{markdown([shown(row, args) for row in measured])}\n\n{markdown(costly)}\n"


def said(subjects: list[Subject], args: argparse.Namespace) -> str:
    """What was measured on, in a sentence."""
    by_data = {data: [s.name for s in subjects if s.data == data] for data in dict.fromkeys(s.data for s in subjects)}
    parts = by_data if len(by_data) == 1 else [f"{data} ({', '.join(names)})" for data, names in by_data.items()]
    return f"measured on up to {args.rows} rows of {'; '.join(parts)}"
