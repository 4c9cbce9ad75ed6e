"""FSDP2 in two processes: models sharded at load time under the Trainer, and `fully_shard` in a plain loop."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.fsdp2_worker import lora
from tests.distributed.launching import Runs
from tests.distributed.loops import alone
from tests.distributed.scenarios import ran, rounding, total_skipped, without
from tests.support.cases import MAIN_CASES, assert_close, assert_identical, bert, gpt2, lm_data, text_data

pytestmark = pytest.mark.distributed

main_cases = pytest.mark.parametrize("case", MAIN_CASES, ids=lambda c: c.id)


def assert_same_run(first: dict, second: dict) -> None:
    """Weights, optimizer state, generators and log to the bit."""
    assert_identical(first["weights"], second["weights"])
    assert first["optimizer"].keys() == second["optimizer"].keys()
    for index, state in second["optimizer"].items():
        assert_identical(first["optimizer"][index], state)
    assert torch.equal(first["rng"], second["rng"])
    assert [without(e, "total_flos") for e in first["log"]] == [without(e, "total_flos") for e in second["log"]]


@pytest.mark.quick("ssam", "looksam-k=2")
@main_cases
def test_equals_one_process_with_mean_losses(fsdp2: Runs, case):
    """Laws 4 and 5."""
    expected = ran(case, bert(0.0), text_data(), per_device_train_batch_size=8, max_steps=10)
    first, second = fsdp2[f"mean/{case.id}"]
    assert_identical(first["weights"], second["weights"])
    assert_close(first["weights"], expected["weights"], rounding(case))
    assert len(first["warned"]) == len(second["warned"]) == 1


@pytest.mark.quick("friendly_sam")
@main_cases
def test_equals_one_process_with_counted_losses(fsdp2: Runs, case):
    """Laws 4 and 5, with unequal padding and two micro-batches on each rank."""
    expected = ran(case, gpt2(), lm_data(60), per_device_train_batch_size=12, max_steps=10)
    first, second = fsdp2[f"items/{case.id}"]
    assert_identical(first["weights"], second["weights"])
    assert_close(first["weights"], expected["weights"], rounding(case))
    assert first["log"] == second["log"]


@pytest.mark.slow
def test_equals_one_process_over_adamw(fsdp2: Runs):
    given = {"base_optim": "adamw_torch", "max_steps": 10}
    expected = ran(MAIN_CASES[0], gpt2(), lm_data(60), per_device_train_batch_size=12, **given)
    first, second = fsdp2["adamw"]
    assert_identical(first["weights"], second["weights"])
    assert_close(first["weights"], expected["weights"], 1e-4)  # Adam magnifies the rounding of tiny gradients


@pytest.mark.quick("*-bert")
@pytest.mark.parametrize("model", ["bert", "gpt2", "lora"])
@pytest.mark.parametrize("method", ["ssam", "sam"])
def test_a_radius_of_nothing_is_the_stock_trainer(fsdp2: Runs, model, method):
    """Law 1: rho 0 in one pass, and rho 1e-30 in two."""
    for ours, stock in zip(fsdp2[f"law1/{model}/{method}"], fsdp2[f"stock/{model}"], strict=True):
        assert_same_run(ours, stock)


@pytest.mark.quick("ssam-lora_only")
@pytest.mark.parametrize("bias", ["none", "lora_only"])
@pytest.mark.parametrize("case", MAIN_CASES[:4], ids=lambda c: c.id)
def test_lora_on_a_sharded_base_equals_one_process(fsdp2: Runs, case, bias):
    """Replicated adapters beside sharded weights: frozen ones, and biases that train."""
    expected = ran(case, lora(bert(0.0), bias=bias), text_data(), per_device_train_batch_size=16, max_steps=10)
    first, second = fsdp2[f"lora/{bias}/{case.id}"]
    assert_identical(first["weights"], second["weights"])
    assert_close(first["weights"], expected["weights"])
    start = dict(lora(bert(0.0), bias=bias).named_parameters())
    moved = {n for n, p in start.items() if not torch.equal(p, first["weights"][n])}
    assert moved == {n for n, p in start.items() if p.requires_grad}


@pytest.mark.quick("SpoiledSecondPass-full")
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("spoiled", ["SpoiledTrainer", "SpoiledSecondPass"])
def test_one_rank_that_is_not_finite_skips_the_step_on_all(fsdp2: Runs, kind, spoiled):
    first, second = fsdp2[f"spoiled/{kind}/{spoiled}"]
    assert_identical(first["weights"], second["weights"])
    assert all(t.isfinite().all() for t in first["weights"].values())
    for rank in (first, second):
        assert total_skipped(rank) == 1
        assert rank["scheduled"] == 4
        assert {int(s["step"]) for s in rank["optimizer"].values()} == {4}


def test_narrow_scopes_are_refused(fsdp2: Runs):
    for rank in fsdp2["narrow_scopes"]:
        for name, said in rank.items():
            assert said.startswith(f"ascent_scope: `{name.split('/')[0]}` needs each rank's own whole gradient")
            assert "choose ascent_scope=global" in said


def test_checkpoints_to_resume_from_are_refused_by_the_stock_trainer(fsdp2: Runs):
    assert all("Resuming is not supported for models sharded at load time" in said for said in fsdp2["saving"])


def test_an_exception_in_pass_2_leaves_the_weights(fsdp2: Runs):
    """Law 3, on the parameters as the user finds them: whole, in shards again, as they were."""
    for rank in fsdp2["broken"]:
        names = rank["left"].keys()
        assert_identical(rank["left"], {n: rank["found"][n] for n in names})
        assert any(not torch.equal(rank["later"][n], rank["left"][n]) for n in names)


@pytest.mark.parametrize("wrapped", [False, True], ids=["fully_shard", "ddp"])
@pytest.mark.parametrize("method", ["ssam", "usam", "asam", "friendly_sam"])
def test_plain_loops_equal_one_process(fsdp2: Runs, method, wrapped):
    """Layers of odd sizes, of which some rank holds nothing; a list of micro-batches."""
    two_pass = alone(method)
    for rank in fsdp2["plain"]:
        result = rank[method, wrapped]
        assert_close(result["weights"], {n: p.detach() for n, p in two_pass.space.params.items()}, 1e-5)
        assert result["state"]["steps"] == 5
    assert_identical(*(rank[method, wrapped]["weights"] for rank in fsdp2["plain"]))


@pytest.mark.parametrize("call", [5, 6, 7])
def test_a_broken_off_step_can_be_begun_again(fsdp2: Runs, call):
    """What it had gathered and accumulated must be gone: micro-batch 2 of pass 1, and both of pass 2."""
    for rank in fsdp2["plain"]:
        assert_identical(rank["broken", call], rank["ssam", False]["weights"])
