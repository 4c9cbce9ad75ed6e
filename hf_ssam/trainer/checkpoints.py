"""Our own part of a checkpoint, beside the Trainer's files, and what tells a whole checkpoint from half of one.

    ssam_state.json     method, options, ρ, counters
    ssam_state/         the method's vectors, if it keeps any, by slot and parameter name: a
                        torch.distributed.checkpoint, so that a state saved by N ranks is read by M

The Trainer writes `trainer_state.json` last; both of ours are on disk before it, so a checkpoint with a readable one
is whole.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..rules.state import PLAIN

STATE_FILE = "ssam_state.json"
STATE_FOLDER = "ssam_state"
TRAINER_STATE = "trainer_state.json"


@dataclass(frozen=True)
class Settings:
    """What a run was made with, as far as the engine goes; compared on resume."""

    method: str
    options: Mapping[str, Any]
    rho: float
    ascent_scope: str

    def differences(self, saved: Mapping[str, Any]) -> list[str]:
        """One phrase for each setting that `saved` has otherwise."""
        own = _jsonable(self.__dict__)
        return [f"{n} was {saved[n]}, now {own[n]}" for n in own if saved.get(n) != own[n]]


def save_state(
    folder: str | Path, settings: Settings, state: Mapping[str, Any], writes: bool, total_passes: float
) -> None:
    """Write the engine's state into checkpoint `folder`; every rank calls it.

    Args:
        folder: the checkpoint.
        settings: what the run is made with.
        state: from `TwoPass.state_dict`.
        writes: whether this rank writes the JSON file.
        total_passes: what the run has cost so far.
    """
    flat = flattened(state["memory"])
    if flat:
        dcp.save(flat, checkpoint_id=Path(folder) / STATE_FOLDER, no_dist=not torch.distributed.is_initialized())
    if writes:
        content = {
            **_jsonable(settings.__dict__),
            "steps": state["steps"],
            "elapsed": state["elapsed"],
            "total_passes": total_passes,
            "vectors": sorted(flat),
        }
        _write(Path(folder) / STATE_FILE, json.dumps(content, indent=2, sort_keys=True) + "\n")


def load_state(folder: str | Path, like: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Read what `save_state` wrote; None where the run was begun with a stock optimizer.

    Args:
        folder: the checkpoint.
        like: this run's parameters by name, laid out as the vectors are to be.

    Raises:
        ValueError: if a vector belongs to a parameter that is not in `like`, or the vectors are missing.
    """
    path = Path(folder) / STATE_FILE
    if not path.is_file():
        return None
    content = json.loads(path.read_text())
    memory = _read_vectors(Path(folder), content["vectors"], like)
    return {**content, "memory": memory}


def _read_vectors(folder: Path, keys: list[str], like: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    named = [key.split("/", 1) for key in keys]
    unknown = [name for slot, name in named if slot != PLAIN and name not in like]
    if unknown:
        raise ValueError(
            f"resume_from_checkpoint: {folder / STATE_FOLDER} holds vectors for `{unknown[0]}`, which this model does "
            "not train; resume with the model that the checkpoint was saved with, or start a new run."
        )
    if not keys:
        return {}
    metadata = dcp.FileSystemReader(folder / STATE_FOLDER).read_metadata().state_dict_metadata
    flat = {f"{s}/{n}": _empty(metadata[f"{s}/{n}"], None if s == PLAIN else like[n]) for s, n in named}
    dcp.load(flat, checkpoint_id=folder / STATE_FOLDER, no_dist=not torch.distributed.is_initialized())
    memory: dict[str, dict[str, Tensor]] = {}
    for slot, name in named:
        memory.setdefault(slot, {})[name] = flat[f"{slot}/{name}"]
    return memory


def _empty(saved: Any, like: Tensor | None) -> Tensor:
    """Room for a saved tensor: laid out like its parameter, or whole on the host where it belongs to none."""
    dtype = saved.properties.dtype
    return torch.empty(saved.size, dtype=dtype) if like is None else torch.empty_like(like, dtype=dtype)


def flattened(memory: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Vectors by `slot/parameter`, the keys of the file."""
    return {f"{slot}/{name}": tensor for slot, vector in memory.items() for name, tensor in vector.items()}


def is_whole(checkpoint: str | Path) -> bool:
    """Whether the Trainer finished writing `checkpoint`: its last file is there and can be read."""
    try:
        TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE))
    except (OSError, ValueError, TypeError):
        return False
    return True


def sorted_checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoints in `output_dir`, oldest step first, whole or not."""
    found = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    numbered = [(int(m.group(1)), p) for p in found if p.is_dir() and (m := re.search(r"-(\d+)$", p.name))]
    return [p for _, p in sorted(numbered)]


def last_whole_checkpoint(output_dir: str | Path) -> tuple[Path | None, list[Path]]:
    """The newest whole checkpoint, and the half-written ones that are newer."""
    broken: list[Path] = []
    for checkpoint in reversed(sorted_checkpoints(output_dir)):
        if is_whole(checkpoint):
            return checkpoint, broken
        broken.append(checkpoint)
    return None, broken


def _jsonable(values: Mapping[str, Any]) -> dict[str, Any]:
    return {n: dict(v) if isinstance(v, Mapping) else v for n, v in values.items()}


def _write(path: Path, text: str) -> None:
    """Write `path` whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)
