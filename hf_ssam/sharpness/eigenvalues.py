"""The largest eigenvalues of the Hessian: scipy's Lanczos where its basis fits, otherwise one of two vectors."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor, nn

from ..rules.tensors import Vector
from .arithmetic import length
from .lanczos import BASIS_ELEMENTS, lanczos
from .objective import Objective
from .probe import Batches


@dataclass(frozen=True)
class Eigenvalues:
    """What `top_eigenvalues` returns.

    Attributes:
        values: the k algebraically largest eigenvalues, largest first, in loss per squared unit of weight.
        vectors: unit eigenvectors by parameter name, one a value; empty where they were not asked for.
        converged: whether the tolerance was met; otherwise the values are lower bounds (Ritz values).
        products: Hessian-vector products used, each over all batches.
        seconds: wall time.
        parameters: number of weights n.
        precision: arithmetic of the products, and the dtype of the weights where it differs.
        solver: `scipy`, `lean` or `dense`.
    """

    values: tuple[float, ...]
    vectors: tuple[Vector, ...]
    converged: bool
    products: int
    seconds: float
    parameters: int
    precision: str
    solver: str


def top_eigenvalues(
    model: nn.Module,
    batches: Batches,
    k: int = 1,
    tol: float = 1e-3,
    *,
    max_products: int | None = None,
    vectors: bool = False,
    solver: str | None = None,
    seed: int = 0,
    **probe: Any,
) -> Eigenvalues:
    """The k largest eigenvalues of the Hessian of the loss over `batches`, without ever forming it.

    Args:
        model: any model; it is left as it was to the bit (weights, `.grad`, flags, buffers, generators).
        batches: see `Objective`.
        k: how many.
        tol: bound on the residual `‖Hx − θx‖ / |θ|` (ARPACK's own rule); the error of θ is mostly much smaller.
        max_products: at most about this many Hessian-vector products; default 10 n for `scipy` as ARPACK has it, 200
            for `lean`.
        vectors: return the eigenvectors too. `lean` then runs its recurrence a second time, in the same memory.
        solver: `scipy` (ARPACK through `eigsh`, any k), `lean` (k = 1, two vectors of n numbers), or None: `lean` for
            k = 1 where ARPACK's basis would pass `lanczos.BASIS_ELEMENTS` numbers. A handful of weights is solved
            densely.
        seed: of the start vector.
        **probe: `parameters`, `train_mode`, `loss`, `items`, `dtype`, `distributed`, `progress` of `Objective`.

    Raises:
        ValueError: for a k out of range or a solver that does not exist, and as `Objective`.
        NotImplementedError: if an operation has no double backward; it is named.
        FloatingPointError: if a product is not finite.
        RuntimeError: if ARPACK finds no k eigenvalues within `max_products`.

    Example:
        >>> sharpest = top_eigenvalues(model, batch).values[0]
        >>> five = top_eigenvalues(model, loader, k=5, parameters="lora_").values
        >>> five[0] == max(five), len(five)
        (True, 5)
    """
    objective = Objective(model, batches, **probe)
    try:
        return solve(objective, k, tol, max_products=max_products, vectors=vectors, solver=solver, seed=seed)
    finally:
        objective.close()


def solve(
    objective: Objective,
    k: int = 1,
    tol: float = 1e-3,
    *,
    max_products: int | None = None,
    vectors: bool = False,
    solver: str | None = None,
    seed: int = 0,
) -> Eigenvalues:
    """`top_eigenvalues` of an objective that is there already."""
    _check(k, objective.size, solver)
    begun, before = time.perf_counter(), objective.products
    start = functools.partial(_start, objective, seed)
    arpack = max(2 * k + 1, 20)
    if objective.size <= arpack:
        solver, found = "dense", _dense(objective, k, vectors)
    elif (solver or _fitting(k, arpack, objective.size)) == "lean":
        solver, found = "lean", _lean(objective, start, tol, max_products or 200, vectors)
    else:
        solver, found = "scipy", _scipy(objective, start(), k, tol, max_products, vectors, arpack)
    values, columns, converged = found
    named = tuple(objective.named(c.to(objective.device, objective.dtype)) for c in columns) if vectors else ()
    return Eigenvalues(
        values=tuple(map(float, values)),
        vectors=named,
        converged=converged,
        products=objective.products - before,
        seconds=time.perf_counter() - begun,
        parameters=objective.size,
        precision=objective.precision,
        solver=solver,
    )


def _start(objective: Objective, seed: int) -> Tensor:
    return objective.random(torch.Generator().manual_seed(seed))


def _check(k: int, size: int, solver: str | None) -> None:
    if not 1 <= k <= size:
        raise ValueError(f"k: {k} eigenvalues of {size} weights cannot be had; choose k from 1 to {size}.")
    if solver not in (None, "scipy", "lean"):
        raise ValueError(f"solver: there is no {solver!r}; choose 'scipy', 'lean' or None.")
    if solver == "lean" and k > 1:
        raise ValueError(f"solver: 'lean' finds the largest eigenvalue, not {k}; choose 'scipy'.")


def _fitting(k: int, arpack: int, size: int) -> str:
    return "lean" if k == 1 and (arpack + 4) * size > BASIS_ELEMENTS else "scipy"


Found = tuple[np.ndarray | list[float], list[Tensor], bool]


def _dense(objective: Objective, k: int, vectors: bool) -> Found:
    hessian = torch.stack([objective.product(e) for e in unit_vectors(objective)]).double()
    values, columns = torch.linalg.eigh((hessian + hessian.T) / 2)
    return values.flip(0)[:k].cpu().numpy(), list(columns.T.flip(0)[:k]), True


def _scipy(
    objective: Objective, start: Tensor, k: int, tol: float, max_products: int | None, vectors: bool, arpack: int
) -> Found:
    def product(v: np.ndarray) -> np.ndarray:
        vector = torch.from_numpy(np.ascontiguousarray(v, dtype=np.float64).reshape(-1))
        return objective.product(vector.to(objective.device, objective.dtype)).double().cpu().numpy()

    n = objective.size
    restarts = None if max_products is None else max(1, (max_products - arpack) // (arpack - k) + 1)
    operator = LinearOperator((n, n), matvec=product, dtype=np.float64)
    try:
        values, columns = eigsh(
            operator, k=k, which="LA", v0=start.double().cpu().numpy(), ncv=arpack, tol=tol, maxiter=restarts
        )
    except ArpackNoConvergence as error:
        raise RuntimeError(
            f"max_products: {len(error.eigenvalues)} of {k} eigenvalues met tol={tol:g} after {objective.products} "
            "products; allow more, or raise tol."
        ) from error
    order = np.argsort(values)[::-1]
    return values[order], [torch.from_numpy(columns[:, i].copy()) for i in order], True


def _lean(objective: Objective, start: Callable[[], Tensor], tol: float, max_products: int, vectors: bool) -> Found:
    value, ritz, residual = _top(objective, start(), tol, max(1, max_products // 2) if vectors else max_products)
    converged = residual <= max(tol, torch.finfo(objective.dtype).eps * 8) * abs(value)
    return [value], [_ritz_vector(objective, start(), ritz)] if vectors else [], converged


def _top(objective: Objective, start: Tensor, tol: float, steps: int) -> tuple[float, np.ndarray, float]:
    """`Tridiagonal.top` where the recurrence stops; its two vectors are freed on return."""
    for _, t in lanczos(objective, start):
        value, ritz, residual = t.top()
        if residual <= tol * abs(value) or len(t.alphas) >= steps:
            break
    return value, ritz, residual


def _ritz_vector(objective: Objective, start: Tensor, ritz: np.ndarray) -> Tensor:
    """`Σ_j y_j q_j`, the q_j made again instead of kept; the last product of the recurrence is not needed."""
    out = torch.zeros_like(start)
    for coefficient, (q, _) in zip(ritz, lanczos(objective, start), strict=False):
        out.add_(q, alpha=float(coefficient))
    return out.div_(length(out))


def unit_vectors(objective: Objective):
    """The n unit vectors, one after the other."""
    for i in range(objective.size):
        e = objective.zeros()
        e[i] = 1
        yield e
