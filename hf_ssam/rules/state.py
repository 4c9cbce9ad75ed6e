"""What a method keeps between steps: vectors by slot and parameter name, accepted once a step is known to be finite.

    begin     remember what there is
    stage     a rule leaves something for the next step
    commit    the engine accepts it where the step was finite, and keeps the old elsewhere
    drop      a step that died: forget what was staged and what was committed since `begin`

On a GPU the decision stays on the device (law 7).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from . import tensors as tensors_
from .space import ParameterSpace
from .tensors import Vector, read

PLAIN = "plain"
"""The slot of tensors that belong to no parameter (flags, scores of samples), the same on every rank."""


class MethodState:
    """The vectors a method keeps between steps, by slot and parameter name.

    Rules read what earlier steps committed and stage what this step leaves, so an overflow leaves the method's state
    untouched. Where each micro-batch ascends by itself, each commits, and `end` takes all of it back if any was not
    finite.

    Attributes:
        slots: what the last finite step left.
    """

    def __init__(self) -> None:
        self.slots: dict[str, Vector] = {}
        self._staged: dict[str, Vector] = {}
        self._staged_rows: dict[str, tuple[Tensor, Tensor]] = {}
        self._before: dict[str, Vector] = {}
        self._rows_before: list[tuple[str, Tensor, Tensor]] = []

    def begin(self) -> None:
        """Remember what the last step left, to go back to."""
        self._before = dict(self.slots)
        self._rows_before = []

    def read(self, slot: str) -> Vector:
        """What the last finite step left in `slot`; empty before the first."""
        return self.slots.get(slot, {})

    def stage(self, slot: str, v: Vector) -> None:
        """Leave `v` for the next step: tensors of the caller's own, since a gradient's storage is written to again."""
        self._staged[slot] = dict(v)
        filled = {f"{slot}.filled": torch.ones((), dtype=torch.bool, device=t.device) for t in list(v.values())[:1]}
        self.stage_plain(filled)

    def stage_plain(self, tensors: Vector) -> None:
        """Leave tensors that belong to no parameter, by name, for the next step."""
        self._staged[PLAIN] = {**self._staged.get(PLAIN, {}), **tensors}

    def stage_rows(self, name: str, rows: Tensor, values: Tensor) -> None:
        """Leave `values`, shape (K,), in the entries `rows` of a plain tensor that is there; the others stay."""
        self._staged_rows[name] = (rows, values)

    def plain(self, name: str) -> Tensor | None:
        """The tensor that the last finite step left under `name`; None before the first."""
        return self.slots.get(PLAIN, {}).get(name)

    def filled(self, slot: str) -> Tensor:
        """1 where a finite step has filled `slot`, else 0, shape (): until one has, what it holds is zeros (law 7)."""
        known = self.slots[PLAIN][f"{slot}.filled"]
        return known.to(torch.float64 if known.device.type in tensors_.HOST else torch.float32)

    def commit(self, finite: Tensor) -> None:
        """Accept what was staged where `finite` (bool, shape ()) holds; elsewhere keep what was there (or zeros)."""
        for slot, v in self._staged.items():
            old = self.slots.get(slot, {})
            self.slots[slot] = {**old, **_chosen(finite, v, old)}
        for name, (rows, values) in self._staged_rows.items():
            table = self.slots[PLAIN][name]
            before = table[rows]
            self._rows_before.append((name, rows, before))
            table[rows] = torch.where(finite.to(table.device), values.to(table.dtype), before)
        self._staged.clear()
        self._staged_rows.clear()

    def end(self, finite: Tensor, commits: int) -> None:
        """Close a step; of several commits, take back all where `finite` (bool, shape ()) does not hold."""
        if commits > 1:
            for name, rows, old in reversed(self._rows_before):
                table = self.slots[PLAIN][name]
                table[rows] = torch.where(finite.to(table.device), table[rows], old)
            self.slots = {slot: _chosen(finite, v, self._before.get(slot, {})) for slot, v in self.slots.items()}
        self._before, self._rows_before = {}, []

    def drop(self) -> None:
        """Forget what was staged and what was committed since `begin`: the step did not happen."""
        self._staged.clear()
        self._staged_rows.clear()
        for name, rows, old in reversed(self._rows_before):
            self.slots[PLAIN][name][rows] = old
        self.slots, self._rows_before = dict(self._before), []

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that it holds on to."""
        return (t for kept in (self.slots, self._staged, self._before) for v in kept.values() for t in v.values())

    def to_state(self, space: ParameterSpace) -> dict[str, dict[str, Any]]:
        """A copy of every slot, its vectors sharded as the parameters of `space` are."""
        return {
            slot: {n: t.clone() if slot == PLAIN else space.globalized(n, t.clone()) for n, t in v.items()}
            for slot, v in self.slots.items()
        }

    def take_up(self, state: Mapping[str, Mapping[str, Any]], space: ParameterSpace) -> None:
        """The inverse of `to_state`.

        Raises:
            ValueError: if a vector belongs to a parameter that `space` does not have.
        """
        unknown = sorted({n for slot, v in state.items() if slot != PLAIN for n in v} - set(space.params))
        if unknown:
            raise ValueError(
                f"state: it holds vectors for `{unknown[0]}` and {len(unknown) - 1} more that this model does not "
                "train; resume with the model that the state was saved with, or start a new run."
            )
        for name, t in (item for slot, v in state.items() if slot != PLAIN for item in v.items()):
            if t.shape != space.params[name].shape:
                raise ValueError(
                    f"state: its vector for `{name}` has shape {tuple(t.shape)} and the parameter "
                    f"{tuple(space.params[name].shape)}; resume with the model that the state was saved with, or "
                    "start a new run."
                )
        self.slots = {
            slot: {n: t.to(space.device, copy=True) if slot == PLAIN else space.localized(n, t) for n, t in v.items()}
            for slot, v in state.items()
        }


def _chosen(finite: Tensor, new: Vector, old: Vector) -> Vector:
    known = read(finite)
    if not isinstance(known, Tensor):
        return new if known else {n: old.get(n, torch.zeros_like(t)) for n, t in new.items()}
    return {n: torch.where(finite.to(t.device), t, old.get(n, torch.zeros_like(t))) for n, t in new.items()}
