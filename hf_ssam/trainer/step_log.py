"""What the steps did, in the Trainer's own log entries.

A `StepLog` adds up step reports on the device and is read back once per log entry, which the Trainer waits for anyway.
What it gives is merged into the entry that carries the training loss, so the progress bar, `trainer_state.json` and
every `report_to` show it without a line of ours.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..engine.report import StepReport

FIELDS = ("loss", "ascent_loss", "grad_norm", "ascent_grad_norm", "perturbation_norm", "scale", "passes", "forwards")
PREFIX = "ssam/"


class StepLog:
    """Sums of step reports since the last log entry.

    Averages run over the steps in which the field existed and that were not skipped, and are left out where there is
    no such step, as `rho` is, the mean radius of the perturbed steps; `perturbed_steps` and `skipped_steps` count, and
    `total_passes` is what the run has cost so far in passes over a batch.
    """

    def __init__(self, total_passes: float = 0.0):
        self.total_passes = total_passes
        self._start()

    def _start(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        self._steps = 0
        self._perturbed = 0
        self._rho = 0.0
        self._skipped: Tensor | float = 0.0

    def add(self, report: StepReport, rho: float = 0.0) -> None:
        """Take the report of a step with radius `rho`, without reading it."""
        kept = ~report.skipped
        for name in FIELDS:
            value = getattr(report, name)
            if value is not None:
                value = value.to(kept.device, torch.float32) if isinstance(value, Tensor) else float(value)
                self._sums[name] = self._sums.get(name, 0.0) + torch.where(kept, value, 0.0)
                self._counts[name] = self._counts.get(name, 0.0) + kept.float()
        self._steps += 1
        perturbed = report.perturbation_norm is not None
        self._perturbed += perturbed
        self._rho += rho * perturbed
        self._skipped = self._skipped + report.skipped.float()
        self.total_passes += report.passes

    def drain(self, mean_over_ranks: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The entry's `ssam/…` values; starts anew.

        Args:
            mean_over_ranks: averages a tensor over the ranks; all ranks come here at the same step.
        """
        if not self._steps:
            return {}
        skips = torch.as_tensor(self._skipped)
        zero = torch.zeros((), device=skips.device)
        columns = [*(self._sums.get(n, zero) for n in FIELDS), *(self._counts.get(n, zero) for n in FIELDS)]
        *values, skipped = mean_over_ranks(torch.stack([*columns, skips])).tolist()
        pairs = zip(FIELDS, values[: len(FIELDS)], values[len(FIELDS) :], strict=True)
        entry = {PREFIX + name: total / count for name, total, count in pairs if count}
        if self._perturbed:
            entry[PREFIX + "rho"] = self._rho / self._perturbed
        entry[PREFIX + "perturbed_steps"] = self._perturbed
        entry[PREFIX + "skipped_steps"] = round(skipped)
        entry[PREFIX + "total_passes"] = self.total_passes
        self._start()
        return entry
