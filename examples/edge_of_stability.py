"""Does the top Hessian eigenvalue stop where the learning rate and rho say it must?

Full-batch gradient descent, USAM, SAM and SSAM train a small tanh network on 300 digits with the squared loss, for
several learning rates η and radii ρ. While they train, the top eigenvalue λ₁ of the Hessian is measured and held
against the edge that `sharpness.edge_of_stability` predicts for that method at that moment:

    GD   ηλ = 2        USAM   ηλ(1 + ρλ) = 2        SAM   ηλ(1 + ρλ/‖g‖) = 2        SSAM   γηλ(1 + ρλ/‖g‖) = 2

with the ‖g‖ and the γ = ‖g‖/‖ĝ‖ of that moment. SSAM's edge lies between SAM's (γ = 1) and 2/η, to which it comes
where the gradient lies along the top eigenvector.

    python examples/edge_of_stability.py                    # ten minutes or more on one idle core
    python examples/edge_of_stability.py --etas 0.4 --rhos 0.05 --output_dir edges
    python examples/edge_of_stability.py --drawn_from edge_of_stability/runs.json    # table and figure again

The plateau of a run is the median over its last 40 % of measurements; a run that never came within 5 % of its edge is
reported as such and is not part of the tolerance.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm.auto import tqdm

from hf_ssam.sharpness import edge_of_stability
from support import cli
from support.edge_pictures import figure, table
from support.edge_runs import Run, digits, train

RADIUS = {"usam": 4.0, "sam": 1.0, "ssam": 1.0}
"""What a ρ of the command line is multiplied by: e = ρ g is shorter than e = ρ g/‖g‖ wherever ‖g‖ < 1."""


def trained(args: argparse.Namespace) -> list[Run]:
    """Every method at every η and ρ asked for."""
    torch.set_num_threads(1)  # the network is too small to share out
    plan = [("gd", eta, 0.0) for eta in args.etas]
    plan += [(m, eta, rho * RADIUS[m]) for m in ("usam", "sam", "ssam") for eta in args.etas for rho in args.rhos]
    for _, eta, rho in plan:
        check(eta, rho)
    batch = digits(args.digits)
    return [train(*row, batch, args.time, args.checks) for row in tqdm(plan, desc="runs")]


def check(eta: float, rho: float) -> None:
    """Refuse what no run can be made with, before the first one.

    Raises:
        UsageError: the learning rate or the radius is out of range.
    """
    try:
        edge_of_stability(eta, rho)
    except ValueError as error:
        raise cli.UsageError(f"--etas {eta:g} and a radius of {rho:g} cannot be run: {error}") from error


def drawn(path: Path) -> list[Run]:
    """The runs that `runs.json` holds."""
    return [Run(**run) for run in json.loads(path.read_text())]


def main(argv: Sequence[str] | None = None) -> list[Run]:
    """Train, write `runs.json`, `table.md` and `edge_of_stability.png`, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--etas", type=float, nargs="+", default=[0.1, 0.2, 0.4])
    parser.add_argument("--rhos", type=float, nargs="+", default=[0.01, 0.02, 0.05], help="USAM takes 4 times these")
    parser.add_argument("--time", type=float, default=800.0, help="learning rate times steps")
    parser.add_argument("--checks", type=int, default=100, help="measurements a run")
    parser.add_argument("--digits", type=int, default=300)
    parser.add_argument("--drawn_from", type=Path, help="a runs.json, instead of training")
    parser.add_argument("--output_dir", type=Path, default=Path("edge_of_stability"))
    args = parser.parse_args(argv)
    runs = drawn(args.drawn_from) if args.drawn_from else trained(args)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "runs.json").write_text(json.dumps([asdict(r) for r in runs]))
    (args.output_dir / "table.md").write_text(table(runs) + "\n")
    figure(runs, sorted({r.eta for r in runs}), args.output_dir / "edge_of_stability.png")
    print(table(runs))
    return runs


if __name__ == "__main__":
    cli.run(main)
