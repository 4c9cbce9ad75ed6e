"""Whether products belong to a Hessian: a double backward that is wrong makes them asymmetric.

    ⟨Hu, v⟩ = ⟨u, Hv⟩                                    for every u and v

torch's own double backward of `weight_norm` breaks this on the CPU (2.13), and so does a layer whose hand-written
backward is the derivative of no function.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .streamed import form


def refuse_asymmetry(loss: Tensor, leaves: list[Tensor]) -> None:
    """Refuse a loss whose Hessian-vector products are not symmetric beyond rounding; its graph is kept.

    Raises:
        NotImplementedError: with the share that is asymmetric.
    """
    found = asymmetry(loss, leaves)
    allowed = tolerance(leaves[0].dtype)
    if found > allowed:
        raise NotImplementedError(
            f"model: its Hessian is not symmetric (by {found:.1e} of its length; rounding allows {allowed:.0e}), so a "
            "layer has a wrong backward; replace the one that fails `torch.autograd.gradgradcheck`."
        )


def asymmetry(loss: Tensor, leaves: list[Tensor]) -> float:
    """`|⟨Hu, v⟩ − ⟨u, Hv⟩| / (‖Hu‖ + ‖Hv‖)` for two fixed random u and v; 0 where the Hessian is, NaN where it is."""
    u, v = (directions(leaves, seed) for seed in (0, 1))
    (left, left_length), (right, right_length) = form(loss, leaves, u, v), form(loss, leaves, v, u)
    scale = left_length + right_length
    return abs(left - right) / scale if scale else 0.0


def tolerance(dtype: torch.dtype) -> float:
    """What `asymmetry` may be by rounding: 2e-5 in float64 (a model may take its loss in float32), 8e-3 with TF32."""
    return torch.finfo(dtype).eps ** 0.3


def directions(leaves: list[Tensor], seed: int) -> list[Tensor]:
    """Standard normal numbers in the shape of each leaf, with next to no memory: entry (i, j) is number i + j."""
    generator = torch.Generator().manual_seed(seed)
    numbers = [torch.randn(sum(leaf.shape) + 1, generator=generator, dtype=leaf.dtype) for leaf in leaves]
    return [n.to(t.device).as_strided(t.shape, (1,) * t.dim()) for n, t in zip(numbers, leaves, strict=True)]
