"""The arithmetic of large flat vectors: lengths that keep their digits, checks that make no copies."""

from __future__ import annotations

import torch
from torch import Tensor


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
