"""Pictures of curvature: eigenvalue and edge, spectral density, the loss round the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .canvas import COLORS, canvas, dress, save, style
from .history import Source, history, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.contour import ContourSet

    from ..sharpness import Line, Plane, Spectrum

VISIBLE = 4.0
"""An edge is drawn up to this multiple of the largest measured eigenvalue."""

_EDGES = (
    ("sharpness/edge", "predicted edge of this method", "--"),
    ("sharpness/edge_gd", "2/η: edge of gradient descent", ":"),
)


def plot_edge(source: Source, path: str | Path | None = None, ax: Axes | None = None) -> Axes:
    """The top eigenvalue of a run over its steps, against the edges predicted from learning rate and ρ.

    Args:
        source: see `history`; the run needs `sharpness_steps`.
        path: where to save a PNG.
        ax: where to draw; a new figure where None.

    Raises:
        ValueError: if no eigenvalue was logged.
    """
    log = history(source)
    steps, values = series(log, "sharpness/top_eigenvalue")
    if not steps:
        raise ValueError("source: the log holds no `sharpness/top_eigenvalue`; train with --sharpness_steps.")
    ax = ax or canvas()[0]
    ax.plot(steps, values, label="measured λ₁", marker="o", markersize=3, color=COLORS[0])
    top = max(values)
    for i, (key, label, line) in enumerate(_EDGES, start=1):
        at, edges = series(log, key)
        if at:
            hidden = " (above the figure)" if min(edges) >= VISIBLE * top else ""
            ax.plot(at, edges, line, color=COLORS[i], label=label + hidden)
    # A decaying learning rate sends the edges to infinity; the measured curve is what has to be seen.
    visible = [e for key, _, _ in _EDGES for e in series(log, key)[1] if e < VISIBLE * top]
    ax.set_ylim(min(0, 1.1 * min(values)), 1.15 * max([top, *visible]))
    dress(ax, "Top Hessian eigenvalue and the edge of stability", "optimizer step", "λ₁")
    save(ax, path)
    return ax


def plot_spectrum(
    spectra: Spectrum | Mapping[str, Spectrum],
    path: str | Path | None = None,
    ax: Axes | None = None,
    width: float | None = None,
) -> Axes:
    """Density of Hessian eigenvalues, on a logarithmic scale: a single large eigenvalue of a million is a small bump.

    Args:
        spectra: from `sharpness.spectrum`, one or several by name.
        path: where to save a PNG.
        ax: where to draw; a new figure where None.
        width: standard deviation of the Gaussian that smears each eigenvalue; default 1 % of the range shown.
    """
    named = dict(spectra) if isinstance(spectra, Mapping) else {"": spectra}
    ax = ax or canvas()[0]
    low, high = min(s.nodes[0] for s in named.values()), max(s.nodes[-1] for s in named.values())
    width = width or max(0.01 * (high - low), 1e-12)
    grid = np.linspace(low - 7 * width, high + 7 * width, 1000)
    floor = min(0.1 / s.parameters for s in named.values()) / width
    for i, (name, spectrum) in enumerate(named.items()):
        top = spectrum.nodes[-1]
        label = f"{name}: λ₁ ≈ {top:.3g} (▼)" if name else f"λ₁ ≈ {top:.3g} (▼)"
        ax.plot(grid, _density(spectrum, grid, width), label=label, **style(i))
        height = float(_density(spectrum, spectrum.nodes[-1:], width)[0])
        ax.plot(top, 1.6 * height, "v", color=COLORS[i % len(COLORS)], clip_on=False)
    ax.set_yscale("log")
    ax.set_ylim(floor, 10 * max(float(np.max(line.get_ydata())) for line in ax.get_lines()))
    x = f"eigenvalue λ, each drawn as a bell of standard deviation {width:.2g}"
    dress(ax, "Spectral density of the Hessian", x, "density (log scale)")
    save(ax, path)
    return ax


def _density(spectrum: Spectrum, at: np.ndarray, width: float) -> np.ndarray:
    """The density, with the largest eigenvalue as at least one of n: a random start may have missed its direction."""
    bell = np.exp(-0.5 * ((at - spectrum.nodes[-1]) / width) ** 2) / (width * np.sqrt(2 * np.pi))
    return np.maximum(spectrum.density(at, width), bell / spectrum.parameters)


def plot_loss_line(
    lines: Mapping[str, Line],
    path: str | Path | None = None,
    ax: Axes | None = None,
    rise: bool = False,
    title: str = "Loss along lines through the weights w",
    x: str = "distance t in w + t d",
) -> Axes:
    """The loss along lines through the weights.

    Args:
        lines: from `sharpness.loss_line`, by the name of the direction.
        path: where to save a PNG.
        ax: where to draw; a new figure where None.
        rise: draw how far the loss lies above that at w, so that models of different losses can be compared.
        title: of the figure.
        x: what the distances are.
    """
    ax = ax or canvas()[0]
    for i, (name, line) in enumerate(lines.items()):
        at_w = float(np.interp(0.0, line.distances, line.losses)) if rise else 0.0
        label = f"{name} (loss {at_w:.3g})" if rise else name
        ax.plot(line.distances, line.losses - at_w, label=label, marker=".", markersize=4, **style(i))
    ax.axvline(0, color="black", linewidth=0.8, alpha=0.5)
    ax.annotate(" w", (0, 1), xycoords=("data", "axes fraction"), va="top")
    dress(ax, title, x, "loss above that at w" if rise else "loss")
    save(ax, path)
    return ax


def plot_loss_plane(
    planes: Plane | Mapping[str, Plane],
    path: str | Path | None = None,
    ax: Axes | None = None,
    names: Sequence[str] = ("first direction", "second direction"),
) -> Axes:
    """The loss over a plane through the weights, in filled levels; several planes side by side in the same levels.

    Args:
        planes: from `sharpness.loss_plane`, one or several by name.
        path: where to save a PNG.
        ax: where to draw a single one; a new figure where None.
        names: of the directions, to the right and upwards.

    Returns:
        The axes of the (first) plane.
    """
    from matplotlib.ticker import MaxNLocator

    named = dict(planes) if isinstance(planes, Mapping) else {"": planes}
    axes = [ax] if ax else canvas(1, len(named), (5.0, 4.4))
    finite = np.concatenate([p.losses[np.isfinite(p.losses)] for p in named.values()])
    levels = MaxNLocator(16).tick_values(finite.min(), finite.max())
    for ax, (name, plane) in zip(axes, named.items(), strict=True):
        filled = _levels(ax, plane, levels)
        dress(ax, name or "Loss over a plane through the weights w", names[0], names[1], legend=False)
    if len(named) > 1:
        axes[0].figure.suptitle("Loss over a plane through the weights w of each model")
    axes[0].figure.colorbar(filled, ax=axes, label="loss")
    save(axes[0], path)
    return axes[0]


def _levels(ax: Axes, plane: Plane, levels: Sequence[float]) -> ContourSet:
    losses = np.ma.masked_invalid(plane.losses)
    filled = ax.contourf(plane.distances, plane.distances, losses, levels=levels, cmap="viridis")
    ax.contour(plane.distances, plane.distances, losses, levels=levels, colors="white", linewidths=0.4, alpha=0.6)
    ax.plot(0, 0, "o", color="white", markeredgecolor="black")
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1.5}
    ax.annotate("w", (0, 0), xytext=(7, 7), textcoords="offset points", weight="bold", bbox=box)
    ax.set_aspect("equal")
    ax.locator_params(nbins=5)
    return filled
