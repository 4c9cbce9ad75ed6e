"""The cost of a step: what is compared, what is counted, and what remains of a measurement that is cut off."""

from __future__ import annotations

import contextlib
import csv
import math
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

import benchmark_step
from support import step_meters
from support.step_loops import LIMIT, PLAIN, TRAINER, Loop, Taken, alone, our_trainer, recorded, timed
from support.step_meters import Stopwatch, copy_bandwidth, traced
from support.step_models import Setting
from support.step_report import Measured, Row, least, report, row, table
from support.step_rounds import measured
from tests.support.cases import bert

PEER = """
import torch

class SAM(torch.optim.Optimizer):
    def __init__(self, params, base_optimizer, rho=0.05, **kwargs):
        super().__init__(params, {"rho": rho, **kwargs})
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)

    def first_step(self, zero_grad):
        for p in self.param_groups[0]["params"]:
            self.state[p]["old_p"] = p.data.clone()
        self.zero_grad()

    def second_step(self, zero_grad):
        self.base_optimizer.step()
        self.zero_grad()
"""


@pytest.fixture
def flags(tmp_path):
    bert(labels=6).save_pretrained(tmp_path / "model")
    (tmp_path / "sam.py").write_text(PEER)
    shape = ["--rounds", "1", "--shapes", "8x12", "--device", "cpu", "--model", str(tmp_path / "model")]
    return [*shape, "--output", str(tmp_path / "out"), "--peer_path", str(tmp_path / "sam.py")]


@pytest.mark.slow
def test_benchmark_compares_every_loop_with_a_plain_step_and_with_its_passes(flags, tmp_path, capsys):
    rows = benchmark_step.main([*flags, "--methods", "ssam", "looksam", "momentum_sam", "esam"])
    passes = {"ssam": 2, "looksam": 1.2, "momentum_sam": 1, "esam": 1.5, "davda54/sam": 2}
    passes |= {PLAIN: 1, LIMIT: 2, TRAINER: 2, "SSAMTrainer, ssam": 2, "esam, its passes alone": 1.5}
    by_name = {r.loop: r for r in rows}
    assert {name: by_name[name].passes for name in passes} == pytest.approx(passes)
    for name in (PLAIN, LIMIT, TRAINER):
        assert by_name[name].limit == pytest.approx(1) or name == TRAINER
        assert by_name[name].beyond_ms == pytest.approx(0, abs=1e-9) or name == TRAINER
    assert by_name["esam, its passes alone"].milliseconds * by_name["esam"].limit == pytest.approx(
        by_name["esam"].milliseconds
    ), "of one round: its limit is its own passes, not a share of two bare ones"
    for name in ("ssam", "SSAMTrainer, ssam", TRAINER):
        assert 0 < by_name[name].beside_ms < by_name[name].milliseconds
    # AdamW remembers two vectors; davda54's SAM one more, LookSAM one, and Momentum-SAM its momentum.
    kept = {n: r.kept_bytes / (4 * r.trained) for n, r in by_name.items()}
    assert [kept[n] for n in (PLAIN, "ssam", "SSAMTrainer, ssam")] == pytest.approx([2, 2, 2])
    assert [kept[n] for n in ("davda54/sam", "looksam", "momentum_sam")] == pytest.approx([3, 3, 3])
    assert by_name["davda54/sam"].peak_bytes > by_name[LIMIT].peak_bytes > 0
    assert by_name["davda54/sam"].operations > by_name[LIMIT].operations == by_name[LIMIT].reads == 0
    printed = capsys.readouterr().out
    assert "| ssam | 2.00 |" in printed and "ms beyond its passes, of which the limit is" in printed
    written = list(csv.DictReader((tmp_path / "out" / "step_cost.csv").open()))
    assert [line["loop"] for line in written] == [r.loop for r in rows]
    assert (tmp_path / "out" / "step_cost.png").stat().st_size > 5000


