"""What all figures share: where they are drawn, how they look, and how they are saved.

Figures are made without pyplot, so that no backend is chosen and nothing stays open: a figure that nobody holds is
gone.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's colours, which colour-blind readers can tell apart; more curves than these start again, dotted."""


def canvas(rows: int = 1, columns: int = 1, size: tuple[float, float] = (6.4, 4.0)) -> list[Axes]:
    """`rows · columns` axes of `size` inches each, row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(columns * size[0], rows * size[1]), layout="constrained")
    return list(figure.subplots(rows, columns, squeeze=False).flat)


def dress(ax: Axes, title: str, x: str, y: str, legend: bool = True) -> None:
    """Title, axis labels and a quiet grid; a legend where something is labelled."""
    ax.set_title(title)
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    if legend and ax.get_legend_handles_labels()[1]:
        ax.legend(frameon=False, fontsize="small")


def style(index: int) -> dict[str, Any]:
    """Colour and line of the `index`-th curve."""
    return {"color": COLORS[index % len(COLORS)], "linestyle": "-" if index < len(COLORS) else ":"}


def log_if_wide(ax: Axes, values: list[float], ratio: float = 30.0) -> None:
    """A logarithmic y axis where positive values differ by more than `ratio`."""
    seen = [v for v in values if math.isfinite(v)]
    if seen and min(seen) > 0 and max(seen) > ratio * min(seen):
        ax.set_yscale("log")


def save(ax: Axes, path: str | Path | None) -> None:
    """Write the figure that `ax` is part of as a PNG, unless `path` is None."""
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        ax.figure.figure.savefig(path, dpi=120)
