"""The Lanczos recurrence on Hessian-vector products, in two vectors of memory or with the basis kept.

    β_{j+1} q_{j+1} = H q_j − α_j q_j − β_j q_{j−1}

The tridiagonal T of the α and β has eigenvalues (Ritz values) that approach those of H, the outermost first; the
residual of a Ritz pair (θ, y) is `|β_m y_m|` and needs no product (Parlett, The Symmetric Eigenvalue Problem,
chapter 13, from memory). Without the basis orthogonality is lost once a pair has converged, which puts copies of it
into T and leaves the largest value right; with the basis every vector is orthogonalised against all earlier ones,
twice.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from .arithmetic import length
from .objective import Objective

BASIS_ELEMENTS = 2**26
"""A basis is kept up to this many numbers (512 MiB in float64)."""


class Tridiagonal:
    """The α and β found so far.

    Attributes:
        alphas, betas: m numbers each; the last β is the length of the vector that comes next.
    """

    def __init__(self) -> None:
        self.alphas: list[float] = []
        self.betas: list[float] = []

    def eigen(self) -> tuple[np.ndarray, np.ndarray]:
        """Ritz values, ascending, shape (m,), and their vectors in the basis, shape (m, m), in columns."""
        return eigh_tridiagonal(np.array(self.alphas), np.array(self.betas[:-1]))

    def top(self) -> tuple[float, np.ndarray, float]:
        """Largest Ritz value, its vector in the basis, and its residual norm."""
        values, vectors = self.eigen()
        return float(values[-1]), vectors[:, -1], float(abs(self.betas[-1] * vectors[-1, -1]))


Step = tuple[Tensor, Tridiagonal]


def lanczos(objective: Objective, start: Tensor, basis: list[Tensor] | None = None) -> Iterator[Step]:
    """Yield `(q_j, T_j)` for j = 1, 2, … until the Krylov space is exhausted.

    Args:
        objective: what gives the products.
        start: any nonzero vector, shape (n,); it is overwritten.
        basis: a list to fill with the basis and to orthogonalise against; None for two vectors of memory.

    Yields:
        q_j, valid until the next one is asked for, and T, which grows.
    """
    t, beta = Tridiagonal(), 0.0
    q, out = start.div_(length(start)), torch.zeros_like(start)
    while True:
        objective.add_product(q, out.mul_(-beta))
        alpha = torch.dot(q, out)
        _subtract(out, q, alpha)
        if basis is not None:
            basis.append(q.clone())
            _orthogonalize(out, basis)
        beta = length(out).item()
        t.alphas.append(alpha.item())
        t.betas.append(beta)
        yield q, t
        if beta <= _negligible(t, q.dtype) or len(t.alphas) >= objective.size:
            return
        q, out = out.div_(beta), q


def _subtract(out: Tensor, q: Tensor, alpha: Tensor) -> None:
    out.add_(q, alpha=-alpha.item())


def _orthogonalize(out: Tensor, basis: list[Tensor]) -> None:
    for _ in range(2):
        for q in basis:
            _subtract(out, q, torch.dot(q, out))


def _negligible(t: Tridiagonal, dtype: torch.dtype) -> float:
    largest = max(map(abs, (*t.alphas, *t.betas)))
    return 8 * torch.finfo(dtype).eps * largest
