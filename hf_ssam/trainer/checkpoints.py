"""Our own part of a checkpoint, beside the Trainer's files, and what tells a whole checkpoint from half of one.

    ssam_state.json     format, method, options, ρ, counters
    ssam_state/         the method's vectors, if it keeps any, by slot and parameter name (`vector_files`)

The Trainer writes `trainer_state.json` last; all of ours is on disk before it, and what an earlier save left is taken
away before the first file of a new one. So a checkpoint with a readable one is whole.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..rules.state import PLAIN
from .step_log import PREFIX
from .vector_files import Room, file_name, read_vectors, unusable, write_vectors

FORMAT = 2
"""1 was an index of `torch.distributed.checkpoint`, a pickle; its JSON file names no format."""

STATE_FILE = "ssam_state.json"
STATE_FOLDER = "ssam_state"
TRAINER_STATE = "trainer_state.json"
_SCHEDULER = "scheduler.pt"

_FIELDS: dict[str, type | tuple[type, ...]] = {
    "method": str,
    "options": dict,
    "rho": (int, float),
    "ascent_scope": str,
    "steps": int,
    "elapsed": int,
    "total_passes": (int, float),
    "save_id": str,
    "files": int,
    "vectors": list,
}


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


def discard_earlier_save(folder: str | Path) -> None:
    """Take out of checkpoint `folder` what an earlier save left of ours, and first the proof that it was whole."""
    Path(folder, TRAINER_STATE).unlink(missing_ok=True)
    Path(folder, STATE_FILE).unlink(missing_ok=True)
    if Path(folder, STATE_FOLDER).is_dir():
        shutil.rmtree(Path(folder, STATE_FOLDER))


def save_state(
    folder: str | Path, settings: Settings, state: Mapping[str, Any], writes: bool, total_passes: float
) -> None:
    """Write the engine's state into checkpoint `folder`; every rank calls it.

    Args:
        folder: the checkpoint.
        settings: what the run is made with.
        state: from `TwoPass.state_dict`.
        writes: whether this rank writes what all ranks hold alike.
        total_passes: what the run has cost so far.
    """
    flat = flattened(state["memory"])
    sharded = any(isinstance(t, DTensor) for t in flat.values())
    files = dist.get_world_size() if sharded else int(bool(flat))
    save_id = _agreed(uuid.uuid4().hex) if sharded else uuid.uuid4().hex
    if sharded or (flat and writes):
        name = file_name(dist.get_rank() if sharded else 0, files)
        write_vectors(Path(folder, STATE_FOLDER, name), flat, save_id, writes)
    if sharded:
        dist.barrier()  # no rank may go on to the last file of the checkpoint while another still writes
    if writes:
        counters = {"steps": state["steps"], "elapsed": state["elapsed"], "total_passes": total_passes}
        where = {"save_id": save_id, "files": files, "vectors": sorted(flat)}
        content = {"format": FORMAT, **_jsonable(settings.__dict__), **counters, **where}
        _write(Path(folder, STATE_FILE), json.dumps(content, indent=2, sort_keys=True) + "\n")


def load_state(folder: str | Path, like: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Read what `save_state` wrote; None where the run was begun with a stock optimizer.

    Args:
        folder: the checkpoint.
        like: this run's parameters by name, laid out as the vectors are to be.

    Raises:
        ValueError: if a file is missing, damaged, of another save or of another format, or if a vector belongs to a
            parameter that is not in `like` or has another shape there.
    """
    path, vectors = Path(folder, STATE_FILE), Path(folder, STATE_FOLDER)
    if not path.is_file():
        if vectors.exists() or _was_perturbed(folder):
            raise unusable(path, "is missing, though the checkpoint is of a sharpness-aware run")
        return None
    content = _checked(path, _read_json(path))
    flat = read_vectors(vectors, content["files"], content["save_id"], _room(vectors, like))
    if sorted(flat) != content["vectors"]:
        raise unusable(path, f"names {len(content['vectors'])} vectors, and {vectors} holds other ones")
    memory: dict[str, dict[str, Tensor]] = {}
    for key, tensor in flat.items():
        slot, name = key.split("/", 1)
        memory.setdefault(slot, {})[name] = tensor
    return {**content, "memory": memory}


def saved_rho(folder: str | Path, method: str) -> float | None:
    """ρ that the run of checkpoint `folder` was given; None where it was not one with `method`.

    Raises:
        ValueError: if the file that says so is damaged.
    """
    path = Path(folder, STATE_FILE)
    content = _checked(path, _read_json(path)) if path.is_file() else {}
    return float(content["rho"]) if content.get("method") == method else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise unusable(path, f"is damaged ({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise unusable(path, "is damaged (no JSON object)")
    return content


def _checked(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    version = content.get("format", 1)
    if not isinstance(version, int):
        raise unusable(path, f"is damaged (`format` is {version})")
    if version != FORMAT:
        age = "an earlier" if version < FORMAT else "a later"
        raise ValueError(
            f"resume_from_checkpoint: {path} has format {version}, written by {age} version of hf_ssam, and this one "
            f"reads format {FORMAT}; resume with that version, or start a new run."
        )
    for name, kind in _FIELDS.items():
        if not isinstance(content.get(name), kind):
            raise unusable(path, f"is damaged (`{name}` is {content.get(name, 'missing')})")
    return content


def _room(vectors: Path, like: Mapping[str, Tensor]) -> Room:
    """Room for saved tensors: laid out like their parameter, or whole on the host where they belong to none."""

    def room(key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        slot, _, name = key.partition("/")
        if slot == PLAIN:
            return torch.empty(shape, dtype=dtype)
        if name in like and tuple(like[name].shape) == shape:
            return torch.empty_like(like[name], dtype=dtype)
        now = f"has with shape {tuple(like[name].shape)}" if name in like else "does not train"
        raise ValueError(
            f"resume_from_checkpoint: {vectors} holds vectors of shape {shape} for `{name}`, which this model {now}; "
            "resume with the model that the checkpoint was saved with, or start a new run."
        )

    return room


def _was_perturbed(checkpoint: str | Path) -> bool:
    """Whether the newest training entry of the log is of ours; not asked where the model alone was saved."""
    state = trainer_state(checkpoint)
    if state is None or not Path(checkpoint, _SCHEDULER).is_file():
        return False
    newest = next((entry for entry in reversed(state.log_history) if "loss" in entry), {})
    return any(name.startswith(PREFIX) for name in newest)


def flattened(memory: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Vectors by `slot/parameter`, the keys of the file."""
    return {f"{slot}/{name}": tensor for slot, vector in memory.items() for name, tensor in vector.items()}


def trainer_state(checkpoint: str | Path) -> TrainerState | None:
    """What the Trainer wrote last into `checkpoint`; None where it did not come to that."""
    try:
        return TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE))
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def is_whole(checkpoint: str | Path) -> bool:
    """Whether the Trainer finished writing `checkpoint`: its last file is there and can be read."""
    return trainer_state(checkpoint) is not None


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


def _agreed(value: str) -> str:
    """The first rank's `value`, on every rank."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def _jsonable(values: Mapping[str, Any]) -> dict[str, Any]:
    return {n: dict(v) if isinstance(v, Mapping) else v for n, v in values.items()}


def _write(path: Path, text: str) -> None:
    """Write `path` whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
