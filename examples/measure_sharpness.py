"""How sharp are these models? Measures saved models side by side, on rows of the data that they were trained on.

    python examples/measure_sharpness.py runs/ssam runs/adamw                      # folders that the examples left
    python examples/measure_sharpness.py runs/ssam --data test.csv                 # or .json, a folder of images …
    python examples/measure_sharpness.py gpt2 --dataset_name my/texts --text_column text
    python examples/measure_sharpness.py runs/ssam --parameters "layer\\.0\\." classifier
    python examples/measure_sharpness.py runs/ssam --measures eigenvalues --no_figures     # λ₁ alone: the cheapest

Prints a table (top eigenvalues, trace with its standard error, rise of the loss at rho) and what each measure cost,
and writes them with the figures to `--output_dir`; each names the data. What a run was trained on is in its folder
(`_data.json`); where neither it nor a flag names data, nothing is measured. Labels are matched by name to the model's.
Adapters are opened on their base model, and the curvature is taken in the adapter. A model without a head gets a fresh
one, which is said.

Memory is the highest resident size of the process during a measure, less its size when all models are loaded and
each has evaluated its loss once: weights, libraries and their first use are not counted, vectors, activations and
what the allocator keeps after they are freed are.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hf_ssam.plots import plot_loss_line, plot_loss_plane, plot_spectrum
from hf_ssam.plots.canvas import save
from hf_ssam.sharpness import (
    Line,
    Objective,
    Plane,
    ascent_sharpness,
    loss_line,
    loss_plane,
    random_direction,
    spectrum,
    top_eigenvalues,
    trace,
)
from support import resident
from support.cli import run
from support.probes import Subject, add_data_flags, load_all

Row = dict[str, Any]


def eigenvalues(subject: Subject, args: argparse.Namespace, how: Row) -> Row:
    """The k largest eigenvalues."""
    top = top_eigenvalues(subject.model, subject.batches, k=args.k, tol=args.tol, **how)
    found = {"eigenvalues": top.values, "solver": top.solver, "converged": top.converged}
    return found | {"work": f"{top.products} products ({top.solver})"}


def traced(subject: Subject, args: argparse.Namespace, how: Row) -> Row:
    """The trace and its standard error."""
    total = trace(subject.model, subject.batches, args.trace_samples, **how)
    found = {"trace": total.value, "trace_error": total.standard_error}
    return found | {"work": f"{total.products} products"}


def ascended(subject: Subject, args: argparse.Namespace, how: Row) -> Row:
    """The rise of the loss in the plain ball and in the adaptive one."""
    plain = ascent_sharpness(subject.model, subject.batches, args.rho, **how)
    adaptive = ascent_sharpness(subject.model, subject.batches, args.adaptive_rho, adaptive=True, **how)
    found = {"rise": plain.value, "adaptive_rise": adaptive.value}
    return found | {"work": f"{plain.passes + adaptive.passes} gradients and losses"}


MEASURES: dict[str, Callable[[Subject, argparse.Namespace, Row], Row]] = {
    "eigenvalues": eigenvalues,
    "trace": traced,
    "ascent": ascended,
}


def measure(subject: Subject, pattern: str | None, args: argparse.Namespace, base: float | None) -> Row:
    """One row of the table; memory is counted from `base`."""
    objective = Objective(subject.model, subject.batches, parameters=pattern)
    row = {"model": subject.name, "data": subject.data, "weights": pattern or "all trainable", "n": objective.size}
    row |= {"loss": objective.value(), "precision": objective.precision, "cost": {}}
    how = {"parameters": pattern, "progress": args.progress}
    for name in args.measures:
        begun = time.perf_counter()
        found, peak = resident.peak_of(partial(MEASURES[name], subject, args, how))
        cost = {"work": found.pop("work"), "seconds": time.perf_counter() - begun}
        row["cost"][name] = cost | {"mib": None if peak is None else peak - base, "weight_mib": subject.weight_mib}
        row |= found
    return row


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


def markdown(lines: list[dict[str, str]]) -> str:
    """A table of lines that all have the same headings."""
    rows = [tuple(lines[0]), ("---",) * len(lines[0]), *(tuple(line.values()) for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def report(measured: list[Row], args: argparse.Namespace) -> str:
    """Both tables."""
    costly = [line for row in measured for line in costs(row)]
    return f"{markdown([shown(row, args) for row in measured])}\n\n{markdown(costly)}\n"


def draw(subjects: list[Subject], args: argparse.Namespace) -> None:
    """Spectra over each other, the loss along the top eigenvector and a random direction, and planes side by side."""
    how = {"progress": args.progress}
    spectra = {s.name: spectrum(s.model, s.batches, args.spectrum_steps, 1, **how) for s in subjects}
    figures = {"spectrum": plot_spectrum(spectra)}
    figures["loss_line"] = plot_loss_line({name: line for s in subjects for name, line in slices(s, args, how)})
    if args.plane:
        names = ("random direction, filter-normalised", "another one")
        figures["plane"] = plot_loss_plane({s.name: plane(s, how) for s in subjects}, names=names)
    for name, ax in figures.items():
        ax.figure.supxlabel(said(subjects, args), fontsize="small")
        save(ax, args.output_dir / f"{name}.png")


def said(subjects: list[Subject], args: argparse.Namespace) -> str:
    """What was measured on, in a sentence."""
    by_data = {data: [s.name for s in subjects if s.data == data] for data in dict.fromkeys(s.data for s in subjects)}
    parts = by_data if len(by_data) == 1 else [f"{data} ({', '.join(names)})" for data, names in by_data.items()]
    return f"measured on up to {args.rows} rows of {'; '.join(parts)}"


def slices(subject: Subject, args: argparse.Namespace, how: Row) -> Iterator[tuple[str, Line]]:
    """The loss along two unit vectors. An eigenvector has no sign: the higher end goes to the right."""
    distances = (args.reach * torch.linspace(-1, 1, 21)).tolist()
    top = top_eigenvalues(subject.model, subject.batches, tol=1e-2, vectors=True, **how).vectors[0]
    line = loss_line(subject.model, subject.batches, top, distances, **how)
    yield f"{subject.name}: top eigenvector", uphill(line)
    random = random_direction(subject.model)
    length = sum(t.square().sum() for t in random.values()).sqrt()
    unit = {n: t / length for n, t in random.items()}
    yield f"{subject.name}: random direction", loss_line(subject.model, subject.batches, unit, distances, **how)


def uphill(line: Line) -> Line:
    """The line, or its mirror image, so that the loss at the right end is the higher one."""
    return line if line.losses[-1] >= line.losses[0] else Line(line.distances, line.losses[::-1])


def plane(subject: Subject, how: Row) -> Plane:
    """The loss over two filter-normalised random directions."""
    first, second = (random_direction(subject.model, seed=seed) for seed in (0, 1))
    return loss_plane(subject.model, subject.batches, first, second, torch.linspace(-1, 1, 11).tolist(), **how)


def flags() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="a folder or a name on the Hub")
    parser.add_argument("--measures", nargs="+", choices=list(MEASURES), default=list(MEASURES))
    add_data_flags(parser, rows=32, batch_size=4)
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


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Measure what the command line asks for; returns the rows of the table."""
    args = flags().parse_args(argv)
    subjects = load_all(args.models, args)
    for subject in subjects:
        Objective(subject.model, subject.batches).value()
    base = resident.now()
    print(f"{said(subjects, args)}\n")
    measured = [measure(s, pattern, args, base) for s in subjects for pattern in args.parameters]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "sharpness.json").write_text(json.dumps(measured, indent=1))
    (args.output_dir / "sharpness.md").write_text(report(measured, args))
    print(report(measured, args))
    if not args.no_figures:
        draw(subjects, args)
    print(f"written to {args.output_dir}")
    return measured


if __name__ == "__main__":
    run(main)
