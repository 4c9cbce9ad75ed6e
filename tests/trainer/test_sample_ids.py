"""Dataset indices reach the step with the samples that they belong to, whatever loads and splits the batches."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import default_data_collator

from hf_ssam.trainer.sample_ids import ID, IdCollator, IndexedDataset
from tests.support.cases import assert_identical, weights
from tests.support.sample_ids import DATA, LOADERS, ausam


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("workers", [0, 1])
def test_sample_ids_belong_to_their_rows(loader, workers):
    trainer = ausam(accelerator_config=LOADERS[loader], dataloader_num_workers=workers)
    assert len(trainer.ids) == 6, "two epochs of 8, 8 and 4"
    for ids, rows in zip(trainer.ids, trainer.rows, strict=True):
        assert torch.equal(rows, torch.stack([DATA[i]["input_ids"] for i in ids.tolist()]))
    for epoch in (trainer.ids[:3], trainer.ids[3:]):
        assert sorted(torch.cat(epoch).tolist()) == list(range(20))


def test_sample_ids_through_a_dispatcher_train_the_same_model():
    plain, dispatched = ausam(), ausam(accelerator_config={"dispatch_batches": True})
    assert_identical(weights(plain.model), weights(dispatched.model))


class Rows(Dataset):
    """A data set that gives one row at a time."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return {"x": torch.tensor(10 * index)}


class Batches(Rows):
    """One that gives a batch at once, and nothing else."""

    def __getitem__(self, index):
        raise AssertionError("asked row by row")

    def __getitems__(self, indices):
        return [{"x": torch.tensor(10 * i)} for i in indices]


@pytest.mark.parametrize("dataset", [Rows(), Batches()], ids=["rows", "batches"])
def test_sample_ids_are_added_to_a_batch_that_is_fetched_at_once(dataset):
    loader = DataLoader(IndexedDataset(dataset), batch_size=4, collate_fn=IdCollator(default_data_collator))
    batches = list(loader)
    assert [b[ID].tolist() for b in batches] == [[0, 1, 2, 3], [4, 5]]
    assert [b["x"].tolist() for b in batches] == [[0, 10, 20, 30], [40, 50]]
