"""Which samples: rules that pick the part of a batch that a pass runs on.

    ESAM    pass 1 on B, pass 2 on the γ|B| samples whose loss rises most at w + e     (Du et al. 2022, 2110.03141)
    AUSAM   both passes on α|B| samples, drawn by how much theirs have risen so far    (Deng et al. 2024, 2406.08001)

They select within each micro-batch, and compare losses only between forwards of the same samples under the same
dropout.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .state import MethodState


@dataclass(frozen=True)
class Draw:
    """What a choice before the first pass may depend on.

    Attributes:
        ids: dataset indices of the micro-batch's samples, shape (B,), on the model's device.
        state: what the method keeps between steps.
        step: how many steps the method has been at work in before this one.
        position: the micro-batch's place in the step, over all ranks.
    """

    ids: Tensor
    state: MethodState
    step: int
    position: int


@dataclass(frozen=True)
class Selection:
    """What a method picks, and what it learns from the losses; a part that is None does not happen.

    Attributes:
        before: `draw -> indices` of both passes, shape (K,), ascending.
        between: `(losses at w, losses at w + e) -> indices` of the second pass.
        learn: `(ids, rises, state, size of the data set)` of all ranks' samples, after the second pass.
        scores: names of the plain tensors, one number a sample of the data set, that it keeps in the state.
    """

    before: Callable[[Draw], Tensor] | None = None
    between: Callable[[Tensor, Tensor], Tensor] | None = None
    learn: Callable[[Tensor, Tensor, MethodState, int], None] | None = None
    scores: tuple[str, ...] = ()


def kept(share: float, size: int) -> int:
    """`⌈share · size⌉`, how many samples a share keeps: at least one.

    Rounded to nine digits before: 0.07 · 100 is 7.000000000000001 in floating point, which is not eight samples.
    """
    return max(1, math.ceil(round(share * size, 9)))
