"""Every method in two processes against one that holds the whole batch: the same weights, the same state on both."""

from __future__ import annotations

import pytest

from tests.distributed.launching import Runs
from tests.distributed.methods_worker import MASKS, SELECTING
from tests.support.cases import CASES, ONE_PASS_CASES

pytestmark = pytest.mark.distributed
WHOLE = (*CASES, *ONE_PASS_CASES, *MASKS)


FEW = ("ssam", "friendly_sam", "looksam-k=2", "stale_sam", "sparse_sam-mask=dynamic-update_freq=2")
QUICK = {f"{case}-{kind}" for case in FEW for kind in ("ddp", "views")}
QUICK |= {f"{case}-fsdp" for case in {c.method: c.id for c in reversed(WHOLE)}.values()}
"""A shard is where a method is most likely to go wrong: its first case of each."""


@pytest.mark.quick(*QUICK)
@pytest.mark.parametrize("kind", ["ddp", "views", "fsdp"])
@pytest.mark.parametrize("case", WHOLE, ids=lambda case: case.id)
def test_two_processes_hold_the_weights_of_one(methods: Runs, case, kind):
    """`views`: DDP's buckets are the gradients, which a second pass writes over. A shard draws its own noise."""
    cell = methods[f"{kind}/{case.id}"][0]
    if kind == "fsdp" and case.method == "sparse_sam" and "mask" not in case.options:
        assert (
            "mask=fisher needs the gradient of each sample, which a sharded model averages over ranks"
            in cell["refused"]
        )
        return
    assert cell["equal"]
    drawn_by_shard = case.options.get("mask") == "dynamic" or case.method == "random_perturbation"
    if not (kind == "fsdp" and drawn_by_shard):
        assert cell["gap"] < 1e-13


@pytest.mark.quick("esam-ddp", "ausam-*")
@pytest.mark.parametrize("kind", ["ddp", "views", "fsdp"])
@pytest.mark.parametrize("case", SELECTING, ids=lambda case: case.id)
def test_ranks_that_select_hold_the_same_weights_and_scores(methods: Runs, case, kind):
    assert methods[f"{kind}/{case.id}"][0]["equal"]


@pytest.mark.parametrize("case", (CASES[0], *SELECTING), ids=lambda case: case.id)
def test_ranks_that_split_layers_draw_the_same_samples(methods: Runs, case):
    """Tensor parallelism: the ranks hold one batch between them, and its samples are picked and counted once."""
    cell = methods[f"tensor/{case.id}"][0]
    assert cell["equal"]
    if case.method != "esam":  # each shard draws its own mask of coordinates
        assert cell["gap"] < 1e-13


@pytest.mark.parametrize("case", ["friendly_sam", "looksam-k=2", "sparse_sam-mask=dynamic-update_freq=2", "ausam"])
def test_sharded_state_is_read_back_bit_for_bit(methods: Runs, case):
    cell = methods[f"reload/{case}"][0]
    assert cell["same"]
    assert cell["live"] == (65 if "sparse" in case else 0)


def test_state_that_ranks_would_keep_apart_is_refused(methods: Runs):
    for case in ("friendly_sam", "ausam"):
        assert "under `rank` every rank would keep its own state" in methods[f"rank/{case}"][0]
    assert methods["rank/gsam"][0] == ""
