"""The loss along a line or over a plane through the weights.

A random direction means nothing until its scale does: filter normalisation (Li et al. 2018, arXiv 1712.09913,
section 4) gives each filter of the direction the length of the model's filter, so that weights which a rescaling of
the network can shrink or blow up do not decide how flat the picture looks. A random slice of a million dimensions
mostly shows flat ones; the top eigenvector beside it shows the steepest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..rules.tensors import Vector
from .measured import selected
from .objective import Objective
from .probe import Batches


@dataclass(frozen=True)
class Line:
    """Losses at `w + t d`.

    Attributes:
        distances: t, shape (T,), in units of the direction.
        losses: shape (T,); what is not finite is NaN.
    """

    distances: np.ndarray
    losses: np.ndarray


@dataclass(frozen=True)
class Plane:
    """Losses at `w + s a + t b`.

    Attributes:
        distances: s and t alike, shape (T,).
        losses: shape (T, T), rows by t (the second direction), columns by s (the first).
    """

    distances: np.ndarray
    losses: np.ndarray


def random_direction(model: nn.Module, seed: int = 0, parameters: str | None = None) -> Vector:
    """A filter-normalised random direction over the chosen weights; vectors (biases, norms) stay where they are.

    Args:
        model: whose filters set the lengths: a filter is `w[i]`, an output unit of a layer.
        seed: of the direction.
        parameters: as in `Objective`.
    """
    generator = torch.Generator().manual_seed(seed)
    return {n: _filter_normalized(p.detach().float(), generator) for n, p in selected(model, parameters).items()}


def _filter_normalized(w: Tensor, generator: torch.Generator) -> Tensor:
    d = torch.randn(w.shape, generator=generator).to(w.device)
    if w.ndim < 2:
        return torch.zeros_like(w)
    lengths = [torch.linalg.vector_norm(t.flatten(1), dim=1) for t in (w, d)]
    ratio = lengths[0] / lengths[1].clamp_min(torch.finfo(w.dtype).tiny)
    return d * ratio.view(-1, *[1] * (w.ndim - 1))


def loss_line(model: nn.Module, batches: Batches, direction: Vector, distances: Sequence[float], **probe: Any) -> Line:
    """The loss at `w + t d` for every t of `distances`.

    Args:
        model: any model; it is left as it was to the bit.
        batches: see `Objective`.
        direction: by parameter name: an eigenvector of `top_eigenvalues`, or `random_direction`.
        distances: values of t.
        **probe: as in `top_eigenvalues`.
    """
    objective = Objective(model, batches, **_quiet(probe))
    d = objective.flat(direction)
    ts = np.asarray(distances, dtype=float)
    losses = [_loss(objective, d * t) for t in tqdm(ts, desc="loss along a line", disable=not probe.get("progress"))]
    return Line(ts, np.array(losses))


def loss_plane(
    model: nn.Module, batches: Batches, first: Vector, second: Vector, distances: Sequence[float], **probe: Any
) -> Plane:
    """The loss at `w + s a + t b` for every s and t of `distances`; `second` is not made orthogonal to `first`.

    Args:
        model: any model; it is left as it was to the bit.
        batches: see `Objective`.
        first: a, drawn to the right.
        second: b, drawn upwards.
        distances: values of s and of t.
        **probe: as in `top_eigenvalues`.
    """
    objective = Objective(model, batches, **_quiet(probe))
    a, b = objective.flat(first), objective.flat(second)
    ts = np.asarray(distances, dtype=float)
    rows = tqdm(ts, desc="loss over a plane", disable=not probe.get("progress"))
    return Plane(ts, np.array([[_loss(objective, a * s + b * t) for s in ts] for t in rows]))


def _loss(objective: Objective, offset: Tensor) -> float:
    try:
        return objective.value(offset)
    except FloatingPointError:
        return float("nan")


def _quiet(probe: dict[str, Any]) -> dict[str, Any]:
    return {**probe, "progress": False}
