"""A method's state by torch.distributed.checkpoint: written by two FSDP2 ranks and read by one, and the reverse."""

from __future__ import annotations

import pytest
import torch

from hf_ssam.trainer.checkpoints import load_state
from tests.distributed.launching import Runs
from tests.distributed.loops import alone
from tests.support.cases import assert_identical

pytestmark = pytest.mark.distributed


def test_two_ranks_write_and_one_reads(fsdp2: Runs):
    two_pass, ranks = alone(), fsdp2["states"]
    state = load_state(fsdp2.folder / "states" / "two", two_pass.space.params)
    for rank in ranks:
        assert state["memory"].keys() == rank["saved"]["memory"].keys()
        for slot, vector in rank["saved"]["memory"].items():
            assert_identical(state["memory"][slot], vector)
        assert state["steps"] == rank["saved"]["steps"] == 5
    two_pass.load_state_dict(state)
    assert two_pass.state_dict()["memory"]["average"]["0.weight"].shape == (7, 5)


def test_one_writes_and_two_ranks_read_their_shards(fsdp2: Runs):
    expected = alone().state_dict()
    for rank in fsdp2["states"]:
        for slot, vector in expected["memory"].items():
            assert_identical(rank["read"][slot], vector)
            assert_identical(rank["taken"]["memory"][slot], vector)
        assert set(rank["layout"].values()) == {"(Shard(dim=0),)"}
        assert rank["taken"]["steps"] == expected["steps"]


def test_the_state_of_two_ranks_is_that_of_one(fsdp2: Runs):
    expected = alone().state_dict()["memory"]["average"]
    for name, tensor in fsdp2["states"][0]["saved"]["memory"]["average"].items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=0)
