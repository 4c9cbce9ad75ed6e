"""Figures: one function each, a PNG where a path is given and the Axes in any case. Needs matplotlib, only when
called.

plot_run          loss, accuracy, γ and norms of a run
plot_runs         two or more runs over each other
plot_rho_sweep    a score against ρ, with seeds
plot_edge         the top eigenvalue of a run against its predicted edge
plot_spectrum     density of the Hessian's eigenvalues
plot_loss_line    the loss along directions (top eigenvector, filter-normalised random ones)
plot_loss_plane   the loss over a plane
"""

from .curvature import plot_edge, plot_loss_line, plot_loss_plane, plot_spectrum
from .history import history, series
from .runs import plot_rho_sweep, plot_run, plot_runs

__all__ = [
    "history",
    "plot_edge",
    "plot_loss_line",
    "plot_loss_plane",
    "plot_rho_sweep",
    "plot_run",
    "plot_runs",
    "plot_spectrum",
    "series",
]
