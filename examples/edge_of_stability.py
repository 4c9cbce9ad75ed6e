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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from hf_ssam import TwoPass
from hf_ssam.plots.canvas import COLORS, canvas, dress, save
from hf_ssam.sharpness import edge_of_stability, top_eigenvalues
from support import cli
from support.offline import mnist_5k

TITLES = {
    "gd": "Gradient descent",
    "usam": "USAM: e = ρ g",
    "sam": "SAM: e = ρ g/‖g‖",
    "ssam": "SSAM: SAM with d = γ ĝ",
}
RADIUS = {"usam": 4.0, "sam": 1.0, "ssam": 1.0}
"""What a ρ of the command line is multiplied by: e = ρ g is shorter than e = ρ g/‖g‖ wherever ‖g‖ < 1."""


class Network(nn.Module):
    """A tanh network with the squared loss on one-hot labels."""

    def __init__(self, inputs: int, width: int = 48, depth: int = 3, classes: int = 10):
        super().__init__()
        sizes = [inputs] + [width] * depth
        hidden = [layer for a, b in zip(sizes, sizes[1:], strict=False) for layer in (nn.Linear(a, b), nn.Tanh())]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, classes))
        self.classes = classes

    def forward(self, pixels: torch.Tensor, labels: torch.Tensor) -> SimpleNamespace:
        """Half the squared distance to the one-hot label, averaged over the rows."""
        target = nn.functional.one_hot(labels, self.classes).to(pixels.dtype)
        return SimpleNamespace(loss=0.5 * (self.layers(pixels) - target).square().sum(1).mean())


@dataclass
class Run:
    """What was measured: one number a measurement in every list."""

    method: str
    eta: float
    rho: float
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    eigenvalues: list[float] = field(default_factory=list)
    edges: list[float] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    stabilities: list[float] = field(default_factory=list)

    def tail(self, values: list[float]) -> np.ndarray:
        """The last 40 % of `values`."""
        return np.array(values[int(0.6 * len(values)) :])

    @property
    def reached(self) -> bool:
        """Whether λ₁ has come within 5 % of its edge, or above."""
        return bool(max(np.array(self.eigenvalues) / np.array(self.edges)) > 0.95)

    @property
    def deviation(self) -> float:
        """Median of λ₁ / edge − 1 over the plateau."""
        return float(np.median(self.tail(self.eigenvalues) / self.tail(self.edges)) - 1)


def digits(count: int) -> dict[str, torch.Tensor]:
    """The whole batch: `count` digits of 14 × 14 pixels, centred."""
    data = mnist_5k()["train"].shuffle(seed=0).select(range(count))
    pixels = torch.tensor(np.stack([np.asarray(image) for image in data["image"]])).float() / 255
    pixels = nn.functional.avg_pool2d(pixels[:, None], 2).flatten(1)
    return {"pixels": pixels - pixels.mean(0), "labels": torch.tensor(data["label"])}


def train(method: str, eta: float, rho: float, batch: dict[str, torch.Tensor], time: float, checks: int) -> Run:
    """Train for `time / eta` steps and measure `checks` times, at w before the step."""
    torch.manual_seed(0)
    model, run = Network(batch["pixels"].shape[1]), Run(method, eta, rho)
    two_pass = TwoPass(model, "sam" if method == "gd" else method, rho=rho)
    optimizer = torch.optim.SGD(model.parameters(), lr=eta)
    steps = round(time / eta)

    def forward_backward() -> torch.Tensor:
        loss = model(**batch).loss
        loss.backward()
        return loss

    for step in range(steps + 1):
        optimizer.zero_grad()
        report = two_pass.step(forward_backward)
        if step % max(1, steps // checks) == 0:
            measure(run, step, report, top_eigenvalues(model, batch, tol=1e-3).values[0])
        optimizer.step()
    return run


def measure(run: Run, step: int, report, eigenvalue: float) -> None:
    """Note the eigenvalue, and the edge of the method at this ‖g‖ and γ."""
    name = "sgd" if run.method == "gd" else run.method
    norm, scale = report.grad_norm.item(), float(report.scale)
    run.steps.append(step)
    run.losses.append(report.loss.item())
    run.eigenvalues.append(eigenvalue)
    run.scales.append(scale)
    edges = edge_of_stability(run.eta, run.rho, norm, name, scale=scale)
    run.edges.append(edges.edge)
    run.stabilities.append(edges.stability(eigenvalue))


def table(runs: list[Run]) -> str:
    """Plateaus and edges in Markdown, and the tolerance in the last line."""
    heads = ("method", "η", "ρ", "plateau of λ₁", "edge there", "λ₁/edge − 1", "stability (edge: 2)", "last loss")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for r in runs:
        plateau, edge = np.median(r.tail(r.eigenvalues)), np.median(r.tail(r.edges))
        verdict = f"{100 * r.deviation:+.1f} %" if r.reached else "not reached"
        stability = np.median(r.tail(r.stabilities))
        lines.append(
            f"| {r.method} | {r.eta:g} | {r.rho:g} | {plateau:.2f} | {edge:.2f} | {verdict} | {stability:.2f} "
            f"| {r.losses[-1]:.4f} |"
        )
    return "\n".join([*lines, "", *(tolerance(runs, m) for m in TITLES if any(r.method == m for r in runs))])


def tolerance(runs: list[Run], method: str) -> str:
    """The largest deviation of a method's plateaus, in words."""
    mine = [r for r in runs if r.method == method]
    reached = [abs(r.deviation) for r in mine if r.reached]
    found = f"plateaus within {100 * max(reached):.1f} % of the edge" if reached else "no plateau"
    return f"{method}: {found} ({len(reached)} of {len(mine)} runs reached it)."


def figure(runs: list[Run], etas: list[float], path: Path) -> None:
    """A row a learning rate, a column a method; λ₁ solid, its predicted edge dashed."""
    axes = canvas(len(etas), len(TITLES), (3.7, 2.9))
    for i, eta in enumerate(etas):
        row = [r for r in runs if r.eta == eta]
        for ax, (method, title) in zip(axes[i * len(TITLES) :], TITLES.items(), strict=False):
            panel(ax, [r for r in row if r.method == method], eta)
            y = f"λ₁ at η = {eta:g}" if method == "gd" else ""
            dress(ax, title if i == 0 else "", "step" if i == len(etas) - 1 else "", y)
            ax.set_ylim(0, max(1.25 * 2 / eta, 1.05 * max(max(r.eigenvalues) for r in row)))
    axes[0].figure.suptitle(
        "Top Hessian eigenvalue λ₁ (broad) and its predicted edge (dashed); grey: 2/η, the edge of gradient descent"
    )
    save(axes[0], path)


def panel(ax, runs: list[Run], eta: float) -> None:
    """The runs of one method and learning rate."""
    ax.axhline(2 / eta, color="grey", linewidth=6, alpha=0.25)
    for color, run in zip(COLORS, runs, strict=False):
        label = f"ρ = {run.rho:g}" if run.rho else None
        ax.plot(run.steps, run.eigenvalues, color=color, linewidth=2.6, alpha=0.5, label=label)
        if run.method != "gd":
            ax.plot(run.steps, run.edges, "--", color=color, linewidth=1.1)


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