@pytest.mark.slow
def test_benchmark_of_time_only_counts_no_memory(flags, capsys):
    rows = benchmark_step.main([*flags, "--methods", "ssam", "--trainer_methods", "--time_only"])
    assert {r.peak_bytes for r in rows} == {r.operations for r in rows} == {0}
    assert all(r.milliseconds > 0 for r in rows)
    assert "| – |" in capsys.readouterr().out


@pytest.mark.parametrize(("steps", "methods"), [("3", ["looksam"]), ("0", ["ssam"])])
def test_benchmark_refuses_rounds_that_are_no_whole_periods(steps, methods, capsys):
    with pytest.raises(SystemExit):
        benchmark_step.main(["--steps", steps, "--methods", *methods])
    assert f"--steps: {steps} steps are not whole periods" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "work"), [("esam", [("pass", 8), ("look", 8), ("pass", 4)]), ("ausam", [("pass", 4), ("pass", 4)])]
)
def test_benchmark_repeats_the_passes_and_looks_of_a_method_that_selects_samples(method, work):
    batch = {"input_ids": torch.arange(40).view(8, 5), "labels": torch.arange(8) % 3}
    at = Setting(bert().train(), batch, "cpu", bf16=False)
    replayed, passes = recorded(at, method)
    assert passes == sum(size for kind, size in work if kind == "pass") / 8
    assert all(p.grad is None for p in at.trained)
    seen = []
    at.model.register_forward_pre_hook(
        lambda _, args, inputs: seen.append(("pass" if torch.is_grad_enabled() else "look", len(inputs["labels"]))),
        with_kwargs=True,
    )
    alone("", at, AdamW(at.trained, lr=0.0), replayed, passes).run(1)
    assert seen == work


def test_a_step_that_fails_leaves_no_hook_on_the_model():
    at = Setting(bert(), {"input_ids": torch.arange(40).view(8, 5), "labels": torch.full((8,), 99)}, "cpu", bf16=False)
    with pytest.raises(IndexError):
        recorded(at, "esam")
    assert not at.model._forward_pre_hooks


def test_benchmark_that_is_cut_off_keeps_the_rounds_that_are_whole():
    def loop(name: str, ends_at: int | None = None) -> Loop:
        calls = []

        def run(steps: int) -> Taken:
            calls.append(steps)
            if len(calls) == ends_at:
                raise KeyboardInterrupt
            return Taken(float(steps), float(steps), 0.0)

        return Loop(name, run, lambda: 0, traceable=False)

    at = Setting(nn.Linear(1, 1), {}, "cpu", bf16=False)
    found, whole = measured([loop("a"), loop("b", ends_at=4)], 9, 5, at)
    assert not whole
    assert [len(m.seconds) for m in found.values()] == [2, 2], "a warm-up, two rounds, and a third that was cut off"
    with pytest.raises(KeyboardInterrupt):
        measured([loop("a", ends_at=2)], 9, 5, at)


def test_benchmark_bounds_a_step_by_as_many_bare_passes_as_it_takes():
    def of(seconds: list[float], passes: float, baseline: str | None = None) -> Measured:
        return Measured(Loop("", None, None, baseline), np.array(seconds), np.full(2, passes), np.zeros(2))

    found = {PLAIN: of([1.0, 2.0], 1), LIMIT: of([1.8, 3.8], 2), TRAINER: of([2.0, 4.0], 2)}
    assert least(found, of([9.0, 9.0], 2)) == pytest.approx([1.8, 3.8])
    assert least(found, of([9.0, 9.0], 1.5)) == pytest.approx([1.4, 2.9])
    assert least(found, of([9.0, 9.0], 2, TRAINER)) == pytest.approx([2.0, 4.0])


