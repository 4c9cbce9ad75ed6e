"""DeepSpeed's ZeRO 0, 1 and 2 in two CPU processes over gloo, under the Trainer."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from hf_ssam.engine.zero import _refuse_features
from tests.distributed.fsdp2_worker import lora
from tests.distributed.launching import TwoProcesses
from tests.distributed.scenarios import ran, rounding, total_skipped
from tests.support.cases import (
    MAIN_CASES,
    Case,
    assert_close,
    assert_identical,
    bert,
    case_arguments,
    gpt2,
    lm_data,
    text_data,
    trained,
)

pytestmark = pytest.mark.distributed

main_cases = pytest.mark.parametrize("case", MAIN_CASES, ids=lambda c: c.id)
stages = pytest.mark.parametrize("stage", [0, 1, 2])


def assert_same_run(first: dict, second: dict) -> None:
    """Weights, master weights, optimizer state, generator and log to the bit."""
    assert_identical(first["weights"], second["weights"])
    assert_identical(dict(enumerate(first["masters"])), dict(enumerate(second["masters"])))
    assert first["optimizer"].keys() == second["optimizer"].keys()
    for index, state in second["optimizer"].items():
        assert_identical(first["optimizer"][index], state)
    assert torch.equal(first["rng"], second["rng"])
    assert [plain(e) for e in first["log"]] == [plain(e) for e in second["log"]]


def plain(entry: dict) -> dict:
    """A log entry as the stock Trainer would write it."""
    return {k: v for k, v in entry.items() if k != "total_flos" and not k.startswith("ssam/")}


@pytest.mark.quick("2-*-gpt2")
@pytest.mark.parametrize("model", ["bert", "gpt2"])
@pytest.mark.parametrize("method", ["ssam", "sam"])
@stages
def test_a_radius_of_nothing_is_the_stock_trainer(zero: TwoProcesses, stage, method, model):
    """Law 1: rho 0 in one pass, and rho 1e-30 in two, under dropout and accumulation."""
    for rank in zero[f"law1/{stage}/{model}"]:
        assert_same_run(rank[method], rank["stock"])


@pytest.mark.quick("0-ssam", "1-ssam", "2-looksam-k=2")
@pytest.mark.parametrize("case", (*MAIN_CASES, Case("momentum_sam"), Case("stale_sam")), ids=lambda c: c.id)
@stages
def test_equals_one_process_with_mean_losses(zero: TwoProcesses, stage, case):
    """Laws 4 and 5."""
    expected = ran(case, bert(0.0), text_data(), per_device_train_batch_size=8, max_steps=8)
    first, second = zero[f"mean/{stage}/{case.id}"]
    assert_identical(first["weights"], second["weights"])
    assert_close(first["weights"], expected["weights"], rounding(case))


@pytest.mark.quick("2-friendly_sam")
@main_cases
@stages
def test_equals_one_process_with_counted_losses(zero: TwoProcesses, stage, case):
    """Laws 4 and 5, with unequal padding and two micro-batches on each rank."""
    expected = ran(case, gpt2(), lm_data(60), per_device_train_batch_size=12, max_steps=8)
    first, second = zero[f"items/{stage}/{case.id}"]
    assert_identical(first["weights"], second["weights"])
    assert_close(first["weights"], expected["weights"], rounding(case))


@pytest.mark.quick("2-ausam")
@pytest.mark.parametrize("case", [Case("esam"), Case("ausam")], ids=lambda c: c.id)
@stages
def test_ranks_that_select_hold_the_same_weights(zero: TwoProcesses, stage, case):
    first, second = zero[f"selecting/{stage}/{case.id}"]
    assert_identical(first["weights"], second["weights"])
    assert all(e["ssam/perturbed_steps"] == 1 for e in first["log"] if "ssam/scale" in e)


@pytest.mark.quick("2")
@stages
def test_some_parameters_are_perturbed(zero: TwoProcesses, stage):
    given = {"perturb": "norm", "max_steps": 8}
    expected = ran(Case("ssam"), bert(0.0), text_data(), per_device_train_batch_size=8, **given)
    first, second = zero[f"norm/{stage}"]
    assert_identical(first["weights"], second["weights"])
    assert_close(first["weights"], expected["weights"])


@pytest.mark.quick("2")
@stages
def test_lora_equals_one_process(zero: TwoProcesses, stage):
    expected = ran(Case("ssam"), lora(bert(0.0)), text_data(), per_device_train_batch_size=8, max_steps=8)
    first, second = zero[f"lora/{stage}"]
    assert_identical(first["weights"], second["weights"])
    assert_close(first["weights"], expected["weights"])


@pytest.mark.quick("2-SpoiledSecondPass")
@pytest.mark.parametrize("spoiled", ["SpoiledTrainer", "SpoiledSecondPass"])
@stages
def test_one_rank_that_is_not_finite_skips_the_step_on_all(zero: TwoProcesses, stage, spoiled):
    first, second = zero[f"spoiled/{stage}/{spoiled}"]
    assert_identical(first["weights"], second["weights"])
    assert all(t.isfinite().all() for t in first["weights"].values())
    for rank in (first, second):
        assert total_skipped(rank) == 1
        assert rank["scheduled"] == 4
        assert {int(s["step"]) for s in rank["optimizer"].values()} == {4}


@pytest.mark.quick("2")
@stages
def test_an_exception_in_pass_2_leaves_the_weights(zero: TwoProcesses, stage):
    """Law 3, on the weights that the model computes with and on the master weights; the step can be taken again."""
    for rank in zero[f"broken/{stage}"]:
        (weights, masters), (left, masters_left) = rank["found"], rank["left"]
        assert_identical(weights, left)
        assert_identical(dict(enumerate(masters)), dict(enumerate(masters_left)))
        assert_identical(rank["stumbled"]["weights"], rank["smooth"]["weights"])


@pytest.mark.quick("2-friendly_sam")
@pytest.mark.parametrize("case", [Case("ssam"), Case("friendly_sam"), Case("looksam", {"k": 2})], ids=lambda c: c.id)
@stages
def test_resume_is_exact(zero: TwoProcesses, stage, case):
    """Law 8, under dropout and accumulation."""
    for rank in zero[f"resume/{stage}/{case.id}"]:
        assert_identical(rank["halves"]["weights"], rank["whole"]["weights"])
        for index, state in rank["whole"]["optimizer"].items():
            assert_identical(rank["halves"]["optimizer"][index], state)


@pytest.mark.quick("2")
@stages
def test_state_is_whole_on_every_rank(zero: TwoProcesses, stage):
    """What a partition holds a part of is saved whole, so that any number of ranks can take it up."""
    args = case_arguments(Case("friendly_sam"), per_device_train_batch_size=8, max_steps=4)
    alone = trained(bert(0.0), args, text_data()).two_pass.state_dict()["memory"]
    first, second = zero[f"state/{stage}"]
    assert first.keys() == second.keys() == alone.keys()
    for slot, expected in alone.items():
        assert_identical(first[slot], second[slot])
        assert_close(first[slot], expected)


def test_half_precision_master_weights_are_refused():
    """A perturbation would be rounded away in them; no CPU run can have them through the Trainer."""
    zero = pytest.importorskip("deepspeed.runtime.zero.stage_1_and_2")
    optimizer = object.__new__(zero.DeepSpeedZeroOptimizer)
    optimizer.cpu_offload, optimizer.low_precision_master_weights_and_grads = False, True
    engine = SimpleNamespace(
        optimizer=optimizer,
        basic_optimizer=None,
        has_moe_layers=False,
        enable_backward_allreduce=True,
        zero_optimization_stage=lambda: 2,
        autotp_size=lambda: 1,
        torch_autocast_enabled=lambda: False,
        managed_gradient_accumulation=lambda: True,
    )
    with pytest.raises(NotImplementedError, match="do not work with master weights in half precision; use ZeRO"):
        _refuse_features(engine)
    optimizer.low_precision_master_weights_and_grads = False
    _refuse_features(engine)


def test_what_does_not_work_is_refused(zero: TwoProcesses):
    """Each in one sentence with the way out, on every rank."""
    for said in zero["refused"]:
        assert said["stage"].startswith("optim=ssam does not support ZeRO stage 3") and "set stage 2" in said["stage"]
        assert said["offload"].startswith("deepspeed: two passes do not work with an offloaded optimizer; use ZeRO")
        assert said["suggest_rho"].startswith("suggest_rho: ") and "pass rho=" in said["suggest_rho"]
        for name in ("scope/0", "scope/2"):
            assert "which FSDP2 and DeepSpeed never hold; choose ascent_scope=global" in said[name]
        assert said["rows"].startswith("optim: the method looks at the rows of weights, which the partitions of ZeRO")
        assert said["samples"].startswith("deepspeed: method `sparse_sam` needs the gradients of single samples")
