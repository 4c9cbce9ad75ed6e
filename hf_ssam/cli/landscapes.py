"""The figures of `hf-ssam sharpness`: spectra, the loss along lines, and over planes."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

import torch

from ..plots import plot_loss_line, plot_loss_plane, plot_spectrum
from ..plots.canvas import canvas, save
from ..saved.models import Subject
from ..sharpness import Line, Plane, loss_line, loss_plane, random_direction, spectrum, top_eigenvalues

if TYPE_CHECKING:
    from matplotlib.axes import Axes

How = dict[str, Any]


def draw(subjects: list[Subject], args: argparse.Namespace, measured_on: str) -> None:
    """Spectra over each other, the loss along two lines, and planes side by side."""
    how = {"progress": args.progress}
    spectra = {s.name: spectrum(s.model, s.batches, args.spectrum_steps, 1, **how) for s in subjects}
    figures = {"spectrum": plot_spectrum(spectra)}
    figures["loss_line"] = lines(subjects, args, how)
    if args.plane:
        names = ("random direction, filter-normalised", "another one")
        figures["plane"] = plot_loss_plane({s.name: plane(s, how) for s in subjects}, names=names)
    for name, ax in figures.items():
        ax.figure.supxlabel(measured_on, fontsize="small")
        save(ax, args.output_dir / f"{name}.png")


def lines(subjects: list[Subject], args: argparse.Namespace, how: How) -> Axes:
    """The rise of the loss along the top eigenvector, and along a random direction: two scales, so two figures."""
    axes = canvas(1, 2, (5.2, 3.8))
    steep = {s.name: steepest(s, args, how) for s in subjects}
    plot_loss_line(steep, ax=axes[0], rise=True, title="Along the top eigenvector", x="distance ‖w' − w‖")
    usual = {s.name: random_line(s, how) for s in subjects}
    words = {"title": "Along a random direction", "x": "t in w + t d, d as long as w filter by filter"}
    return plot_loss_line(usual, ax=axes[1], rise=True, **words)


def steepest(subject: Subject, args: argparse.Namespace, how: How) -> Line:
    """The loss along the top eigenvector, which has no sign: the higher end goes to the right."""
    distances = (args.reach * torch.linspace(-1, 1, 21)).tolist()
    top = top_eigenvalues(subject.model, subject.batches, tol=1e-2, vectors=True, **how).vectors[0]
    return uphill(loss_line(subject.model, subject.batches, top, distances, **how))


def random_line(subject: Subject, how: How) -> Line:
    """The loss along a filter-normalised random direction, the same for models of one shape."""
    distances = torch.linspace(-1, 1, 21).tolist()
    return loss_line(subject.model, subject.batches, random_direction(subject.model), distances, **how)


def uphill(line: Line) -> Line:
    """The line, or its mirror image, so that the loss at the right end is the higher one."""
    return line if line.losses[-1] >= line.losses[0] else Line(line.distances, line.losses[::-1])


def plane(subject: Subject, how: How) -> Plane:
    """The loss over two filter-normalised random directions."""
    first, second = (random_direction(subject.model, seed=seed) for seed in (0, 1))
    return loss_plane(subject.model, subject.batches, first, second, torch.linspace(-1, 1, 11).tolist(), **how)