def test_a_watched_ratio_is_what_is_beside_the_passes_over_their_time():
    """The passes of the step take twice as long as its bare ones by chance; the watch does not see them."""

    def of(name: str, seconds: float, beside: float) -> Measured:
        passes = np.full(3, 1.0 if name == PLAIN else 2.0)
        return Measured(Loop(name, None, lambda: 0), np.full(3, seconds), passes, np.full(3, beside))

    found = {m.loop.name: m for m in (of(PLAIN, 1.0, 0.01), of(LIMIT, 2.0, 0.02), of("ssam", 4.0, 0.12))}
    about = dict.fromkeys((f.name for f in fields(Row)[:8]), 1) | {"copy_gb_per_second": 1.0}
    one = row(found, "ssam", about, 1)
    assert (one.limit, one.watched, one.beside_ms) == pytest.approx((2.0, 1.05, 120.0))
    assert "| 1.050 (–) |" in table([one])
    found |= {"half": Measured(Loop("half", None, lambda: 0, LIMIT), np.full(3, 2.0), np.ones(3), np.full(3, 0.12))}
    assert np.isnan(row(found, "half", about, 1).watched), "what it is compared with takes other passes"
    found["ssam"] = of("ssam", 4.0, math.nan)
    assert np.isnan(row(found, "ssam", about, 1).watched) and "nan" not in table([row(found, "ssam", about, 1)])


def test_a_loop_that_is_counted_after_one_that_shares_weights_pays_nothing_for_it():
    at = Setting(nn.Linear(64, 64), {"input": torch.ones(1, 64)}, "cpu", bf16=False)
    kept = []

    def run(steps: int) -> Taken:
        at.model(**at.batch)
        return Taken(1.0, 1.0, 0.0)

    def sharing(steps: int) -> Taken:
        kept.append([p.data for p in at.trained])
        return Taken(1.0, 1.0, 0.0)

    found, _ = measured([Loop("shares", sharing, lambda: 0, traceable=False), Loop("a", run, lambda: 0)], 1, 1, at)
    assert found["a"].traced == traced(lambda: run(1), "cpu")


def test_weights_that_a_loop_has_left_shared_get_memory_of_their_own():
    at = Setting(nn.Linear(3, 3), {}, "cpu", bf16=False)
    kept, values = at.model.weight.data, at.model.weight.detach().clone()
    alone = at.model.bias.data_ptr()
    at.unshare()
    assert at.model.weight.data_ptr() != kept.data_ptr() and at.model.bias.data_ptr() == alone
    assert torch.equal(at.model.weight, values)


