"""Gradients taken weight by weight, so that a list of all of them, as long as the weights themselves, never exists.

`torch.autograd.grad` holds every gradient until the last one is there. A hook on each leaf sees its gradient as soon
as it is complete, takes what is wanted of it, and hands back a zero that owns no memory; the gradient is then freed
before the next one is computed. A Hessian-vector product in this manner needs the activations, the largest single
weight, and the vector it is added to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .double_backward import unsupported

Take = Callable[[int, Tensor], None]


def add_gradient(loss: Tensor, leaves: list[Tensor], parts: list[Tensor], share: float) -> None:
    """`parts ← parts + share · ∇loss`, in place; a leaf that the loss does not depend on adds zero."""
    _stream([loss], None, leaves, partial(_add, parts, share))


def add_product(
    loss: Tensor, leaves: list[Tensor], directions: list[Tensor], parts: list[Tensor], share: float
) -> None:
    """`parts ← parts + share · ∇⟨∇loss, v⟩`, in place; of `∇loss` only its place in the graph is kept.

    Raises:
        NotImplementedError: if an operation has no double backward; it is named.
    """
    _stream_product(loss, leaves, directions, partial(_add, parts, share))


def form(loss: Tensor, leaves: list[Tensor], u: list[Tensor], v: list[Tensor]) -> tuple[float, float]:
    """`⟨Hu, v⟩` and `‖Hu‖`, of which no vector is ever whole; the graph of `loss` is kept.

    Raises:
        NotImplementedError: if an operation has no double backward; it is named.
    """
    sums = [0.0, 0.0]

    def take(i: int, gradient: Tensor) -> None:
        sums[0] += _dot(gradient, v[i])
        sums[1] += torch.linalg.vector_norm(gradient).item() ** 2

    _stream_product(loss, leaves, u, take, retain_graph=True)
    return sums[0], sums[1] ** 0.5


def _dot(a: Tensor, b: Tensor) -> float:
    """Row by row where there are rows: `b` has strides that a product over all of it would first copy."""
    rows = zip(a.split(2**10), b.split(2**10), strict=True) if a.dim() else [(a, b)]
    return sum(torch.tensordot(x, y, x.dim()).item() for x, y in rows)


def _stream_product(
    loss: Tensor, leaves: list[Tensor], directions: list[Tensor], take: Take, retain_graph: bool = False
) -> None:
    """Call `take(i, part i of H v)` for every leaf that `∇⟨∇loss, v⟩` reaches."""
    edges: list[GradientEdge] = []
    outer: list[Tensor] = []

    def keep(i: int, gradient: Tensor) -> None:
        if gradient.requires_grad:
            edges.append(get_gradient_edge(gradient))
            outer.append(directions[i].to(gradient))

    try:
        _stream([loss], None, leaves, keep, create_graph=True)
        if edges:
            _stream(edges, outer, leaves, take, retain_graph=retain_graph)
    except RuntimeError as error:
        raise unsupported(error) or error from error


def _add(parts: list[Tensor], share: float, i: int, gradient: Tensor) -> None:
    parts[i].add_(gradient.to(parts[i].device), alpha=share)


def _stream(
    outputs: Sequence[Tensor] | Sequence[GradientEdge],
    outer: list[Tensor] | None,
    leaves: list[Tensor],
    take: Take,
    create_graph: bool = False,
    retain_graph: bool = False,
) -> None:
    """One backward pass that calls `take(i, gradient)` for every leaf it reaches."""

    def hook(i: int, gradient: Tensor) -> Tensor:
        take(i, gradient)
        return gradient.new_zeros(()).expand_as(gradient)

    handles = [leaf.register_hook(partial(hook, i)) for i, leaf in enumerate(leaves)]
    try:
        torch.autograd.grad(
            outputs, leaves, outer, retain_graph or create_graph, create_graph=create_graph, allow_unused=True
        )
    finally:
        for handle in handles:
            handle.remove()
