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
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

Batch = Mapping[str, Any]
Batches = Batch | Iterable[Batch]

IGNORED = -100


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


def rows(batch: Batch) -> int:
    """Number of rows: the leading size of the first tensor (nested ones included).

    Raises:
        ValueError: if no value is a tensor with a leading dimension.
    """
    for value in batch.values():
        if isinstance(value, Mapping):
            return rows(value)
        if isinstance(value, Tensor) and value.ndim:
            return value.shape[0]
    raise ValueError(f"batches: a batch with the keys {list(batch)} holds no tensor; pass what the collator returns.")


def count_items(model: nn.Module, batch: Batch) -> int:
    """How many items the model's mean loss runs over (see the module's docstring)."""
    labels = batch.get("shift_labels", batch.get("labels"))
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return rows(batch)
    if "shift_labels" not in batch and _shifts_labels(model):
        labels = labels[..., 1:]
    return int((labels != IGNORED).sum())


def _shifts_labels(model: nn.Module) -> bool:
    """Whether the first label of a row is no target. Some causal models (GPT-2) declare no `loss_type`; names tell."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    adapted = getattr(getattr(model, "base_model", None), "model", None)
    names = {type(model).__name__, type(adapted).__name__}
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return getattr(model, "loss_type", None) == "ForCausalLM" or not names.isdisjoint(causal)


def split_rows(batch: Batch, size: int) -> list[Batch]:
    """`batch` in shards of at most `size` rows; values without a row dimension go to every shard."""
    total = rows(batch)

    def part(value: Any, start: int) -> Any:
        if isinstance(value, Mapping):
            return {k: part(v, start) for k, v in value.items()}
        by_row = isinstance(value, Tensor) and value.ndim and value.shape[0] == total
        return value[start : start + size] if by_row else value

    return [{k: part(v, start) for k, v in batch.items()} for start in range(0, total, size)]


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
