"""The weights somewhere else for the length of a pass; they come back bit for bit, whatever happens (law 3)."""

from __future__ import annotations

from types import TracebackType

import torch

from ..rules.snapshot import Snapshot
from ..rules.space import ParameterSpace
from ..rules.vectors import Vector, move, parts
from .precision import is_low_precision, survival, warn_if_lost


class Displacement:
    """`w ← w + ρ u` until the block ends: `with displacement.by(u, rho): …`.

    One object for the whole of a training run: it measures once what rounding leaves of a step, where a perturbed
    weight is in low precision.

    Args:
        space: the parameters.
        offload: keep the copy of the weights in host memory.
    """

    def __init__(self, space: ParameterSpace, offload: bool):
        self._space, self.offload = space, offload
        self._snapshot: Snapshot | None = None
        self._survival_known = False

    def by(self, u: Vector, rho: float, spent: bool = False) -> Displacement:
        """Move by `ρ u`; the tensors of a `spent` direction may be overwritten. Only inside `with` is it undone."""
        names = list(parts(u)[0])
        w = self._space.weights(names)
        self._snapshot = Snapshot(w.values(), self.offload)
        try:
            move(w, u, rho, spent and self._survival_known)
            torch.clear_autocast_cache()  # one autocast context around both passes would show the second stale casts
            self._check_survival(w, u, rho)
        except BaseException:
            self.restore()
            raise
        return self

    def __enter__(self) -> Displacement:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.restore()

    def restore(self) -> None:
        """Put the weights back, if they are not."""
        if self._snapshot is not None:
            self._snapshot.restore()
            self._snapshot = None
            torch.clear_autocast_cache()

    def _check_survival(self, w: Vector, u: Vector, rho: float) -> None:
        """Once, and only where a perturbed weight is in low precision: measure what rounding left of the step."""
        if self._survival_known or not w:
            return
        self._survival_known = True
        if is_low_precision(list(w.values())):
            lowest = max((t.dtype for t in w.values()), key=lambda dtype: torch.finfo(dtype).eps)
            warn_if_lost(survival(w, self._snapshot.copies, u, rho), lowest, rho)
