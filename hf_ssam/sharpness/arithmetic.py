"""The arithmetic of large flat vectors: sums in place, lengths that keep their digits, no copies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from .double_backward import unsupported


def loss_product(loss: Tensor, leaves: list[Tensor], directions: list[Tensor]) -> list[Tensor | None]:
    """`∇⟨∇loss, v⟩`; the gradient's values are freed before the second backward, which needs its edges only."""
    try:
        grads = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
        kept = [i for i, g in enumerate(grads) if g is not None and g.requires_grad]
        if not kept:
            return [None] * len(leaves)
        edges = [get_gradient_edge(grads[i]) for i in kept]
        outer = [directions[i].to(grads[i]) for i in kept]
        del grads
        return list(torch.autograd.grad(edges, leaves, outer, allow_unused=True))
    except RuntimeError as error:
        raise unsupported(error) or error from error


def accumulate(parts: list[Tensor], tensors: Sequence[Tensor | None], share: float) -> None:
    """`parts ← parts + share · tensors`, in place; None counts as zero."""
    for part, tensor in zip(parts, tensors, strict=True):
        if tensor is not None:
            part.add_(tensor.to(part.device), alpha=share)


def length(vector: Tensor) -> Tensor:
    """`‖v‖`, shape (). On the CPU torch adds float32 squares up one by one, which loses 4e-4 of 1e7; so, in pieces."""
    pieces = torch._foreach_norm(list(vector.split(2**16)))
    return torch.linalg.vector_norm(torch.stack(pieces).double()).to(vector.dtype)


def finite(tensor: Tensor, what: str) -> Tensor:
    """`tensor`.

    Raises:
        FloatingPointError: if an entry is not finite; it names `what`.
    """
    # isfinite() of the tensor itself would make copies of it; its largest magnitude is NaN where any entry is.
    if not torch.isfinite(torch.linalg.vector_norm(tensor, float("inf"))):
        raise FloatingPointError(
            f"batches: {what} is not finite; look for NaN in the weights and batches, or pass dtype=torch.float64."
        )
    return tensor
