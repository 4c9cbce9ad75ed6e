"""The log of a run, from wherever it is."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Log = Sequence[dict[str, Any]]
Source = str | Path | Log

_STATE = "trainer_state.json"


def history(source: Source) -> Log:
    """The entries of `trainer.state.log_history`.

    Args:
        source: the entries themselves, a `trainer_state.json`, a checkpoint, or the output folder of a run (its own
            state, or that of its last checkpoint).

    Raises:
        FileNotFoundError: if a folder holds no state.
    """
    if not isinstance(source, str | Path):
        return source
    path = Path(source)
    if path.is_dir():
        path = _state_in(path)
    return json.loads(path.read_text())["log_history"]


def series(source: Source, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of `key`, where it was logged with a number; the last entry of a step counts."""
    found = {e["step"]: float(e[key]) for e in history(source) if _is_number(e.get(key))}
    return list(found), list(found.values())


def _state_in(folder: Path) -> Path:
    if (folder / _STATE).exists():
        return folder / _STATE
    checkpoints = [p for p in folder.glob(f"checkpoint-*/{_STATE}") if p.parent.name.rsplit("-", 1)[1].isdigit()]
    if not checkpoints:
        raise FileNotFoundError(
            f"{folder}: there is no {_STATE} in it or in a checkpoint of it; call trainer.save_state(), or pass "
            "trainer.state.log_history."
        )
    return max(checkpoints, key=lambda p: int(p.parent.name.rsplit("-", 1)[1]))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
