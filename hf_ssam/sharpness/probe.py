"""What a probe batch is: dictionaries as a collator makes them, and how much each weighs in the mean.

Losses of Transformers are means over items, and batches differ in their number of items, so the loss over several
batches is `Σ n_b L_b / Σ n_b`; a mean of means would be a different function with a different Hessian. An item is what
the model's own loss divides by: a label that is not -100 (for a causal language model, of the shifted labels), or a
row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.batches import Batch, batch_size
from ..engine.labels import count_labels

Batches = Batch | Iterable[Batch]


def as_batches(batches: Batches) -> Iterable[Batch]:
    """`batches` as something to iterate over again and again.

    Raises:
        ValueError: for an iterator, which a second product would find empty.
    """
    if isinstance(batches, Mapping):
        return [batches]
    if isinstance(batches, Iterator):
        raise ValueError(
            f"batches: a {type(batches).__name__} can be read only once and every Hessian-vector product reads all; "
            "pass a list or a DataLoader."
        )
    return batches


def count_items(model: nn.Module, batch: Batch) -> int:
    """How many items the model's mean loss runs over (see the module's docstring)."""
    labels = batch.get("shift_labels", batch.get("labels"))
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return batch_size(batch)
    return int(count_labels(model, batch))


def moved(batch: Batch, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """A new dictionary, its tensors on `device` and the floating ones in `dtype`; what was given stays as it is."""

    def move(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: move(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(map(move, value))
        if isinstance(value, Tensor):
            return value.to(device, dtype) if value.is_floating_point() else value.to(device)
        return value

    return {k: move(v) for k, v in batch.items()}