def test_a_watch_inside_a_step_leaves_out_passes_looks_and_optimizers(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(step_meters, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    class Model(nn.Linear):
        def forward(self, x):
            now[0] += 3
            return SimpleNamespace(loss=super().forward(x).sum())

    class Steps(SGD):
        def step(self):
            now[0] += 5

    at = Setting(Model(2, 2), {"x": torch.ones(4, 2)}, "cpu", bf16=False)
    optimizer = Steps(at.trained)

    def step() -> float:
        at.forward_backward()
        optimizer.step()
        now[0] += 2
        at.forward(at.batch)
        return 1.0

    with at.watch.watching(at.model):
        assert timed(step, at)(4) == Taken(seconds=4 * (3 + 5 + 2 + 3.0), passes=4.0, beside=4 * 2.0)
    assert timed(step, at)(4).beside == 4 * (5 + 2 + 3), "no longer watched"


@pytest.mark.parametrize(("method", "entries"), [("ssam", 3), ("esam", 4)])
def test_a_trainers_passes_looks_and_optimizer_are_each_watched_once(method, entries):
    """Accelerate wraps the optimizer: that is one step of it, not two."""

    class Counted(Stopwatch):
        times = 0

        @contextlib.contextmanager
        def running(self):
            self.times += not self._runs
            with super().running():
                yield

    batch = {"input_ids": torch.arange(40).view(8, 5), "labels": torch.arange(8) % 3}
    at = Setting(bert().train(), batch, "cpu", bf16=False, watch=Counted())
    with at.watch.watching(at.model):
        taken = our_trainer(at, method).run(2)
    assert at.watch.times == 3 * entries, "of three steps, of which two are timed"
    assert 0 < taken.beside < taken.seconds


def test_what_is_watched_inside_of_something_else_counts_once(monkeypatch):
    now, watch = [0.0], Stopwatch()
    monkeypatch.setattr(step_meters, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    with watch.running():
        now[0] += 1
        with contextlib.suppress(ValueError), watch.running():
            now[0] += 3
            raise ValueError
        now[0] += 1
    now[0] += 7
    assert watch.seconds == 5


def test_what_our_trainer_adds_is_told_from_what_the_method_adds():
    beside = {
        PLAIN: 5.0,
        LIMIT: 10.0,
        "ssam": 50.0,
        TRAINER: 20.0,
        "SSAMTrainer, ssam": 70.0,
        "SSAMTrainer, sam": 60.0,
    }
    blank = dict.fromkeys((f.name for f in fields(Row)), 1) | {"device": "cpu", "milliseconds": 1000.0}
    rows = [Row(**blank | {"loop": name, "beside_ms": ms}) for name, ms in beside.items()]
    assert "50.0 ms more than the stock Trainer, of which 40.0 are the method's: 10.0 ms, 1.0 %" in report(rows, 5)
    assert "SSAMTrainer, sam:" not in report(rows, 5), "`sam` alone was not measured"
    assert "ssam: 40.0 ms beyond its passes" in report(rows, 5)
    on_gpu = [replace(r, beside_ms=math.nan, beyond_ms=33.0) for r in rows]
    assert "ssam: 33.0 ms beyond its passes" in report(on_gpu, 5)
    assert "more than the stock Trainer" not in report(on_gpu, 5), "the host does not wait for a GPU's passes"


@pytest.mark.parametrize(("rounds", "ranks"), [(10, (2, 9)), (25, (8, 18)), (5, None)])
def test_the_interval_of_a_median_is_between_two_rounds(rounds, ranks):
    """Closed form: the k-th smallest of n rounds to the k-th largest misses with twice P(Bin(n, 1/2) < k)."""
    missed = [2 * sum(math.comb(rounds, i) for i in range(k)) / 2**rounds for k in range(rounds // 2 + 1)]
    allowed = [k for k in range(1, len(missed)) if missed[k] <= 0.05]
    assert ranks == ((max(allowed), rounds + 1 - max(allowed)) if allowed else None), "the test's own numbers"
    ratios = np.random.default_rng(0).permutation(np.arange(1, rounds + 1, dtype=float))
    loops = {name: Loop(name, None, lambda: 0) for name in (PLAIN, LIMIT, "ssam")}
    seconds = {PLAIN: np.ones(rounds), LIMIT: np.ones(rounds), "ssam": ratios}
    found = {
        n: Measured(loop, seconds[n], np.full(rounds, 1.0 + (n != PLAIN)), seconds[n]) for n, loop in loops.items()
    }
    about = dict.fromkeys((f.name for f in fields(Row)[:8]), 1) | {"copy_gb_per_second": 1.0}
    one = row(found, "ssam", about, 1)
    if ranks is None:
        assert np.isnan(one.limit_from) and np.isnan(one.limit_to) and "| – |" in table([one])
    else:
        assert (one.limit_from, one.limit_to) == ranks and f"| {ranks[0]:.3f}-{ranks[1]:.3f} |" in table([one])


def test_benchmark_counts_memory_operations_and_host_reads():
    x = torch.ones(1000)

    def work() -> float:
        a = x + 1
        b = a * 2
        del a
        return (b + x).sum().item() + x[0].item()

    found = traced(work, "cpu")
    assert found.reads == 2
    assert 2 * x.nbytes <= found.peak < 2 * x.nbytes + 500
    assert copy_bandwidth(4000, "cpu") > 1e6
