"""A method's state in two processes: sharded by FSDP2 or replicated by DDP, read by other numbers, under faults."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_ssam.trainer.checkpoints import STATE_FILE, STATE_FOLDER, is_whole, last_whole_checkpoint, load_state
from tests.distributed.launching import Runs, torchrun
from tests.distributed.loops import alone
from tests.support.cases import assert_identical

pytestmark = pytest.mark.distributed


def test_two_ranks_write_and_one_reads(fsdp2: Runs):
    two_pass = alone()
    state = load_state(fsdp2.folder_of("states") / "two", two_pass.space.params)
    for rank in fsdp2["states"]:
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


# ------------------------------------------------------------------------------------------------------------- faults

FILES = ("vectors-00001-of-00002.safetensors", "vectors-00002-of-00002.safetensors")
WAY_OUT = "restore it, resume from another checkpoint, or start a new run"


@pytest.fixture
def saved(fsdp2: Runs, tmp_path: Path) -> Path:
    """A copy of what two ranks saved, to be spoiled."""
    shutil.copytree(fsdp2.folder_of("states") / "two", tmp_path / "two")
    assert sorted(p.name for p in (tmp_path / "two" / STATE_FOLDER).iterdir()) == [*FILES]
    return tmp_path / "two"


@pytest.mark.parametrize("file", FILES)
def test_a_missing_shard_is_named(saved: Path, file: str):
    (saved / STATE_FOLDER / file).unlink()
    with pytest.raises(ValueError, match=f"{STATE_FOLDER}/{file} is missing; {WAY_OUT}"):
        load_state(saved, alone().space.params)


@pytest.mark.parametrize("file", [*FILES, STATE_FILE])
def test_files_of_two_saves_are_named(fsdp2: Runs, saved: Path, file: str):
    """The same state saved twice: only the save tells its files from the other's."""
    place = Path(file if file == STATE_FILE else f"{STATE_FOLDER}/{file}")
    shutil.copy(fsdp2.folder_of("states") / "again" / place, saved / place)
    named = FILES[0] if file == STATE_FILE else file
    with pytest.raises(ValueError, match=f"{STATE_FOLDER}/{named} belongs to another save .*; {WAY_OUT}"):
        load_state(saved, alone().space.params)


def test_two_ranks_name_the_same_missing_shard(fsdp2: Runs):
    """Also the rank whose own shard is there: none goes on alone."""
    first, second = fsdp2["states"]
    assert first["refused"] == second["refused"]
    assert f"{FILES[1]} is missing; {WAY_OUT}" in first["refused"]


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before", "between", "after"])
def test_a_rank_that_dies_while_saving_leaves_half_a_checkpoint(tmp_path: Path, moment: str):
    """Rank 1 is killed before it writes its shard, half through it, or after; rank 0 must not write the last file."""
    done = torchrun("dying_worker.py", str(tmp_path), moment)
    assert done.returncode != 0
    half = tmp_path / "checkpoint-4"
    assert (half / STATE_FOLDER / FILES[0]).is_file(), done.stderr[-3000:]
    assert not is_whole(half)
    assert last_whole_checkpoint(tmp_path) == (tmp_path / "checkpoint-2", [half])
    assert load_state(tmp_path / "checkpoint-2", alone().space.params)["steps"] == 5


# --------------------------------------------------------------------------------------------------------- replicated


def test_vectors_that_all_ranks_hold_are_written_once(ddp: Runs):
    checkpoint = ddp.folder_of("resume/vectors") / "whole" / "checkpoint-2"
    (file,) = (checkpoint / STATE_FOLDER).iterdir()
    assert file.name == "vectors-00001-of-00001.safetensors"
    assert {key.split("/")[0] for key in load_file(file)} == {"average", "plain"}


def test_replicated_vectors_resume_bit_for_bit(ddp: Runs):
    for rank in ddp["resume/vectors"]:
        assert_identical(rank["halves"]["weights"], rank["whole"]["weights"])
        assert rank["halves"]["log"][-2] == rank["whole"]["log"][-2]
