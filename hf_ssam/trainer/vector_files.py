"""A method's vectors on disk, written by N ranks and read by M: safetensors alone, so that no file can run code.

    vectors-00001-of-00002.safetensors     what the first of two ranks holds

A rank writes its shard of each DTensor; a plain tensor, which all ranks hold alike, is written once. The header of a
file says which save it belongs to, and for each shard the shape and dtype of the whole tensor and where in it the
shard begins. A reader takes from every file what overlaps with its own shard.

`torch.distributed.checkpoint` keeps its index as a pickle, and its safetensors storage (torch 2.13) cannot write
tensors that are transposed, channels-last or share memory.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ..rules.space import local

DTYPES = {str(d): d for d in vars(torch).values() if isinstance(d, torch.dtype)}

Room = Callable[[str, tuple[int, ...], torch.dtype], Tensor]
"""`(key, shape of the whole, dtype) -> an empty tensor to read into`, a DTensor where only a shard is wanted."""


def unusable(path: Path, what: str) -> ValueError:
    """The error for a file of a checkpoint that cannot be used: its name, what is wrong, and the way out."""
    return ValueError(
        f"resume_from_checkpoint: {path} {what}; restore it, resume from another checkpoint, or start a new run."
    )


def file_name(index: int, files: int) -> str:
    """The name of file `index` (from 0) of `files`."""
    return f"vectors-{index + 1:05d}-of-{files:05d}.safetensors"


def write_vectors(path: Path, tensors: Mapping[str, Tensor], save_id: str, plain: bool) -> None:
    """Write what this rank holds of `tensors` to `path`.

    Args:
        path: the file; its folder is made.
        tensors: DTensors and plain tensors by key; of a DTensor held in several copies, the first is written.
        save_id: what the files of one save have in common.
        plain: whether this rank writes the plain tensors.
    """
    own = {k: t for k, t in tensors.items() if (_is_first_copy(t) if isinstance(t, DTensor) else plain)}
    shards = {k: {"shape": list(t.shape), "dtype": str(t.dtype), "offset": _box(t).offset} for k, t in own.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(_on_host(own), path, metadata={"save_id": save_id, "shards": json.dumps(shards)})


def read_vectors(folder: Path, files: int, save_id: str, room: Room) -> dict[str, Tensor]:
    """Read what `files` calls of `write_vectors` wrote, by key.

    Args:
        folder: where the files are.
        files: their number.
        save_id: the save that they belong to.
        room: makes the tensor that is read into; may refuse.

    Raises:
        ValueError: if a file is missing, damaged or of another save, or if the files do not hold all of a tensor.
    """
    tensors: dict[str, Tensor] = {}
    read: Counter[str] = Counter()
    for index in range(files):
        for shard in _shards(folder / file_name(index, files), save_id):
            if shard.key not in tensors:
                tensors[shard.key] = room(shard.key, shard.whole, shard.dtype)
            read[shard.key] += shard.read_into(tensors[shard.key])
    for key, tensor in tensors.items():
        if read[key] != local(tensor).numel():
            raise unusable(folder, f"holds {read[key]} of the {local(tensor).numel()} entries of `{key}`")
    return tensors


@dataclass(frozen=True)
class _Box:
    """Where a shard lies in its tensor: the index of its first entry, and its shape."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    def overlap(self, other: _Box) -> tuple[slice, ...]:
        """What `other` holds as well, as slices of this shard."""
        slices = []
        for own, size, theirs, their_size in zip(self.offset, self.shape, other.offset, other.shape, strict=True):
            start = max(own, theirs)
            stop = max(start, min(own + size, theirs + their_size))
            slices.append(slice(start - own, stop - own))
        return tuple(slices)


@dataclass(frozen=True)
class _Shard:
    """A part of the tensor `key`, in an open file."""

    file: Any
    key: str
    box: _Box
    whole: tuple[int, ...]
    dtype: torch.dtype

    def read_into(self, tensor: Tensor) -> int:
        """Copy what overlaps with this rank's part of `tensor`; the number of entries copied."""
        box = _box(tensor)
        part = local(tensor)[box.overlap(self.box)]
        if part.numel():
            mine = self.box.overlap(box)
            part.copy_(self.file.get_slice(self.key)[mine] if mine else self.file.get_tensor(self.key))
        return part.numel()


def _shards(path: Path, save_id: str) -> Iterator[_Shard]:
    """The shards of one file, which is open until the last is taken."""
    if not path.is_file():
        raise unusable(path, "is missing")
    with ExitStack() as opened:
        try:
            file = opened.enter_context(safe_open(path, "pt"))
            header = file.metadata()
            found_id, entries = header["save_id"], json.loads(header["shards"])
            shards = [_shard(file, key, entries[key]) for key in file.keys()]  # noqa: SIM118, not a mapping
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise unusable(path, f"is damaged ({type(error).__name__})") from error
        if found_id != save_id:
            raise unusable(path, f"belongs to another save ({found_id}, not {save_id})")
        yield from shards


def _shard(file: Any, key: str, entry: Mapping[str, Any]) -> _Shard:
    box = _Box(tuple(entry["offset"]), tuple(file.get_slice(key).get_shape()))
    return _Shard(file, key, box, tuple(entry["shape"]), DTYPES[entry["dtype"]])


def _box(tensor: Tensor) -> _Box:
    """What this rank holds of `tensor`."""
    if not isinstance(tensor, DTensor):
        return _Box((0,) * tensor.dim(), tuple(tensor.shape))
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return _Box(tuple(offset), tuple(shape))


def _is_first_copy(tensor: DTensor) -> bool:
    """Whether no earlier rank holds the same shard."""
    position = tensor.device_mesh.get_coordinate()
    return position is not None and not any(
        at for at, placement in zip(position, tensor.placements, strict=True) if placement.is_replicate()
    )


def _on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The local parts, row by row and sharing no memory: safetensors writes no others."""
    found: dict[str, Tensor] = {}
    taken: set[int] = set()
    for key, tensor in tensors.items():
        part = local(tensor).detach().cpu().contiguous()
        address = part.untyped_storage().data_ptr()
        found[key] = part.clone() if address in taken else part
        taken.add(address)
    return found
