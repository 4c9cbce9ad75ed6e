"""The runs at the edge of stability as a table and as a figure."""

from pathlib import Path

import numpy as np

from hf_ssam.plots.canvas import COLORS, canvas, dress, save

from .edge_runs import Run

TITLES = {
    "gd": "Gradient descent",
    "usam": "USAM: e = ρ g",
    "sam": "SAM: e = ρ g/‖g‖",
    "ssam": "SSAM: SAM with d = γ ĝ",
}


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
