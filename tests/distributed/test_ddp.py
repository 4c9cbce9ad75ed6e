"""DistributedDataParallel in two processes: laws 1, 4, 5, 6 and 8 in every scope."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from hf_ssam import TwoPass
from tests.distributed.launching import Runs
from tests.distributed.loops import narrow, own_batches, squared
from tests.distributed.references import trained
from tests.distributed.scenarios import SCOPES, base_optimizers, ran, rounding, total_skipped, without, works
from tests.support.cases import CASES, MAIN_CASES, Case, assert_close, assert_identical, bert, gpt2, lm_data, text_data
from tests.support.reference import REFERENCES, flat
from tests.support.sample_ids import DATA, LOADERS

pytestmark = pytest.mark.distributed

working = [
    pytest.param(scope, case, id=f"{scope}-{case.id}") for scope in SCOPES for case in CASES if works(case, scope)
]
scopes = pytest.mark.parametrize("scope", SCOPES)
main_cases = pytest.mark.parametrize("case", MAIN_CASES, ids=lambda c: c.id)


@pytest.mark.quick("*-ssam", "global-friendly_sam", "global-looksam-k=2")
@pytest.mark.parametrize(("scope", "case"), [p for p in working if p.values[1] in MAIN_CASES])
def test_ranks_hold_the_same_bits_after_20_steps(ddp: Runs, scope, case):
    """Law 5, with dropout."""
    for optim in base_optimizers(case):
        first, second = ddp[f"equal/{scope}/{case.id}/{optim}"]
        assert_identical(first["weights"], second["weights"])
        assert first["scheduled"] == 20
        assert not torch.equal(first["weights"]["classifier.weight"], bert().classifier.weight)


@pytest.mark.few_methods
@main_cases
def test_global_scope_equals_one_process_with_mean_losses(ddp: Runs, case):
    """Law 4; the loss ignores the count, which both runs are told."""
    alone = ran(case, bert(0.0), text_data(), per_device_train_batch_size=8, max_steps=10)
    for rank in ddp[f"mean/{case.id}"]:
        assert_close(rank["weights"], alone["weights"], rounding(case))
        assert len(rank["warned"]) == 1
    assert alone["warned"] == []


@pytest.mark.few_methods
@main_cases
def test_global_scope_equals_one_process_with_counted_losses(ddp: Runs, case):
    """Law 4, with unequal padding and two micro-batches on each rank."""
    alone = ran(case, gpt2(), lm_data(60), per_device_train_batch_size=12, max_steps=10)
    for rank in ddp[f"items/{case.id}"]:
        assert_close(rank["weights"], alone["weights"], rounding(case))
        assert rank["warned"] == []
        for entry, single in zip(rank["log"], alone["log"], strict=True):
            assert entry["ssam/grad_norm" if "loss" in entry else "ssam/total_passes"] == pytest.approx(
                single["ssam/grad_norm" if "loss" in entry else "ssam/total_passes"], abs=1e-5
            )


@pytest.mark.quick("sam-bert-*", "ssam-gpt2-global")
@scopes
@pytest.mark.parametrize("model", ["bert", "gpt2"])
@pytest.mark.parametrize("method", ["ssam", "sam"])
def test_a_radius_of_nothing_is_the_stock_trainer(ddp: Runs, model, method, scope):
    """Law 1: rho 0 in one pass, and rho 1e-30 in two, to the bit on every rank."""
    for stock, ours in zip(ddp[f"stock/{model}"], ddp[f"law1/{model}/{method}/{scope}"], strict=True):
        assert_identical(ours["weights"], stock["weights"])
        assert ours["optimizer"].keys() == stock["optimizer"].keys()
        for index, state in stock["optimizer"].items():
            assert_identical(ours["optimizer"][index], state)
        assert torch.equal(ours["rng"], stock["rng"])
        assert [without(e, "total_flos") for e in ours["log"]] == [without(e, "total_flos") for e in stock["log"]]


def hand_computed(ranks: list[dict], case: Case, scope: str) -> Tensor:
    windows = [list(step) for step in zip(*(r["windows"] for r in ranks), strict=True)]
    assert len(windows) == 3
    return trained(gpt2().double(), case, windows, scope, lr=1e-2)


def reached(rank: dict) -> Tensor:
    return flat(rank["weights"][n] for n, _ in gpt2().named_parameters())


@pytest.mark.few_methods("usam")
@pytest.mark.parametrize(
    ("scope", "case"),
    [p for p in working if p.values[1].method in REFERENCES and "own" not in base_optimizers(p.values[1])],
)
def test_scopes_equal_the_hand_computed_shards(ddp: Runs, scope, case):
    """Law 4 in float64, with unequal counts: the part that ascends undoes its share, and its factor is its own."""
    ranks = ddp[f"shards/{scope}/{case.id}"]
    assert_identical(ranks[0]["weights"], ranks[1]["weights"])
    assert all(len(step) == 2 for r in ranks for step in r["windows"])
    torch.testing.assert_close(reached(ranks[0]), hand_computed(ranks, case, scope), atol=1e-7, rtol=0)


@pytest.mark.few_methods("usam")
@pytest.mark.parametrize(
    ("scope", "case"), [p for p in working if p.values[0] != "global" and p.values[1] in MAIN_CASES]
)
def test_scopes_are_not_the_global_one(ddp: Runs, scope, case):
    ranks = ddp[f"shards/{scope}/{case.id}"]
    assert (reached(ranks[0]) - hand_computed(ranks, case, "global")).abs().max() > 1e-5


@pytest.mark.quick("rank")
@scopes
def test_only_the_finished_gradient_is_sent_outside_the_global_scope(ddp: Runs, scope):
    """Law 5: nothing of pass 1 leaves the rank, and one gradient's worth leaves it in all."""
    gradients = 2 if scope == "global" else 1
    for rank in ddp[f"traffic/{scope}"]:
        assert len(rank["steps"]) == 3
        for sizes in rank["steps"][1:]:
            large = [s for s in sizes if s > rank["gradient"] // 100]
            assert sum(large) == gradients * rank["gradient"]
            assert sum(sizes) - sum(large) < rank["gradient"] / 10, "flags and maps of used parameters"


@scopes
def test_parameters_that_some_ranks_or_none_use(ddp: Runs, scope):
    """A gradient that one rank lacks counts as zero; a parameter that none uses is not decayed."""
    first, second = ddp[f"forked/{scope}"]
    assert_identical(first["weights"], second["weights"])
    assert torch.equal(first["weights"]["none"], first["before"]["none"])
    assert not torch.equal(first["weights"]["first"], first["before"]["first"])
    assert first["states"] == second["states"] == {"all": True, "first": True, "none": False}


@pytest.mark.quick("*-micro_batch")
@scopes
@pytest.mark.parametrize("method", ["usam", "ssam", "keeper"])
def test_gradients_as_bucket_views(ddp: Runs, scope, method):
    """Views are overwritten by the second pass; who needs the first gradient must hold a copy."""
    first, second = ddp[f"views/{scope}"]
    for unused in (False, True):
        expected = first[(method, False, False)]["weights"]
        assert_identical(first[(method, True, unused)]["weights"], expected)
        assert_identical(second[(method, True, unused)]["weights"], expected)


@pytest.mark.quick("SpoiledTrainer-global", "SpoiledSecondPass-rank", "SpoiledSecondPass-micro_batch")
@scopes
@pytest.mark.parametrize("spoiled", ["SpoiledTrainer", "SpoiledSecondPass"])
def test_one_rank_that_is_not_finite_skips_the_step_on_all(ddp: Runs, scope, spoiled):
    first, second = ddp[f"spoiled/{scope}/{spoiled}"]
    assert_identical(first["weights"], second["weights"])
    assert all(t.isfinite().all() for t in first["weights"].values())
    for rank in (first, second):
        assert total_skipped(rank) == 1
        assert rank["scheduled"] == 4
        assert {int(s["step"]) for s in rank["optimizer"].values()} == {4}
        rates = [e["learning_rate"] for e in rank["log"] if "learning_rate" in e]
        assert len(rates) == 5 and len(set(rates)) == 4


def test_ranks_may_hold_unequal_numbers_of_micro_batches(ddp: Runs):
    """mSAM: each rank averages what its own micro-batches ascended to; one that is not finite stops all ranks."""
    first, second = ddp["uneven"]
    model = narrow()
    engine = TwoPass(model, "ssam", 0.1, scope="micro_batch")
    for step in range(3):
        halves = []
        for rank in (0, 1):
            xs = own_batches(step, rank)
            engine.step([partial(squared, model, x, len(xs)) for x in xs])
            halves.append(engine.space.take_grads())
        if step != 1:
            with torch.no_grad():
                for n, p in model.named_parameters():
                    p -= 0.1 * (halves[0][n] + halves[1][n]) / 2
        assert_identical(first["weights"][step], second["weights"][step])
        assert_close(first["weights"][step], dict(model.named_parameters()), 1e-6)
    assert first["skipped"] == second["skipped"] == [False, True, False]


def test_uneven_inputs_joined_by_ddp_are_refused(ddp: Runs):
    for said in ddp["joined"]:
        assert said.startswith("model: DistributedDataParallel.join (join_uneven_inputs) lets")
        assert "even_batches=True" in said


def test_static_graph_where_no_step_varies(ddp: Runs):
    for rank in ddp["static_graph"]:
        assert_identical(rank[True]["weights"], rank[False]["weights"])


def test_every_rank_logs_the_same_and_the_mean_over_ranks(ddp: Runs):
    first, second = ddp["evaluated"]
    assert first["log"] == second["log"]
    assert sum("eval_loss" in e for e in first["log"]) == 2
    alone = ran(MAIN_CASES[0], bert(0.0), text_data(), per_device_train_batch_size=8, max_steps=4, logging_steps=2)
    own = [[e for e in log if "ssam/loss" in e] for log in (first["log"], alone["log"])]
    for entry, single in zip(*own, strict=True):
        names = {n for n in single if n.startswith("ssam/")}
        assert names == {n for n in entry if n.startswith("ssam/")}
        assert all(math.isclose(entry[n], single[n], abs_tol=1e-5) for n in names)


@pytest.mark.quick("micro_batch")
@scopes
def test_batch_norm_moves_once_a_step_as_under_plain_ddp(ddp: Runs, scope):
    """Law 6, and law 1 for buffers: DDP hands rank 0's to the others, in every scope."""
    for rank in ddp[f"batch_norm/{scope}"]:
        assert_identical(rank["tiny"]["weights"], rank["stock"]["weights"])
        counters = {n: t for n, t in rank["real"]["weights"].items() if n.endswith("num_batches_tracked")}
        assert counters and all(t == 3 * 2 for t in counters.values())


@pytest.mark.quick("global", "micro_batch")
@scopes
def test_resume_is_exact(ddp: Runs, scope):
    """Law 8: 4 steps are 2, a resumption and 2, with dropout, accumulation and a falling rho."""
    for rank in ddp[f"resume/{scope}"]:
        straight, halves = rank["whole"], rank["halves"]
        assert_identical(halves["weights"], straight["weights"])
        for index, state in straight["optimizer"].items():
            assert_identical(halves["optimizer"][index], state)
        assert torch.equal(halves["rng"], straight["rng"])
        assert halves["log"][-2] == straight["log"][-2]


@pytest.mark.parametrize("loader", LOADERS)
def test_sample_ids_belong_to_their_rows_on_every_rank(ddp: Runs, loader):
    """Also where one rank reads the batches and sends the others theirs."""
    first, second = ddp[f"sample_ids/{loader}"]
    for rank in (first, second):
        for ids, rows in zip(rank["ids"], rank["rows"], strict=True):
            assert torch.equal(rows, torch.stack([DATA[i]["input_ids"] for i in ids.tolist()]))
    assert all(not set(a.tolist()) & set(b.tolist()) for a, b in zip(first["ids"][:2], second["ids"][:2], strict=True))
    assert set(torch.cat(first["ids"] + second["ids"]).tolist()) == set(range(len(DATA)))
    assert_identical(first["weights"], second["weights"])


def test_counts_of_samples_travel_from_host_to_host(ddp: Runs):
    """A group that moves no host memory gets another beside it, once a trainer; one that does needs none."""
    for rank, through_one in zip(ddp["sample_ids/beside nccl"], ddp["sample_ids/as it comes"], strict=True):
        assert (rank["new_groups"], through_one["new_groups"]) == (1, 0)
        assert_identical(rank["weights"], through_one["weights"])
