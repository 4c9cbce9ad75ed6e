"""Trace and spectral density from products with random vectors.

    tr H = E[zᵀ H z]                                  z of independent signs (Hutchinson 1990)
    φ(t) = 1/n Σ_i δ(t − λ_i) = E[Σ_j w_j δ(t − θ_j)]   Gauss quadrature of T, w_j = (y_j)₁² (Ubaru, Chen, Saad 2017)

Both formulas are from memory; the tests hold them against the full Hessian. Where as many probes are asked for as
there are weights, the unit vectors take their place and the answer is exact.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .eigenvalues import unit_vectors
from .lanczos import BASIS_ELEMENTS, lanczos
from .objective import Objective
from .probe import Batches


@dataclass(frozen=True)
class Trace:
    """What `trace` returns.

    Attributes:
        value: estimate of the sum of all eigenvalues.
        standard_error: of the estimate; 0 where it is exact.
        products, seconds, parameters, precision: as in `Eigenvalues`.
    """

    value: float
    standard_error: float
    products: int
    seconds: float
    parameters: int
    precision: str


@dataclass(frozen=True)
class Spectrum:
    """What `spectrum` returns: a discrete density whose moments are (estimates of) those of the eigenvalues.

    Attributes:
        nodes: places θ, ascending, shape (N,).
        weights: mass at each, shape (N,), summing to 1.
        products, seconds, parameters, precision: as in `Eigenvalues`.
    """

    nodes: np.ndarray
    weights: np.ndarray
    products: int
    seconds: float
    parameters: int
    precision: str

    def moment(self, power: int) -> float:
        """`1/n Σ_i λ_i^power`."""
        return float(np.sum(self.weights * self.nodes**power))

    def density(self, grid: np.ndarray, width: float) -> np.ndarray:
        """The density at `grid`, each node smeared to a Gaussian of standard deviation `width`; shape of `grid`."""
        bells = np.exp(-0.5 * ((grid[:, None] - self.nodes) / width) ** 2) / (width * math.sqrt(2 * math.pi))
        return bells @ self.weights


def trace(model: nn.Module, batches: Batches, samples: int = 30, *, seed: int = 0, **probe: Any) -> Trace:
    """Trace of the Hessian of the loss over `batches`, by Hutchinson's estimator, with its standard error.

    Args:
        model: any model; it is left as it was to the bit.
        batches: see `Objective`.
        samples: random vectors, from 2; with as many as there are weights the trace is exact.
        seed: of the vectors.
        **probe: as in `top_eigenvalues`.

    Raises:
        ValueError: for fewer than 2 samples, and as `Objective`.
    """
    objective = Objective(model, batches, **probe)
    try:
        return estimate_trace(objective, samples, seed)
    finally:
        objective.close()


def estimate_trace(objective: Objective, samples: int = 30, seed: int = 0) -> Trace:
    """`trace` of an objective that is there already."""
    if samples < 2:
        raise ValueError(f"samples: {samples} gives no standard error; choose at least 2.")
    begun, before = time.perf_counter(), objective.products
    exact = samples >= objective.size
    probes = unit_vectors(objective) if exact else _signs(objective, samples, seed)
    forms = np.array([torch.dot(z, objective.product(z)).item() for z in probes])
    return Trace(
        value=float(forms.sum() if exact else forms.mean()),
        standard_error=0.0 if exact else float(forms.std(ddof=1) / math.sqrt(samples)),
        products=objective.products - before,
        seconds=time.perf_counter() - begun,
        parameters=objective.size,
        precision=objective.precision,
    )


def spectrum(
    model: nn.Module, batches: Batches, steps: int = 40, probes: int = 4, *, seed: int = 0, **probe: Any
) -> Spectrum:
    """Spectral density of the Hessian of the loss over `batches`, by stochastic Lanczos quadrature.

    Args:
        model: any model; it is left as it was to the bit.
        batches: see `Objective`.
        steps: Lanczos steps a probe, at most n; moments up to `2 steps − 1` of a probe are exact.
        probes: random vectors; with as many as there are weights the unit vectors are taken, which leaves no chance.
        seed: of the vectors.
        **probe: as in `top_eigenvalues`. The basis is kept (and ghosts of converged eigenvalues avoided) while
            `steps · n` stays under `lanczos.BASIS_ELEMENTS`; ghosts share the weight of what they copy.

    Raises:
        ValueError: for fewer than one step or probe, and as `Objective`.
    """
    if steps < 1 or probes < 1:
        raise ValueError(f"steps, probes: {steps} and {probes} measure nothing; choose at least 1 of each.")
    objective = Objective(model, batches, **probe)
    begun, n = time.perf_counter(), objective.size
    starts = unit_vectors(objective) if probes >= n else _signs(objective, probes, seed)
    quadratures = [_quadrature(objective, start, min(steps, n)) for start in starts]
    objective.close()
    nodes = np.concatenate([q[0] for q in quadratures])
    weights = np.concatenate([q[1] for q in quadratures]) / len(quadratures)
    order = np.argsort(nodes)
    return Spectrum(
        nodes=nodes[order],
        weights=weights[order],
        products=objective.products,
        seconds=time.perf_counter() - begun,
        parameters=n,
        precision=objective.precision,
    )


def _quadrature(objective: Objective, start: Tensor, steps: int) -> tuple[np.ndarray, np.ndarray]:
    basis: list[Tensor] | None = [] if steps * objective.size <= BASIS_ELEMENTS else None
    for _, t in lanczos(objective, start, basis):
        if len(t.alphas) >= steps:
            break
    values, vectors = t.eigen()
    return values, vectors[0] ** 2


def _signs(objective: Objective, count: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        bits = torch.empty(objective.size, dtype=objective.dtype).random_(0, 2, generator=generator)
        yield bits.mul_(2).sub_(1).to(objective.device)
