"""The edge of stability: how large the top Hessian eigenvalue λ can grow before a step along its eigenvector diverges.

Along that eigenvector a quadratic loss has gradient `λx`, and one step of full-batch gradient descent with learning
rate η makes of x

    GD      x (1 − ηλ)                          λ* = 2/η
    USAM    x (1 − ηλ(1 + ρλ))                  ηλ*(1 + ρλ*) = 2,  λ* = (√(1 + 8ρ/η) − 1) / 2ρ
    SAM     the same with ρ → ρ/‖g‖             λ* = (‖g‖/2ρ) (√(1 + 8ρ/(η‖g‖)) − 1)
    SSAM    the same with η → γη                γηλ*(1 + ρλ*) = 2;   2/η where g lies along the eigenvector

and the iteration is stable while the factor stays above −1. The SAM edge is that of Agarwala & Dauphin 2023 (arXiv
2302.08692) and Long & Bartlett 2024 (arXiv 2309.12488), read in the latter's code (`sam_edge`); that of USAM is
derived here and believed to be the former's. SSAM's is derived here: its γ = ‖g‖/‖ĝ‖ is `1/(1 + ρλ)` where g lies
along the top eigenvector, which cancels the ascent, and nearer 1 the more of g lies elsewhere. All hold for gradient
descent without momentum, and for Adam not at all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_METHODS = ("sgd", "usam", "sam", "ssam")


@dataclass(frozen=True)
class Edges:
    """What `edge_of_stability` returns: predicted plateaus of the top eigenvalue, in its units.

    Attributes:
        gd: `2/η`.
        usam: edge of the unnormalised ascent `e = ρg`.
        sam: edge of the normalised ascent `e = ρg/‖g‖`; None where ρ > 0 and no `grad_norm` is given.
        ssam: edge of SSAM's renormalised descent; `2/η` without `scale`.
        edge: that of `method`.
        lr, rho, grad_norm, scale, method, normalize: what they were predicted from.
    """

    gd: float
    usam: float
    sam: float | None
    ssam: float
    edge: float
    lr: float
    rho: float
    grad_norm: float | None
    scale: float | None
    method: str
    normalize: bool

    def stability(self, eigenvalue: float) -> float:
        """`γηλ(1 + ρ'λ)`: above 2 the step overshoots; ρ' is ρ, or ρ/‖g‖ where the ascent is normalised."""
        return self.lr * self._amplified(eigenvalue)

    def max_lr(self, eigenvalue: float) -> float:
        """Largest learning rate that is stable at `eigenvalue`; infinite where the curvature is not positive."""
        return 2 / self._amplified(eigenvalue) if eigenvalue > 0 else math.inf

    def _amplified(self, eigenvalue: float) -> float:
        factor = self.scale if self.method == "ssam" else 1.0
        if self.method == "sgd" or factor is None:
            return eigenvalue
        radius = _radius(self.rho, self.grad_norm, self.normalize)
        return factor * eigenvalue * (1 + radius * eigenvalue)


def edge_of_stability(
    lr: float,
    rho: float,
    grad_norm: float | None = None,
    method: str = "ssam",
    *,
    scale: float | None = None,
    normalize: bool = True,
) -> Edges:
    """Where the top eigenvalue is predicted to stop growing, for all forms and for `method`.

    Args:
        lr: learning rate η > 0.
        rho: radius ρ ≥ 0.
        grad_norm: ‖g‖ on the batch that λ is measured on; the normalised ascent needs it.
        method: `sgd`, `usam`, `sam` or `ssam`.
        scale: SSAM's factor γ as it was measured (`ssam/scale` in the log); None for its limit `2/η`.
        normalize: whether SSAM's ascent is normalised, as its option of that name says.

    Returns:
        `Edges`, with `.max_lr(λ)` and `.stability(λ)` for a measured λ.

    Raises:
        ValueError: for a learning rate or radius out of range, a method without a known edge, or `sam` (and `ssam`
            with `scale` and `normalize`) without `grad_norm`.

    Example:
        >>> edge_of_stability(lr=0.1, rho=0.05, method="usam").edge
        12.36...
    """
    _check(lr, rho, grad_norm, method, scale, normalize)
    normalize = normalize and method not in ("sgd", "usam")
    sam = None if grad_norm is None and rho > 0 else _edge(lr, _radius(rho, grad_norm, True))
    usam = _edge(lr, rho)
    ssam = 2 / lr if scale is None else _edge(lr * scale, _radius(rho, grad_norm, normalize))
    edge = sam if method == "sam" else {"sgd": 2 / lr, "usam": usam, "ssam": ssam}[method]
    assert edge is not None  # `_check` has asked for the norm that it needs
    return Edges(2 / lr, usam, sam, ssam, edge, lr, rho, grad_norm, scale, method, normalize)


def _edge(lr: float, rho: float) -> float:
    """The positive root of `ηλ(1 + ρλ) = 2`, written so that ρ → 0 loses no digits."""
    if lr == 0 or math.isinf(rho):
        return math.inf if lr == 0 else 0.0
    return 4 / (lr * (1 + math.sqrt(1 + 8 * rho / lr)))


def _radius(rho: float, grad_norm: float | None, normalize: bool) -> float:
    if not normalize or rho == 0:
        return rho
    return rho / grad_norm if grad_norm else math.inf


def _check(lr: float, rho: float, grad_norm: float | None, method: str, scale: float | None, normalize: bool) -> None:
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"lr: {lr} is not allowed; choose a finite number above 0.")
    if not (math.isfinite(rho) and rho >= 0):
        raise ValueError(f"rho: {rho} is not allowed; choose a finite number from 0.")
    if method not in _METHODS:
        raise ValueError(f"method: no edge is known for {method!r}; choose one of {', '.join(_METHODS)}.")
    needed = method == "sam" or (method == "ssam" and scale is not None and normalize)
    if needed and rho > 0 and grad_norm is None:
        raise ValueError(f"grad_norm: the edge of {method!r} depends on ‖g‖; pass the measured gradient norm.")
