"""Batches cut into samples, against slices by hand."""

from __future__ import annotations

import pytest
import torch
from transformers import BatchEncoding

from hf_ssam.engine.batches import batch_size, part_of, split


def batch(n: int = 5) -> dict:
    return {
        "x": torch.arange(2 * n).view(n, 2),
        "nested": {"y": torch.arange(n), "deeper": {"z": 10 * torch.arange(n)}},
        "names": [f"row {i}" for i in range(n)],
        "scalar": torch.tensor(3.0),
        "flag": True,
        "labels": torch.arange(n),
    }


def test_a_part_of_a_batch_has_its_samples_everywhere():
    part = part_of(batch(), torch.tensor([3, 1]))
    assert part["x"].tolist() == [[6, 7], [2, 3]]
    assert part["nested"]["y"].tolist() == [3, 1] and part["nested"]["deeper"]["z"].tolist() == [30, 10]
    assert part["names"] == ["row 3", "row 1"]
    assert (part["scalar"], part["flag"], part["labels"].tolist()) == (3.0, True, [3, 1])


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_split_batch_is_the_batch_in_order(size):
    parts = split(batch(), size)
    assert [batch_size(p) for p in parts] == [size] * (5 // size) + ([5 % size] if 5 % size else [])
    assert torch.equal(torch.cat([p["x"] for p in parts]), batch()["x"])
    assert sum((p["names"] for p in parts), []) == batch()["names"]


def test_a_batch_that_is_small_enough_stays_whole():
    packed = {"input_ids": torch.zeros(2, 3), "pixels": torch.zeros(7, 4)}
    assert split(packed, 2) == [packed]


@pytest.mark.parametrize(
    ("given", "size"),
    [
        ({"pixels": torch.zeros(7, 4), "labels": torch.zeros(2)}, 2),
        ({"scalar": torch.tensor(1.0), "x": torch.zeros(3, 2)}, 3),
        ({"text": {"ids": torch.zeros(4, 2)}}, 4),
        (BatchEncoding({"ids": torch.zeros(6, 2)}), 6),
        ({"x": torch.zeros(2, 2), "labels": [{"boxes": 1}, {"boxes": 2}]}, 2),
    ],
)
def test_the_size_of_a_batch_is_that_of_its_labels_or_of_its_first_tensor(given, size):
    assert batch_size(given) == size


@pytest.mark.parametrize("extra", [torch.zeros(7, 4), ["a"]])
def test_a_batch_that_is_not_made_of_samples_cannot_be_cut(extra):
    given = {"input_ids": torch.zeros(2, 3), "packed": extra}
    with pytest.raises(ValueError, match="inputs: `packed` has . rows where the batch has 2 samples"):
        part_of(given, torch.tensor([0]))
    with pytest.raises(ValueError, match="leave out `m`"):
        split(given, 1)


def test_a_batch_without_tensors_is_refused():
    with pytest.raises(ValueError, match=r"inputs: a batch with the keys \['a'\] holds no tensor"):
        batch_size({"a": 1})
