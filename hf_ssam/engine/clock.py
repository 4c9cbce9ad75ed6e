"""Where a run is: one clock, which the host sets and every rule reads."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Clock:
    """Where a run is.

    Attributes:
        steps: how many steps the method has been at work in, ρ above 0.
        elapsed: how many steps there have been in all.
        total: length of the run; None where it is not known.
        lr: learning rate of the step; 0 where the host did not say.
    """

    steps: int = 0
    elapsed: int = 0
    total: int | None = None
    lr: float = 0.0

    @property
    def progress(self) -> float:
        """Share of the run that is over, from 0 to 1; 0 where its length is not known."""
        return min(1.0, self.elapsed / self.total) if self.total else 0.0
