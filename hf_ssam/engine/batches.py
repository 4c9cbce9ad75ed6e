"""A batch as a collator makes it, cut into its samples: how many there are, and some of them as a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Batch = Mapping[str, Any]


def batch_size(batch: Batch) -> int:
    """Number of samples in a batch: the length of its labels, or else of its first tensor (nested ones included).

    Raises:
        ValueError: if it has no tensor with a leading dimension.
    """
    for value in (batch["labels"],) if "labels" in batch else batch.values():
        if isinstance(value, Mapping):
            return batch_size(value)
        if isinstance(value, list) or (isinstance(value, Tensor) and value.dim()):
            return len(value)
    raise ValueError(f"inputs: a batch with the keys {list(batch)} holds no tensor; pass what the collator returns.")


def part_of(batch: Batch, indices: Tensor) -> dict[str, Any]:
    """The samples `indices` of a batch, shape (K,); a value that is no tensor, list or mapping is whole in each part.

    Raises:
        ValueError: if a tensor's first dimension does not run over the samples, as with images packed into one row.
    """
    return _cut(batch, indices, batch_size(batch))


def split(batch: Batch, size: int) -> list[Batch]:
    """A batch in parts of at most `size` samples; one that is no larger stays whole.

    Raises:
        ValueError: as `part_of`.
    """
    samples = torch.arange(batch_size(batch))
    return [part_of(batch, some) for some in samples.split(size)] if len(samples) > size else [batch]


def _cut(batch: Batch, indices: Tensor, size: int) -> dict[str, Any]:
    return {name: _cut_value(name, value, indices, size) for name, value in batch.items()}


def _cut_value(name: str, value: Any, indices: Tensor, size: int) -> Any:
    if isinstance(value, Mapping):
        return _cut(value, indices, size)
    by_row = isinstance(value, Tensor) and value.dim() > 0
    if not by_row and not isinstance(value, list):
        return value
    if len(value) != size:
        raise ValueError(
            f"inputs: `{name}` has {len(value)} rows where the batch has {size} samples, so it cannot be cut into "
            "samples; choose a method and an ascent_scope that use whole micro-batches, or leave out `m`."
        )
    return value[indices.to(value.device)] if by_row else [value[i] for i in indices.tolist()]
