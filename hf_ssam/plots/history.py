"""The log of a run, from wherever it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..run_folder import read_run

Log = Sequence[dict[str, Any]]
Source = str | Path | Log


def history(source: Source) -> Log:
    """The entries of `trainer.state.log_history`.

    Args:
        source: the entries themselves, a `trainer_state.json`, a checkpoint, or the output folder of a run (its own
            state, or that of its newest whole checkpoint).

    Raises:
        FileNotFoundError: if a folder holds no state.
        ValueError: if the state is damaged.
    """
    return read_run(source).log if isinstance(source, str | Path) else source


def series(source: Source, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of `key`, where it was logged with a number; the last entry of a step counts."""
    found = {e["step"]: float(e[key]) for e in history(source) if _is_number(e.get(key))}
    return list(found), list(found.values())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
