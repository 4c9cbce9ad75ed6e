"""What a run's folder holds, read once: the card, the figures and the scripts ask here.

JSON only. `training_args.bin` is a pickle, which can run code when it is loaded; nothing here opens it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TRAINER_STATE = "trainer_state.json"
RESULTS = "all_results.json"
CURVES = Path("figures", "training_curves.png")


@dataclass(frozen=True)
class RunFolder:
    """A run, as the Trainer left it.

    Attributes:
        folder: where it is.
        log: the entries of `trainer.state.log_history`.
        steps: optimizer steps taken.
        best_step: the step of the best model, where the run looked for one.
        results: what `trainer.save_metrics` wrote; empty where it was not called.
    """

    folder: Path
    log: Sequence[dict[str, Any]]
    steps: int
    best_step: int | None
    results: Mapping[str, Any]


def read_run(source: str | Path) -> RunFolder:
    """The run in a folder: its own state, or that of its newest whole checkpoint.

    Args:
        source: the output folder of a run, a checkpoint, or a `trainer_state.json`.

    Raises:
        FileNotFoundError: if there is no state.
        ValueError: if a file is damaged.
    """
    path = Path(source)
    if not path.exists():
        raise _missing(path)
    folder = path if path.is_dir() else path.parent
    state = _newest_state(folder) if path.is_dir() else read_state(path)
    results = _read(folder / RESULTS) if (folder / RESULTS).is_file() else {}
    return RunFolder(folder, state["log_history"], state.get("global_step", 0), state.get("best_global_step"), results)


def read_state(path: str | Path) -> dict[str, Any]:
    """A `trainer_state.json`.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged.
    """
    state = _read(Path(path))
    if not isinstance(state.get("log_history"), list):
        raise _damaged(path, "it has no list `log_history`")
    return state


def is_whole(checkpoint: str | Path) -> bool:
    """Whether a checkpoint was written to its end: its state, the Trainer's last file, can be read."""
    try:
        read_state(Path(checkpoint) / TRAINER_STATE)
    except (OSError, ValueError):
        return False
    return True


def sorted_checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints in a run's folder, oldest step first, whole or not."""
    found = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in Path(folder).glob("checkpoint-*")]
    numbered = [(int(match[1]), path) for match, path in found if match and path.is_dir()]
    return [path for _, path in sorted(numbered)]


def _newest_state(folder: Path) -> dict[str, Any]:
    if (folder / TRAINER_STATE).is_file():
        return read_state(folder / TRAINER_STATE)
    whole = next((path for path in reversed(sorted_checkpoints(folder)) if is_whole(path)), None)
    if whole is None:
        raise _missing(folder)
    return read_state(whole / TRAINER_STATE)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(content, dict):
        raise _damaged(path, "it holds no JSON object")
    return content


def _missing(path: Path) -> FileNotFoundError:
    return FileNotFoundError(
        f"{path}: there is no {TRAINER_STATE} in it or in a whole checkpoint of it; call trainer.save_state() at the "
        "end of the run, or pass trainer.state.log_history."
    )


def _damaged(path: str | Path, reason: str) -> ValueError:
    return ValueError(f"{path}: the file is damaged ({reason}); remove it, or pass a whole checkpoint of the run.")
