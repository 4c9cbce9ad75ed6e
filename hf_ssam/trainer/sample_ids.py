"""Which sample is which: dataset indices carried through shuffling, workers and collation, for scores of samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers.trainer_utils import has_length

from .host import Host

ID = "ssam_index"
"""The column that carries them; the model never sees it."""


@dataclass
class IndexedDataset(Dataset):
    """`dataset`, with the index of each row in it."""

    dataset: Any

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.dataset[index], ID: int(index)}

    @property
    def __getitems__(self) -> Callable[[list[int]], list[dict[str, Any]]]:
        """A whole batch at once, where `dataset` gives it.

        Raises:
            AttributeError: where it does not; torch's fetcher then asks row by row.
        """
        rows_at = self.dataset.__getitems__
        return lambda indices: [{**row, ID: int(index)} for row, index in zip(rows_at(indices), indices, strict=True)]


@dataclass
class IdCollator:
    """`collator`, with the rows' indices beside what it makes of the rest.

    As a tensor: Accelerate cuts, joins and broadcasts the tensors of a batch, and nothing else.
    """

    collator: Callable[[list[dict[str, Any]]], Any]

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        ids = torch.tensor([row[ID] for row in rows])
        batch = self.collator([{n: v for n, v in row.items() if n != ID} for row in rows])
        batch[ID] = ids
        return batch


def without_ids(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A batch as the model sees it."""
    return {n: v for n, v in inputs.items() if n != ID}


def ids_of(inputs: Mapping[str, Any]) -> torch.Tensor | None:
    """Dataset indices of a batch's samples, shape (B,); None where they are not carried."""
    return inputs.get(ID)


class SampleIdMixin(Host):
    """Lets the training batches of a Trainer carry dataset indices, where the method asks for them."""

    _wraps_collator = False

    def get_train_dataloader(self) -> DataLoader:
        """As the parent's.

        Raises:
            ValueError: if the method scores samples and the data set cannot tell them apart.
        """
        if not (self.args.is_sharpness_aware and self.args.method().build().needs_ids):
            return super().get_train_dataloader()
        dataset = self.train_dataset
        if isinstance(dataset, IterableDataset) or not has_length(dataset):
            raise ValueError(
                f"optim: `{self.args.optim}` keeps a score of each sample, and an iterable train_dataset does not "
                "tell which is which; pass a data set with a length, or choose optim=esam."
            )
        self.train_dataset, self._wraps_collator = IndexedDataset(dataset), True
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset, self._wraps_collator = dataset, False

    def _get_collator_with_removed_columns(self, data_collator: Callable, description: str | None = None) -> Callable:
        collator = super()._get_collator_with_removed_columns(data_collator, description=description)
        return IdCollator(collator) if self._wraps_collator else collator
