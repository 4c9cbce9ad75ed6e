"""Pictures of runs: what the Trainer logged, one run or several."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .canvas import COLORS, canvas, dress, log_if_wide, save, style
from .history import Log, Source, history, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PANELS = (
    (
        "Loss",
        "loss",
        (("loss", "training, at w"), ("ssam/ascent_loss", "training, at w + e"), ("eval_loss", "evaluation")),
    ),
    ("Factor γ = ‖g‖/‖ĝ‖ of the step", "γ", (("ssam/scale", "γ"),)),
    (
        "Norms of the gradients",
        "norm",
        (("ssam/grad_norm", "‖g‖ at w"), ("ssam/ascent_grad_norm", "‖ĝ‖ at w + e")),
    ),
    ("Perturbation", "length", (("ssam/rho", "radius ρ"), ("ssam/perturbation_norm", "‖e‖"))),
    ("Top Hessian eigenvalue", "λ₁", (("sharpness/top_eigenvalue", "λ₁"),)),
)

_COMPARED = (
    ("Training loss", "loss", "loss"),
    ("Loss at w + e", "loss", "ssam/ascent_loss"),
    ("Norm of the gradient", "‖g‖", "ssam/grad_norm"),
    ("Top Hessian eigenvalue", "λ₁", "sharpness/top_eigenvalue"),
)


def plot_run(source: Source, path: str | Path | None = None) -> list[Axes]:
    """One run on a page: loss and ascent loss, score, γ, norms, ρ where it varies and λ₁, as far as they were logged.

    Args:
        source: see `history`.
        path: where to save a PNG.

    Raises:
        ValueError: if nothing of it was logged.
    """
    log = history(source)
    panels = [_PANELS[0], *_scores([log]), *_PANELS[1:]]
    drawn = [(t, y, [(series(log, k), label) for k, label in keys]) for t, y, keys in panels]
    drawn = [(t, y, kept) for t, y, curves in drawn if (kept := [c for c in curves if c[0][0]]) and _tells(t, kept)]
    _check(drawn, "loss, accuracy or `ssam/...`")
    columns = min(2, len(drawn))
    axes = canvas(-(-len(drawn) // columns), columns, (5.6, 3.4))
    for ax, (title, y, curves) in zip(axes, drawn, strict=False):
        for i, ((steps, values), label) in enumerate(curves):
            _line(ax, steps, values, label, i)
        log_if_wide(ax, [v for (_, values), _ in curves for v in values])
        dress(ax, title, "optimizer step", y, legend=len(curves) > 1)
    _blank(axes[len(drawn) :])
    save(axes[0], path)
    return axes[: len(drawn)]


def plot_runs(sources: Mapping[str, Source], path: str | Path | None = None) -> list[Axes]:
    """Several runs over each other: losses, score, ‖g‖ and top eigenvalue, as far as any run logged them.

    Args:
        sources: runs by the name to show; see `history`.
        path: where to save a PNG.

    Raises:
        ValueError: if no run logged any of it.
    """
    logs = {name: history(source) for name, source in sources.items()}
    scores = [(title, y, keys[0][0]) for title, y, keys in _scores(logs.values())]
    panels = [_COMPARED[0], *scores, *_COMPARED[1:]]
    drawn = [p for p in panels if any(series(log, p[2])[0] for log in logs.values())]
    _check(drawn, "loss, accuracy or `sharpness/top_eigenvalue`")
    columns = 2 if len(drawn) == 4 else min(3, len(drawn))
    axes = canvas(-(-len(drawn) // columns), columns, (4.8, 3.6))
    for ax, (title, y, key) in zip(axes, drawn, strict=False):
        curves = {name: series(log, key) for name, log in logs.items()}
        for i, (name, (steps, values)) in enumerate(curves.items()):
            _line(ax, steps, values, name, i)
        log_if_wide(ax, [v for _, values in curves.values() for v in values])
        dress(ax, title, "optimizer step", y, legend=ax is axes[0])
    _blank(axes[len(drawn) :])
    save(axes[0], path)
    return axes[: len(drawn)]


def plot_rho_sweep(
    scores: Mapping[float, Sequence[float]],
    baseline: Sequence[float] | None = None,
    metric: str = "evaluation accuracy",
    path: str | Path | None = None,
    ax: Axes | None = None,
) -> Axes:
    """A score against ρ: every seed as a dot, their mean as a line, and the base optimizer's mean and range behind.

    Args:
        scores: by ρ > 0, one number a seed.
        baseline: the same without a perturbation.
        metric: what the score is.
        path: where to save a PNG.
        ax: where to draw; a new figure where None.
    """
    ax = ax or canvas()[0]
    rhos = sorted(scores)
    for rho in rhos:
        ax.plot([rho] * len(scores[rho]), scores[rho], "o", color=COLORS[0], alpha=0.4, markersize=4)
    ax.plot(rhos, [np.mean(scores[r]) for r in rhos], "-", color=COLORS[0], label=f"mean of {_seeds(scores)}")
    if baseline:
        ax.axhline(float(np.mean(baseline)), color=COLORS[1], linestyle="--", label="no perturbation: mean, range")
        ax.axhspan(min(baseline), max(baseline), color=COLORS[1], alpha=0.12, linewidth=0)
    ax.set_xscale("log")
    ax.set_xticks(rhos, [f"{r:g}" for r in rhos])
    ax.minorticks_off()
    dress(ax, f"{metric.capitalize()} against the radius ρ", "ρ (log scale)", metric)
    save(ax, path)
    return ax


def _tells(title: str, curves: Sequence[tuple[tuple[list[int], list[float]], str]]) -> bool:
    """Whether a panel shows more than one number: a perturbation may be as long at every step."""
    return title != "Perturbation" or any(max(v) - min(v) > 0.01 * max(map(abs, v)) for (_, v), _ in curves)


def _line(ax: Axes, steps: list[int], values: list[float], label: str, index: int) -> None:
    """A curve; a few points are marked, and two of them are no curve."""
    look = style(index) | ({"linestyle": "none"} if len(steps) == 2 else {})
    ax.plot(steps, values, label=label, marker="o" if len(steps) < 12 else None, markersize=4, **look)


def _scores(logs: Iterable[Log]) -> list[tuple[str, str, tuple[tuple[str, str], ...]]]:
    """The panel of the score that the runs were evaluated by: accuracy, or the first that was logged."""
    logged = dict.fromkeys(k for log in logs for entry in log for k in entry if k.startswith("eval_"))
    named = [k for k in logged if not k.endswith(("_loss", "_runtime", "_per_second", "_time", "_tokens"))]
    if not named:
        return []
    key = "eval_accuracy" if "eval_accuracy" in named else named[0]
    name = key.removeprefix("eval_").replace("_", " ")
    return [(f"Evaluation {name}", name, ((key, "evaluation"),))]


def _seeds(scores: Mapping[float, Sequence[float]]) -> str:
    counts = sorted({len(s) for s in scores.values()})
    return f"{'-'.join(map(str, counts))} seed{'s' if counts != [1] else ''}"


def _blank(axes: Sequence[Axes]) -> None:
    for ax in axes:
        ax.set_axis_off()


def _check(drawn: Sequence, wanted: str) -> None:
    if not drawn:
        raise ValueError(f"source: the log holds no {wanted}; pass the folder of a run that logged some.")
